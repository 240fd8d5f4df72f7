"""Evaluation: batched decoding says what single decoding says; its statistics; prompts; the card."""

import importlib.util
import io
import json
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import pytest
from bundles import make_drafter, make_folder
from mlx_lm.tokenizer_utils import TokenizerWrapper
from models import VOCABULARY, RandomDrafter, ScriptedDrafter, make_model

from mlx_redrafter import DraftShape, Sampling, SpeculativeModel, stream_generate
from mlx_redrafter.conversations import Prompt, encode, read_prompts, usable
from mlx_redrafter.engine.engine import Request
from mlx_redrafter.engine.loop import Emitted, until_end
from mlx_redrafter.loading.tokenizer import load_tokenizer
from mlx_redrafter.model import load
from mlx_redrafter.models.target import Target
from mlx_redrafter.train.card import Facts, category_table, environment, escape, evaluation_table, model_card
from mlx_redrafter.train.evaluate import Measured, Row, decode_batch, evaluate, interval, measure
from mlx_redrafter.train.streams import Workers

PROMPTS = [[5, 9, 33, 2, 17, 60, 3], [8], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [44, 91], [70, 70, 3]]
KEY = mx.random.key(0)
SHAPE = DraftShape(2, 4)
GREEDY = Sampling()


class Silent(TokenizerWrapper):
    """Token ids only."""

    def __init__(self, stop=()):
        self.__dict__["stop"] = frozenset(stop)

    bos_token = None
    eos_token_ids = property(lambda self: self.__dict__["stop"])

    @property
    def detokenizer(self):
        return SimpleNamespace(add_token=lambda token: None, finalize=lambda: None, last_segment="")


def plain(model, prompt, count):
    return [r.token for r in islice(mlx_lm.stream_generate(model, Silent(), prompt, count), count)]


def oracle(model, prompts, count):
    """A drafter that knows what the model says after every one of the prompts."""
    scripts = [ScriptedDrafter(Target(model), prompt + plain(model, prompt, count)) for prompt in prompts]
    joined = scripts[0]
    joined.places = mx.concatenate([script.places for script in scripts])
    joined.text = mx.concatenate([script.text for script in scripts])
    return joined


def speculative(base, drafter):
    drafter.config = SimpleNamespace(head_outputs=VOCABULARY, context_layers=())
    return SpeculativeModel(base, drafter)


def decode(model, prompts, max_tokens=24, stop=(), shape=SHAPE, sampling=GREEDY, **options):
    asks = [Request(prompt, max_tokens, sampling, i, frozenset(stop)) for i, prompt in enumerate(prompts)]
    rows = decode_batch(model, shape, asks, **options)
    return SimpleNamespace(rows=rows, tokens=[row.tokens for row in rows])


@pytest.fixture(scope="module")
def model():
    """A random model and a drafter that is right now and then."""
    base = make_model("llama")
    mixed = oracle(base, PROMPTS[:2], 40)
    return speculative(base, mixed)


@pytest.fixture(scope="module")
def texts(model):
    return [plain(model.model, prompt, 40) for prompt in PROMPTS]


def single(model, prompt, max_tokens, stop, shape=SHAPE):
    return list(stream_generate(model, Silent(stop), prompt, max_tokens, shape=shape))


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("stops", [(), (0, 9), (1, 6), (2, 3), (4, 0)])
@pytest.mark.parametrize("max_tokens", [1, 17])
def test_rows_are_what_single_decoding_says(model, texts, batch, stops, max_tokens):
    stop = {texts[stops[0]][stops[1]]} if stops else set()
    for start in range(0, len(PROMPTS), batch):
        some = PROMPTS[start : start + batch]
        for prompt, row in zip(some, decode(model, some, max_tokens, stop).rows, strict=True):
            wanted = single(model, prompt, max_tokens, stop)
            assert (
                row.tokens == [r.token for r in wanted] == cut(plain(model.model, prompt, max_tokens), stop)
            )
            last = wanted[-1]
            assert row.steps == last.steps
            assert row.emitted == last.tokens_per_step * last.steps
            assert tuple(hits / max(row.steps, 1) for hits in row.accepted) == (last.acceptance or (0,) * 4)


