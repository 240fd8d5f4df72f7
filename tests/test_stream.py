"""The Python API next to mlx-lm's: same tokens, texts and caches; stop texts; what it refuses."""

import gc
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from bundles import make_drafter, make_folder
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from models import RandomDrafter, ScriptedDrafter, make_model

from mlx_redrafter import DraftShape, Sampling, SpeculativeModel, generate, load, stream_generate
from mlx_redrafter.decoding.layers import Layers
from mlx_redrafter.decoding.state import State
from mlx_redrafter.engine import backend
from mlx_redrafter.engine.engine import Engine
from mlx_redrafter.engine.loop import Fixed, Text
from mlx_redrafter.loading.tokenizer import load_tokenizer
from mlx_redrafter.models.target import Target
from mlx_redrafter.stop_texts import until
from mlx_redrafter.text import Response

PROMPT = [5, 9, 33, 2, 17, 60, 3]
SHAPE = DraftShape(2, 4)
SAYS = "Hé🙂好w!"
FIELDS = ("text", "token", "prompt_tokens", "generation_tokens", "finish_reason")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_folder(tmp_path_factory.mktemp("tokenizer") / "model"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By tokenizer, a model that says SAYS after ``>``, and its drafter."""
    root = tmp_path_factory.mktemp("folders")
    made = {}
    for name in ("byte-level", "sentencepiece"):
        base = make_folder(root / name, SAYS, name)
        made[name] = base, make_drafter(root / f"{name}-drafter", base)
    return made


@pytest.fixture(scope="module")
def model():
    """A random model and a drafter that knows what it says after PROMPT, or later in that text."""
    base = make_model("llama3-rope", vocab_size=300)
    text = [r.token for r in mlx_lm.stream_generate(base, Silent(), PROMPT, 80)]
    speculative = SpeculativeModel(base, known(base, PROMPT + text))
    speculative.text = text
    speculative.use_policy(Fixed(SHAPE))
    return speculative


def known(base, text):
    drafter = ScriptedDrafter(Target(base), text)
    drafter.config = SimpleNamespace(head_outputs=drafter.vocabulary, context_layers=())
    return drafter


class Silent(mlx_lm.tokenizer_utils.TokenizerWrapper):
    """Token ids only."""

    def __init__(self):
        pass

    eos_token_ids = frozenset()
    bos_token = None

    @property
    def detokenizer(self):
        return SimpleNamespace(add_token=lambda token: None, finalize=lambda: None, last_segment="")


def ending(tokenizer, *tokens):
    """The same tokenizer with other ends of generation."""
    copy = mlx_lm.tokenizer_utils.TokenizerWrapper(tokenizer._tokenizer, type(tokenizer._detokenizer))
    copy.eos_token_ids = tokens
    return copy


def fields(responses):
    return [tuple(getattr(response, name) for name in FIELDS) for response in responses]


def both(model, tokenizer, prompt=PROMPT, max_tokens=40, **options):
    """Ours and mlx-lm's responses."""
    mine = list(stream_generate(model, tokenizer, prompt, max_tokens, shape=SHAPE, **options))
    theirs = list(mlx_lm.stream_generate(model.model, tokenizer, prompt, max_tokens, **options))
    assert fields(mine) == fields(theirs)
    for left, right in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(np.array(left.logprobs), np.array(right.logprobs), atol=1e-3)
    return mine


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 6, 7, 40])
def test_cut_anywhere_in_a_step(model, tokenizer, max_tokens):
    responses = both(model, ending(tokenizer), max_tokens=max_tokens)
    assert [r.token for r in responses] == model.text[:max_tokens]
    assert responses[-1].finish_reason == "length"
    if max_tokens == 40:
        assert responses[-1].tokens_per_step > 4  # so the cuts above are in the middle of a step
        assert any(r.from_draft for r in responses)


@pytest.mark.parametrize("place", [0, 1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("max_tokens", [-1, 10])
def test_the_end_of_the_text_anywhere_in_a_step(model, tokenizer, place, max_tokens):
    end = model.text[place]
    responses = both(model, ending(tokenizer, end), max_tokens=max_tokens)
    assert responses[-1].finish_reason == "stop"
    assert len(responses) == model.text.index(end) + 1


@pytest.mark.parametrize("prompt", [PROMPT, mx.array(PROMPT), np.array(PROMPT), "hello 🙂", "<s>hello"])
def test_prompts_of_every_kind(model, tokenizer, prompt):
    if isinstance(prompt, np.ndarray):
        assert [r.token for r in stream_generate(model, ending(tokenizer), prompt, 9)] == model.text[:9]
    else:
        both(model, tokenizer, prompt, 9)


@pytest.mark.parametrize("sampler", [make_sampler(temp=0), make_sampler(temp=0.0, top_p=0.9)])
def test_mlx_lms_greedy_samplers(model, tokenizer, sampler):
    both(model, tokenizer, sampler=sampler)


def test_mlx_lms_samplers_that_sample(model, tokenizer):
    sampler = make_sampler(temp=1.5, top_p=0.9, top_k=9)

    def run(seed):
        responses = stream_generate(model, tokenizer, PROMPT, 40, sampler=sampler, seed=seed, shape=SHAPE)
        return [r.token for r in responses]

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize("draft", [True, False])
def test_a_seed_makes_sampling_repeatable(model, tokenizer, draft):
    def run(seed):
        hot = Sampling(temperature=1.0, top_p=0.95)
        return generate(model, tokenizer, PROMPT, max_tokens=40, sampling=hot, seed=seed, draft=draft)

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_progress_is_reported_as_by_mlx_lm(model, tokenizer):
    calls = {"mine": [], "theirs": []}
    prompt = list(range(2, 23))
    for who, function, base in (
        ("mine", stream_generate, model),
        ("theirs", mlx_lm.stream_generate, model.model),
    ):
        note = lambda done, total, who=who: calls[who].append((done, total))  # noqa: E731
        options = {"prefill_step_size": 6, "prompt_progress_callback": note}
        list(function(base, tokenizer, prompt, 3, **options))
    assert calls["mine"] == calls["theirs"]
    assert len(calls["mine"]) == 6


def turns(function, model, tokenizer, max_tokens, leave_after=None):
    """The second turn's tokens, and what the cache held before it, in mlx-lm's or our program."""
    cache = make_prompt_cache(model)
    first = function(model, tokenizer, PROMPT, max_tokens, prompt_cache=cache)
    for count, _ in enumerate(first, 1):
        if count == leave_after:
            break
    first.close()
    held = cache[0].offset
    second = [r.token for r in function(model, tokenizer, [7, 8, 9], 12, prompt_cache=cache)]
    return second, held, cache[0].offset, np.array(cache[0].keys)[:, :, : cache[0].offset]


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 30, 300])
def test_a_second_turn_on_the_same_cache(model, tokenizer, max_tokens):
    plain = ending(tokenizer)
    mine = turns(stream_generate, model, plain, max_tokens)
    theirs = turns(mlx_lm.stream_generate, model.model, plain, max_tokens)
    assert mine[:3] == theirs[:3]
    assert mine[1] == len(PROMPT) + max_tokens
    np.testing.assert_allclose(mine[3], theirs[3], atol=1e-4)


@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_second_turn_after_the_end_of_the_text(model, tokenizer, place):
    brief = ending(tokenizer, model.text[place])
    mine = turns(stream_generate, model, brief, 30)
    theirs = turns(mlx_lm.stream_generate, model.model, brief, 30)
    assert mine[:3] == theirs[:3]