def cut(tokens, stop):
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))]


@pytest.mark.parametrize("name", ["llama3-rope", "qwen3", "gemma3"])
def test_other_models(name):
    base = make_model(name)
    model = speculative(base, RandomDrafter(Target(base)))
    found = decode(model, PROMPTS, 20, shape=DraftShape(3, 3, 8))
    assert found.tokens == [plain(base, prompt, 20) for prompt in PROMPTS]


@pytest.mark.parametrize("length", [235, 250])
def test_buffers_grow_and_rows_drop(model, length):
    long = [[(7 * i + n) % 101 for i in range(length)] for n in range(2)]
    prompts = [PROMPTS[0], long[0], PROMPTS[1], long[1]]
    wanted = [plain(model.model, prompt, 40) for prompt in prompts]
    early = [next(t for t in wanted[i] if all(t not in text for text in wanted[1::2])) for i in (0, 2)]
    for stop in ({wanted[1][30]}, set(early)):  # the last rows that are left need larger buffers
        assert decode(model, prompts, 40, stop).tokens == [cut(text, stop) for text in wanted]


def test_an_oracle_emits_all_it_drafts_and_one_more():
    base = make_model("llama")
    model = speculative(base, oracle(base, PROMPTS[:3], 60))
    rows = decode(model, PROMPTS[:3], 41, shape=DraftShape(1, 4)).rows
    assert [row.steps for row in rows] == [8, 8, 8]
    assert [row.accepted for row in rows] == [[8, 8, 8, 8]] * 3
    measured = measure(DraftShape(1, 4), 0, [(Prompt(["x"]), row) for row in rows])
    assert (measured.tokens_per_step, measured.low, measured.high) == (5, 5, 5)
    assert measured.acceptance == [1, 1, 1, 1]


def test_a_wrong_drafter_emits_one_token_a_step():
    base = make_model("llama")
    drafter = ScriptedDrafter(Target(base), PROMPTS[0] + plain(base, PROMPTS[0], 30), shift=1)
    rows = decode(speculative(base, drafter), PROMPTS[:1] * 3, 20, shape=DraftShape(1, 3)).rows
    assert [(row.steps, row.accepted) for row in rows] == [(19, [0, 0, 0])] * 3


def test_rows_are_sampled_independently(model):
    hot = Sampling(1.0)
    found = decode(model, [PROMPTS[0]] * 6, 16, sampling=hot).tokens
    assert found == decode(model, [PROMPTS[0]] * 6, 16, sampling=hot).tokens
    assert len({tuple(text) for text in found}) > 1


@pytest.mark.parametrize(
    "tokens, max_tokens, kept, accepted",
    [
        ([3, 4, 5], 9, [3, 4, 5], [1, 1, 0]),
        ([3, 4, 5], 3, [3, 4], [1, 1, 0]),
        ([3, 4, 5], 2, [3], [1, 0, 0]),
        ([3, 7, 5], 9, [3, 7], [1, 1, 0]),
        ([7, 4, 5], 9, [7], [1, 0, 0]),
        ([3], 9, [3], [0, 0, 0]),
        ([3, 4, 5, 7], 9, [3, 4, 5, 7], [1, 1, 1]),
    ],
)
def test_a_step_is_cut_at_the_end_of_the_text(tokens, max_tokens, kept, accepted):
    row = Row([1], [0, 0, 0])
    said = until_end(tokens, max_tokens - 1, frozenset({7}))
    row.take(Emitted(1, said, min(len(said), len(tokens) - 1)))
    assert (row.tokens, row.accepted, row.steps, row.emitted) == ([1, *kept], accepted, 1, len(kept))


def test_interval():
    assert interval([6, 6, 6], [3, 3, 3]) == (2, 2)
    assert interval([5], [2]) == (2.5, 2.5)
    assert interval([0, 0], [0, 0]) == (0, 0)
    low, high = interval([0, 8], [0, 4])  # draws without any step do not count
    assert (low, high) == (2, 2)
    tokens = [100 + 100 * (i % 2) for i in range(400)]  # a mean of 1.5 with a deviation of 0.5 per prompt
    low, high = interval(tokens, [100] * 400)
    assert 1.5 - low == pytest.approx(1.96 * 0.5 / 20, rel=0.1)
    assert high - 1.5 == pytest.approx(1.96 * 0.5 / 20, rel=0.1)
    uneven, steps = [7 + i * i for i in range(30)], [5 + i for i in range(30)]
    assert interval(uneven, steps) == interval(uneven, steps) != interval(uneven, steps, seed=1)


def test_measure_sums_rows_and_categories():
    found = [
        (Prompt(["a"], "x"), Row([0] * 5, [1, 1], 2)),
        (Prompt(["b"], "x"), Row([0] * 3, [0, 0], 2)),
        (Prompt(["c"], "y"), Row([0] * 2, [0, 0], 1)),
        (Prompt(["d"], "z"), Row([0], [0, 0], 0)),
        (Prompt(["e"]), Row([0] * 4, [2, 0], 1)),
    ]
    m = measure(DraftShape(1, 2), 0.7, found)
    assert (m.prompts, m.tokens, m.steps, m.tokens_per_step) == (5, 10, 6, 10 / 6)
    assert m.acceptance == [3 / 6, 1 / 6]
    assert m.by_category == {"x": 6 / 4, "y": 1}
    assert m.low <= m.tokens_per_step <= m.high


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    base = make_folder(root / "base", "Hé🙂好w!")
    return load(base, drafter=make_drafter(root / "drafter", base))


SAMPLE = [Prompt([text], category) for text, category in [("hello", "a"), ("one two three", "b"), ("é", "a")]]


def silent(items, **_):
    return items


def test_evaluate(loaded):
    shapes = [DraftShape(1, 2), DraftShape(2, 3)]
    calls = []

    def progress(items, desc, unit, total):
        calls.append((total, desc, unit))
        return items

    found = evaluate(*loaded, SAMPLE, shapes, max_tokens=20, batch=2, progress=progress)
    assert [(m.shape, m.temperature) for m in found] == [(s, t) for s in shapes for t in (0, 0.7)]
    assert calls == [(8, "Evaluating", "batch")]
    first = found[0]
    model, tokenizer = loaded
    runs = [
        list(stream_generate(model, tokenizer, encode(p, tokenizer), 20, shape=shapes[0])) for p in SAMPLE
    ]
    assert first.prompts == 3
    assert first.tokens == sum(len(run) - 1 for run in runs)
    assert first.steps == sum(run[-1].steps for run in runs)
    assert set(first.by_category) == {"a", "b"}
    again = evaluate(*loaded, SAMPLE, shapes, max_tokens=20, batch=2, progress=silent, workers=Workers(3))
    assert found == again


def test_a_deadline_ends_after_the_batch(loaded):
    shapes = [DraftShape(1, 2), DraftShape(2, 3)]
    now = time.monotonic()
    (only,) = evaluate(*loaded, SAMPLE, shapes, [0], 20, 2, progress=silent, deadline=now)
    assert (only.shape, only.prompts) in [(shapes[0], 1), (shapes[0], 2)]
    found = evaluate(*loaded, SAMPLE, shapes, [0], 20, 2, progress=silent, deadline=now + 1000)
    assert [m.prompts for m in found] == [3, 3]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_tokens": 0}, "max tokens 0"),
        ({"batch": 0}, "batch 0"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": [*SAMPLE, Prompt(["word " * 2000])]}, "prompt 4 has .* more than the model's context"),
        ({"shapes": [DraftShape(1000, 2)]}, "beam width 1000 exceeds"),
        ({"temperatures": [-1]}, "temperature -1"),
    ],
)
def test_evaluate_refuses(loaded, changes, message):
    options = {"prompts": SAMPLE, "shapes": [SHAPE], "temperatures": [0], "progress": silent, **changes}
    with pytest.raises(ValueError, match=message):
        evaluate(*loaded, **options)