@pytest.mark.parametrize("leave_after", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_second_turn_after_leaving_early(model, tokenizer, leave_after):
    """Wherever in a step the caller leaves, the cache holds what it has been given."""
    plain = ending(tokenizer)
    mine = turns(stream_generate, model, plain, 30, leave_after)
    theirs = turns(mlx_lm.stream_generate, model.model, plain, 30, leave_after)
    assert mine[:3] == theirs[:3]
    assert mine[1] == len(PROMPT) + leave_after
    np.testing.assert_allclose(mine[3], theirs[3], atol=1e-4)


def test_after_a_stop_text_the_cache_holds_what_was_said(folders):
    model, tokenizer = load(folders["byte-level"][0], drafter=folders["byte-level"][1])
    cache = make_prompt_cache(model)
    tokens = [r.token for r in stream_generate(model, tokenizer, ">", 99, stop="好", prompt_cache=cache)]
    assert cache[0].offset == 1 + len(tokens)
    rest = stream_generate(model, tokenizer, tokens[-1:], 99, prompt_cache=cache)
    assert "".join(r.text for r in rest) == "w!"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kv_bits": 8, "quantized_kv_start": 5000}, "kv_bits"),  # heads of 32 have no groups of 64
        ({"max_kv_size": 16}, "max_kv_size=16"),
    ],
)
def test_what_the_drafter_cannot_follow_is_decoded_plainly(tokenizer, options, named):
    base = make_model("llama", vocab_size=300, head_dim=32)
    model = SpeculativeModel(base, known(base, PROMPT))
    options = options if isinstance(options, dict) else options()
    with pytest.warns(UserWarning, match=f"without the drafter.*{named}"):
        mine = list(stream_generate(model, tokenizer, PROMPT, 30, **options))
    options = options if "logits_processors" not in options else {
        "logits_processors": make_logits_processors({3: 5.0}, 1.3)
    }  # fmt: skip
    assert fields(mine) == fields(mlx_lm.stream_generate(base, tokenizer, PROMPT, 30, **options))
    assert mine[-1].steps == 0


@pytest.mark.parametrize(
    "options",
    [
        {"kv_bits": None, "kv_group_size": 64, "quantized_kv_start": 5000},
        {"logits_processors": []},
        {"logits_processors": None, "num_draft_tokens": 3, "draft_model": None},
        {"max_kv_size": 1000},
    ],
)
def test_options_that_ask_for_nothing_keep_the_drafter(model, tokenizer, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert both(model, tokenizer, **options)[-1].steps > 0


def test_any_model_is_accepted_without_a_drafter(tokenizer):
    base = make_model("qwen2", vocab_size=300)
    assert fields(stream_generate(base, tokenizer, PROMPT, 9)) == fields(
        mlx_lm.stream_generate(base, tokenizer, PROMPT, 9)
    )
    assert generate(base, tokenizer, PROMPT, max_tokens=9) == mlx_lm.generate(
        base, tokenizer, PROMPT, max_tokens=9
    )


def test_a_speculative_model_is_usable_in_mlx_lm(model, tokenizer):
    assert fields(mlx_lm.stream_generate(model, tokenizer, PROMPT, 9)) == fields(
        mlx_lm.stream_generate(model.model, tokenizer, PROMPT, 9)
    )


def test_a_bad_drafter_changes_nothing(tokenizer):
    base = make_model("qwen3", vocab_size=300)
    drafter = RandomDrafter(Target(base))
    drafter.config = SimpleNamespace(head_outputs=300, context_layers=())
    both(SpeculativeModel(base, drafter), tokenizer)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("draft", [True, False])
def test_text_streams_in_whole_characters(folders, kind, draft):
    base, drafter = folders[kind]
    model, tokenizer = load(base, drafter=drafter)
    responses = list(stream_generate(model, tokenizer, ">", 99, shape=SHAPE, draft=draft))
    texts = [r.text for r in responses]
    assert "".join(texts) == SAYS
    assert "�" not in "".join(texts)
    assert len(texts) > len(SAYS)  # most tokens are parts of a character
    assert texts.count("") == len(texts) - len(SAYS)
    if draft:
        assert responses[-1].tokens_per_step > 2


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("🙂", "Hé"),
        ("é🙂好", "H"),
        (["w!", "好w"], "Hé🙂"),
        (["é", "é🙂"], "H"),
        (["é🙂", "é"], "H"),
        (["🙂", "é🙂好"], "H"),  # whatever is over first, what begins first counts
        (["x", "好x", "!x"], SAYS),
        ("!", "Hé🙂好w"),
        ("Hé🙂好w!", ""),
    ],
)
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_stop_texts(folders, kind, stop, expected):
    base, drafter = folders[kind]
    model, tokenizer = load(base, drafter=drafter)
    responses = list(stream_generate(model, tokenizer, ">", 99, stop=stop))
    assert "".join(r.text for r in responses) == expected
    assert responses[-1].finish_reason == "stop"
    assert [r.finish_reason for r in responses[:-1]] == [None] * (len(responses) - 1)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_stop_texts_do_not_depend_on_the_tokens(size):
    def cut(text, stop):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        reasons = [None] * (len(pieces) - 1) + ["length"]
        rest = (0, 0, False, 0, 0, 0, 0, 0)
        responses = (Response(p, *rest, finish_reason=r) for p, r in zip(pieces, reasons, strict=True))
        return "".join(r.text for r in until(responses, stop))

    for text in ("abcabdabe", "aaab", "ababac", "xabcd"):
        for stop in (["abd"], ["b", "abc"], ["aab"], ["abac", "bab"], ["abcx", "bc"], ["dab", "da"], ["zz"]):
            places = [text.index(phrase) for phrase in stop if phrase in text]
            assert cut(text, stop) == text[: min(places, default=len(text))], (text, stop)