def test_evaluate_refuses_a_model_without_drafter(loaded):
    with pytest.raises(ValueError, match="no drafter: name one"):
        evaluate(SpeculativeModel(loaded[0].model, None), loaded[1], SAMPLE, [SHAPE], progress=silent)


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
REST = [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


def write(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_read_prompts(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        {"question_id": 81, "category": "writing", "turns": ["one\u2028two", "three"]},
        "",
        {"messages": [*CHAT, *REST, REST[0]]},
        {"prompt": "Hi", "category": None},
    )
    assert read_prompts(path) == [
        Prompt(["one\u2028two", "three"], "writing"),
        Prompt(["a", "c"], "", [*CHAT, *REST]),
        Prompt(["Hi"]),
    ]
    path.write_bytes(b"\xef\xbb\xbf" + '{"prompt": "é"}\r\n'.encode())
    assert read_prompts(path) == [Prompt(["é"])]


def test_read_prompts_from_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "x"}\n\n')))
    assert read_prompts("-") == [Prompt(["x"])]
    with pytest.raises(ValueError, match="^standard input holds nothing that can be used"):
        read_prompts("-")


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "3 is no object"),
        ({}, "it has only the keys"),
        ({"text": "x"}, "a text is no prompt"),
        ({"turns": []}, r"turns is \[\]"),
        ({"turns": "x"}, "turns is 'x'"),
        ({"turns": ["x", 3]}, "a turn is 3"),
        ({"prompt": " "}, "prompt is ''"),
        ({"prompt": "\ud83d"}, "half of a character"),
        ({"messages": [3]}, "messages is"),
        ({"messages": CHAT[:1]}, "role user"),
        ({"messages": [{"role": "user"}]}, "content is None"),
        ({"messages": [{"content": "x"}, CHAT[1]]}, "role None is not known"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = write(tmp_path / "p.jsonl", {"prompt": "fine"}, line)
    with pytest.warns(UserWarning, match=message) as caught:
        assert read_prompts(path) == [Prompt(["fine"])]
    text = str(caught[0].message)
    assert (
        text.startswith(f"{path}: left out 1 unusable row; the first, line 2: ")
        and "\n" not in text
        and len(text) < len(str(path)) + 250
    )


def test_bad_files_are_named(tmp_path):
    for path, message in (
        (tmp_path / "none", "cannot be read"),
        (tmp_path, "cannot be read"),
        (write(tmp_path / "bad", {"prompt": 3}), "1 unusable row; the first, line 1: prompt is 3"),
        (write(tmp_path / "empty", "", " "), "holds nothing that can be used"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            read_prompts(path)
        assert str(caught.value).startswith(str(path))
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(ValueError, match="line 1: not UTF-8"):
        read_prompts(tmp_path / "latin")


def test_encode_uses_the_chat_template(loaded):
    tokenizer = loaded[1]
    assert tokenizer.decode(encode(Prompt(["a", "c"]), tokenizer)) == "<user>a</s><says>"
    chat = Prompt(["a", "c"], "", [*CHAT, *REST])
    wanted = "<system>Be brief.</s><user>a</s><assistant>b</s><user>c</s><says>"
    assert tokenizer.decode(encode(chat, tokenizer)) == wanted


def test_encode_without_a_template(tmp_path):
    tokenizer = load_tokenizer(make_folder(tmp_path / "m", tokenizer="sentencepiece"))
    assert not tokenizer.has_chat_template
    assert encode(Prompt(["the quick", "x"]), tokenizer) == tokenizer.encode("the quick")
    assert encode(Prompt(["the quick"]), tokenizer)[0] == tokenizer.bos_token_id


def test_a_template_may_refuse(loaded):
    def refuse(*args, **options):
        raise RuntimeError("no system prompt")

    tokenizer = SimpleNamespace(has_chat_template=True, apply_chat_template=refuse, encode=list)
    with pytest.raises(ValueError, match="refuses messages of system, user .no system prompt.: give other"):
        encode(Prompt(["a"], "", CHAT), tokenizer)


def test_prompts_that_a_template_refuses_are_left_out():
    def encoded(prompt):
        if prompt.turns[0] == "b":
            raise ValueError("refused")
        return [1]

    prompts = [Prompt(["a"]), Prompt(["b"]), Prompt(["c"])]
    with pytest.warns(UserWarning, match="left out 1 unusable row; the first, 'b': refused"):
        assert usable(prompts, encoded) == ([prompts[0], prompts[2]], [[1], [1]])
    with pytest.raises(
        ValueError, match="holds nothing that can be used .1 unusable row; the first, 'b': refused"
    ):
        usable(prompts[1:2], encoded)


def measured(width=2, length=3, nodes=5, temperature=0.0, **changes):
    values = {"prompts": 12, "tokens": 2000, "steps": 800, "tokens_per_step": 2.5}
    more = {"acceptance": [0.8, 0.5, 0.25], "by_category": {"a|b": 2.25}, "low": 2.4, "high": 2.625}
    return Measured(DraftShape(width, length, nodes), temperature, **{**values, **more, **changes})


FACTS = Facts(
    base="org/Base_Model",
    drafter="my drafter",
    identity="org/Base_Model (llama, hidden size 64)",
    license="apache-2.0",
    license_note="As the base model's.",
    commands=("mlx-redrafter train --model org/Base_Model",),
    sizes={"Cell": "gru", "Draft | vocabulary": 8192, "nothing": None},
    parameters=6_700_000,
    bytes_per_step=13_400_000,
    conversations=1234,
    tokens=5_000_000,
    trained_tokens=4_000_000,
    duplicates=17,
    loops=0,
    held_out=55,
    sources=("self_chat.jsonl",),
    seeds={"data": 3},
    versions={"mlx": "0.32.1"},
    steps=9000,
    epochs=1.5,
    seconds=4000,
    loss=(1.5, 2.25),
    top1=(0.625, 0.5),
    measured={"Our held-out prompts": (measured(),)},
    notes=("## More\n\nA *remark*.",),
)


def test_the_card_says_all_that_is_known():
    card = model_card(FACTS)
    assert card == model_card(replace(FACTS))
    assert card.startswith(
        "---\nlibrary_name: mlx-redrafter\nlicense: apache-2.0\nbase_model: org/Base_Model\n"
    )
    for text in (
        "# A recurrent drafter for org/Base\\_Model\n",
        "--model org/Base_Model --drafter 'my drafter' --prompt",
        'load("org/Base_Model", drafter="my drafter")',
        "mlx-redrafter train --model org/Base_Model\n```",
        "- Base model: org/Base\\_Model (llama, hidden size 64)",
        "- Draft \\| vocabulary: 8192",
        "- Parameters: 6,700,000",
        "- Read from memory per drafted token: 13.40 MB",
        "- Conversations trained on: 1,234",
        "- Tokens trained on: 4,000,000",
        "- Dropped as duplicates: 17",
        "- Dropped as loops: 0",
        "- Sources: self\\_chat.jsonl",
        "- Epochs: 1.50",
        "- Time: 1 h 6 min",
        "- Seeds: data 3",
        "- Versions: mlx 0.32.1",
        "| loss (nats) | 1.500 | 2.250 |",
        "| top-1 | 0.625 | 0.500 |",
        "| 2 × 3, 5 | 0 | 12 | 2,000 | **2.50** (2.40–2.62) | 0.80 0.50 0.25 |",
        "| tokens per step | a\\|b |",
        "| 2 × 3, 5 at 0 | 2.25 |",
        "A *remark*.",
        "## License\n\napache-2.0\n\nAs the base model's.\n",
    ):
        assert text in card, text
    assert "nothing" not in card and "None" not in card


def test_the_card_leaves_out_what_is_not_known():
    card = model_card(Facts("models/a|b\n`c`"))
    assert "# A recurrent drafter for models/a\\|b \\`c\\`\n" in card
    assert "##" not in card and "base_model" not in card and "license" not in card and "None" not in card


def test_front_matter_is_yaml():
    yaml = pytest.importorskip("yaml")
    for license in ("mit", "other: [see", "no", "été"):
        head = model_card(replace(FACTS, license=license)).split("---\n")[1]
        assert yaml.safe_load(head) == {
            "library_name": "mlx-redrafter",
            "license": license,
            "base_model": "org/Base_Model",
            "tags": ["mlx", "redrafter", "speculative-decoding"],
        }


def test_code_in_a_card_cannot_end_its_block():
    card = model_card(replace(FACTS, commands=("echo '```'",)))
    assert "````bash\necho '```'\n````" in card


def test_tables():
    rows = [measured(), measured(1, 1, 2, 0.7, by_category={"c": 1.0}, acceptance=[0.5])]
    lines = evaluation_table(rows).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert category_table(rows).splitlines()[2:] == [
        "| 2 × 3, 5 at 0 | 2.25 |  |",
        "| 1 × 1, 2 at 0.7 |  | 1.00 |",
    ]
    assert category_table([measured(by_category={})]) == ""
    assert escape("a_b|c*\n<d>") == "a\\_b\\|c\\* \\<d\\>"


def test_environment():
    found = environment()
    assert set(found) == {"mlx-redrafter", "mlx", "mlx-lm", "python", "platform", "chip"} and all(
        found.values()
    )


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[1] / "benchmarks" / "acceptance.py"
    spec = importlib.util.spec_from_file_location("acceptance", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_writes_after_each_shape(benchmark, tmp_path, monkeypatch, capsys):
    base = make_folder(tmp_path / "base", "Hé🙂好w!")
    drafter = make_drafter(tmp_path / "drafter", base)
    prompts = write(tmp_path / "p.jsonl", *({"prompt": p.turns[0], "category": p.category} for p in SAMPLE))
    output = tmp_path / "new" / "results.json"
    options = ["--tokens", "12", "--shapes", "1,2", "2,2,4", "--temperature", "0", "1", "--limit", "2"]
    command = ["acceptance.py", "--model", base, "--drafter", drafter, "--prompts", prompts]
    monkeypatch.setattr("sys.argv", [*map(str, command), *options, "--output", str(output)])
    written = []
    write_json = benchmark.write_json
    monkeypatch.setattr(
        benchmark,
        "write_json",
        lambda path, report: (write_json(path, report), written.append(len(report["results"]))),
    )
    benchmark.main()
    assert written == [2, 4]
    report = json.loads(output.read_text())
    assert [(m["shape"]["nodes"], m["temperature"], m["prompts"]) for m in report["results"]] == [
        (None, 0, 2),
        (None, 1, 2),
        (4, 0, 2),
        (4, 1, 2),
    ]
    assert list(output.parent.iterdir()) == [output]
    assert capsys.readouterr().out.count("\n| 2 × 2, 4 | 1 | 2 |") == 1
    monkeypatch.setattr("sys.argv", [*map(str, command), "--shapes", "3", "--output", str(output)])
    with pytest.raises(SystemExit, match="error: shape '3' is not usable: give"):
        benchmark.main()


def test_a_sample_is_spread_over_the_file(benchmark):
    prompts = read_prompts(benchmark.HELD_OUT)
    kinds = [p.category for p in prompts]
    assert len(prompts) == len({p.turns[0] for p in prompts}) == 60
    assert all(kinds.count(kind) == 12 for kind in kinds)
    assert {p.category for p in benchmark.sample(prompts, 5)} == set(kinds)
    assert benchmark.sample(prompts, None) == benchmark.sample(prompts, 99) == prompts
    with pytest.raises(ValueError, match="--limit 0"):
        benchmark.sample(prompts, 0)