def test_verbose_output(folders, capsys):
    base, drafter = folders["byte-level"]
    model, tokenizer = load(base, drafter=drafter)
    assert generate(model, tokenizer, ">", verbose=True) == SAYS
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["=" * 10, SAYS, "=" * 10]
    assert [line.split(":")[0] for line in lines[3:]] == ["Prompt", "Generation", "Drafting", "Peak memory"]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ("", {}, "the prompt is empty"),
        ([1, 300], {}, "token 300, but the model knows 300"),
        ([-1], {}, "token -1"),
        ([[1, 2]], {}, "flat list"),
        (mx.array([1.5]), {}, "flat list"),
        (PROMPT, {"max_tokens": 0}, "max tokens 0"),
        (PROMPT, {"max_tokens": -2}, "max tokens -2"),
        (PROMPT, {"prefill_step_size": 0}, "prefill step size 0"),
        (PROMPT, {"seed": -1}, "seed -1"),
        (PROMPT, {"seed": 1 << 64}, "seed 18446744073709551616"),
        (PROMPT, {"stop": ["a", ""]}, "empty stop text"),
        (PROMPT, {"shape": DraftShape(301, 1)}, "beam width 301 exceeds the drafter's vocabulary of 300"),
        (PROMPT, {"shape": DraftShape(2, 513)}, "draft 1026 tokens per step"),
        (PROMPT, {"sampling": Sampling(), "sampler": make_sampler(0.5)}, "both given"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(model, tokenizer, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        stream_generate(model, tokenizer, prompt, **options)


def test_a_prompt_beyond_the_context_is_refused(model, tokenizer):
    short = SpeculativeModel(model.model, None, context_length=8)
    assert len(list(stream_generate(short, tokenizer, list(range(8)), 2))) == 2
    with pytest.raises(ValueError, match="9 tokens, more than the model's context of 8"):
        stream_generate(short, tokenizer, list(range(9)), 2)
    cache = make_prompt_cache(short)
    list(stream_generate(short, tokenizer, PROMPT, 1, prompt_cache=cache))
    with pytest.raises(ValueError, match="more than the model's context"):
        stream_generate(short, tokenizer, [1], 2, prompt_cache=cache)


def test_tokens_that_the_tokenizer_lacks(tokenizer, folders):
    base = make_model("llama", vocab_size=5000)  # which says many
    model = SpeculativeModel(base, known(base, PROMPT))
    both(model, tokenizer)  # mlx-lm shows them as "!"
    _, sentencepiece = load(folders["sentencepiece"][0], drafter=None)
    for draft in (True, False):  # and has no answer here
        with pytest.raises(ValueError, match="its tokenizer does not have"):
            list(stream_generate(model, sentencepiece, PROMPT, 40, shape=SHAPE, draft=draft))


@pytest.mark.parametrize("device", [backend.CPU, backend.METAL], ids=lambda device: device.name)
def test_two_threads_at_once_get_what_each_gets_alone(device, tokenizer, monkeypatch):
    monkeypatch.setattr(backend, "current", lambda: device)
    base = make_model("llama3-rope", vocab_size=300)
    model = SpeculativeModel(base, known(base, PROMPT))
    asked = [
        ([PROMPT, {}], [[8, 8, 9], {}]),
        ([PROMPT, {"sampling": Sampling(1.0), "seed": 3}], [PROMPT, {"sampling": Sampling(1.0), "seed": 4}]),
        ([[7] * 30, {"sampling": Sampling(0.7, top_p=0.9), "seed": 1 << 40}], [PROMPT, {}]),
    ]

    def run(prompt, options, start=lambda: None):
        responses = stream_generate(model, tokenizer, prompt, 25, shape=SHAPE, **options)
        start()
        return fields(responses)

    for pair in asked:
        alone = [run(*each) for each in pair]
        assert alone[0] != alone[1]
        start = Barrier(2).wait
        with ThreadPoolExecutor(2) as pool:
            together = [pool.submit(run, *each, start) for each in pair]
            assert [each.result() for each in together] == alone


THREAD_AT_THE_END = """
import os, sys, threading, mlx_redrafter as r
if sys.platform == "linux":  # as users' programs are run, and not as conftest.py has it
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
model, tokenizer = r.load(sys.argv[1])
shape = r.DraftShape(0, 0, 3, 2)  # so that no step times are measured
say = lambda: [*r.stream_generate(model, tokenizer, "a b c", max_tokens=6, shape=shape)]
say()
threading.Thread(target=say).start()
"""


def test_a_program_that_ends_with_its_thread(tmp_path):
    """MLX aborts where Python ends while a thread does, which it did in seven runs of eight."""
    folder = make_folder(tmp_path / "model")
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", THREAD_AT_THE_END, str(folder)], capture_output=True)
        assert done.returncode == 0, done.stderr.decode()


def settled(before):
    """Whether all is as it was ``before``, once the device has done what it had begun."""
    for _ in range(100):
        if held() == before:
            return True
        time.sleep(0.02)
    return False


def held():
    """Bytes in use, and how many objects there are that hold a text's rows."""
    mx.synchronize()
    kinds = (Engine, State, Layers, Text)
    return mx.get_active_memory(), sum(type(each) in kinds for each in gc.get_objects())


def close(responses):
    responses[0].close()


def forget(responses):
    responses.clear()


def leave_to_the_collector(responses):
    responses.append(responses)
    del responses


def fail(responses):
    with pytest.raises(ZeroDivisionError):
        for _ in responses.pop():
            1 / 0  # noqa: B018


@pytest.mark.parametrize("asked_for", [0, 1, 4])
@pytest.mark.parametrize("abandon", [close, forget, leave_to_the_collector, fail])
def test_what_is_abandoned_gives_its_memory_back(model, tokenizer, abandon, asked_for):
    plain = ending(tokenizer)
    responses = []
    for turn in range(2):  # in the first, what stays with the model is made
        gc.collect()
        before = held()
        responses = [stream_generate(model, plain, PROMPT, 40, shape=SHAPE)]
        for _ in range(asked_for):
            next(responses[0])
        assert (mx.get_active_memory() > before[0] + 1000) == (asked_for > 0)
        abandon(responses)
        if abandon is leave_to_the_collector:
            del responses
            gc.collect()
        assert turn == 0 or settled(before)
    assert [r.token for r in stream_generate(model, plain, PROMPT, 40, shape=SHAPE)] == model.text[:40]


def test_an_error_of_the_callers_function_ends_its_text_only(model, tokenizer):
    plain = ending(tokenizer)

    def bad(tokens, logits):
        if len(tokens) > len(PROMPT) + 5:
            raise KeyError("mine")
        return logits

    def run(**options):
        return [r.token for r in stream_generate(model, plain, PROMPT, 40, shape=SHAPE, **options)]

    assert run() == model.text[:40]
    gc.collect()
    before = held()
    for name in ("logits_processors", "sampler"):
        other = stream_generate(model, plain, PROMPT, 40, shape=SHAPE)
        next(other)
        options = {name: [bad] if name == "logits_processors" else lambda logits: [][len(logits)]}
        with pytest.raises((KeyError, IndexError)):
            run(**options)
        assert [r.token for r in other] == model.text[1:40]
        assert run() == model.text[:40]
        del other
        assert settled(before)
