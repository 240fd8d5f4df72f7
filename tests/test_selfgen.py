"""Training data that the model writes itself, with tiny models and many chat templates."""

import itertools

import bundles
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama
from test_data import TALK, make_tokenizer, messages

from mlx_redrafter.model import SpeculativeModel
from mlx_redrafter.models.target import Target
from mlx_redrafter.train import data, run, selfgen
from mlx_redrafter.train.selfgen import Recipe, generate
from mlx_redrafter.train.streams import Workers
from mlx_redrafter.train.template import STOP_TOKENS, Template
from mlx_redrafter.train.work import Request

VOCABULARY = 310
MARKED = ("chatml", "gemma", "inst", "llama3", "zephyr")  # templates whose answers end with a special token
LONGEST = 12
RECIPE = Recipe(length=96, batch=5, temperature=1.5, user_temperature=1.5, longest_user_turn=LONGEST)
TURNS = ["user, say one", "you"]


class Ending(Target):
    """A model that ends its turns more often than a random one would."""

    ends: tuple[int, ...] = ()

    def _forward(self, tokens, caches, *others):
        logits, hidden, after = super()._forward(tokens, caches, *others)
        boost = mx.zeros(logits.shape[-1])
        for end in self.ends:
            boost = mx.where(mx.arange(logits.shape[-1]) == end, 3.0, boost)
        return logits + boost, hidden, after


class Oracle(Target):
    """A model that says one text, whatever it is fed."""

    text: list[int]

    def _forward(self, tokens, caches, *others):
        start = mx.array(caches[0].offset).reshape(-1, 1)
        logits, hidden, after = super()._forward(tokens, caches, *others)
        places = mx.minimum(start + 1 + mx.arange(tokens.shape[1]), len(self.text) - 1)
        following = mx.array(self.text)[places]
        says = mx.where(mx.arange(VOCABULARY) == following[..., None], 9.0, 0.0)  # [b or 1, n, V]
        return mx.broadcast_to(says, logits.shape), hidden, after


@pytest.fixture(scope="module")
def model():
    config = {**bundles.CONFIG, "vocab_size": VOCABULARY}
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.load_weights(list(bundles.make_weights(config).items()))
    model.eval()
    return model


def target_of(model, tokenizer) -> Ending:
    target = Ending(model)
    target.ends = tuple(tokenizer.eos_token_ids)
    return target


def rows_of(generated) -> list[list[int]]:
    return [c.tokens.tolist() for c in generated.conversations]


def answers(conversation, tokenizer) -> list[list[int]]:
    """The runs of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], conversation.trained.astype(int), [0]])))
    return [conversation.tokens[a:b].tolist() for a, b in edges.reshape(-1, 2)]


# --- Templates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MARKED, "plain"])
def test_what_the_model_says_of_a_conversation_makes_that_conversation(name, model):
    tokenizer = make_tokenizer(name)
    wanted = data.tokenize(messages(TALK), tokenizer, 500)
    recipe = Recipe(length=len(wanted.tokens), batch=2, temperature=0, user_temperature=0)
    oracle = Oracle(model)
    oracle.text = wanted.tokens.tolist()
    generated = generate(oracle, tokenizer, recipe, 0)
    for found in generated.conversations:
        assert found.tokens.tolist() == wanted.tokens.tolist()
        if name == "plain":  # the model says the beginning of "\n\n### Human:" itself
            assert (found.trained >= wanted.trained).all()
            assert found.trained.sum() == wanted.trained.sum() + STOP_TOKENS + 2
        else:
            assert found.trained.tolist() == wanted.trained.tolist()


@pytest.mark.parametrize("name", MARKED)
def test_pieces_of_the_template_stand_between_the_turns(name, model):
    tokenizer = make_tokenizer(name)
    template = Template.of(tokenizer)
    generated = generate(target_of(model, tokenizer), tokenizer, RECIPE, 0)
    answers = [check_row(row, template) for row in generated.conversations]
    assert sum(answers) > RECIPE.batch


def check_row(row, template) -> int:
    """Walk along a row from turn to turn; returns how many answers were ended."""
    assert (len(row.tokens), len(row.trained)) == (RECIPE.length, RECIPE.length)
    tokens, place, ended = row.tokens.tolist(), len(template.begin(None)), 0
    assert tokens[:place] == template.begin(None)
    assert not row.trained[:place].any()
    for turn in itertools.cycle((template.user, template.assistant)):
        answering = turn is template.assistant
        last = len(tokens) if answering else min(place + LONGEST, len(tokens))
        end = next((i + 1 for i in range(place, last) if tokens[i] in turn.ends), 0)
        said = next((i + 1 for i, token in enumerate(turn.then) if token in turn.ends), 0) if end else 0
        start, place, rest = place, end or last, list(turn.then[said:])
        assert place - start > 1 or place == len(tokens)  # nobody says nothing
        assert (row.trained[start:place] == answering).all()
        forced = tokens[place : place + len(rest)]
        assert forced == rest[: len(forced)]
        assert not row.trained[place : place + len(rest)].any()
        place += len(rest)
        if place >= len(tokens):
            break
        ended += answering
    return ended


def test_turns_end_as_their_template_says():
    chatml, inst, plain = (Template.of(make_tokenizer(name)) for name in ("chatml", "inst", "plain"))
    end = chatml.tokenizer.convert_tokens_to_ids("<|im_end|>")
    eos = chatml.tokenizer.eos_token_id
    assert chatml.assistant.then[0] == end
    assert chatml.assistant.said([5, end]) == 1
    assert chatml.assistant.said([5, eos]) == 1  # the end of all text stands for the turn's
    assert chatml.assistant.said([end, 5]) is None
    assert inst.tokenizer.decode(list(inst.user.then)) == " [/INST]"
    assert inst.user.said([5, *inst.user.then]) == len(inst.user.then)
    assert inst.user.said([5, *inst.user.then[:-1]]) is None
    assert inst.user.said([5, eos]) == 0
    assert inst.user.never_first == {eos}
    assert plain.tokenizer.decode(list(plain.assistant.then)) == "\n\n### Human:"
    assert plain.assistant.said(plain.assistant.then[:8]) == 8
    assert plain.assistant.said(plain.assistant.then[:7]) is None


def test_system_prompts(model):
    tokenizer = make_tokenizer("chatml")
    recipe = Recipe(length=64, batch=8, systems=("be brief", "one two"))
    texts = [tokenizer.decode(row) for row in rows_of(generate(Target(model), tokenizer, recipe, 0))]
    starts = {text.split("<|im_end|>")[0] for text in texts}
    assert starts == {f"<|im_start|>system\n{system}" for system in recipe.systems}
    for name in ("gemma", "inst"):
        with pytest.raises(ValueError, match="takes no system prompt"):
            generate(Target(model), make_tokenizer(name), recipe, 0)


def test_templates_that_cannot_be_used():
    tokenizer = make_tokenizer("chatml")
    for template, says in (
        ("{{ raise_exception('no') }}", "refuses messages of user .no"),
        ("<s>", "does not show the user's text"),
        ("{{ messages[0]['content'] }}", "leaves out earlier turns"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=says):
            Template.of(tokenizer)


# --- Generation ----------------------------------------------------------------------------------------


def test_seed_and_index_decide_everything(model):
    tokenizer = make_tokenizer("chatml")
    target = target_of(model, tokenizer)
    first = rows_of(generate(target, tokenizer, RECIPE, 0))
    calls = []
    again = generate(target, tokenizer, RECIPE, 0, progress=lambda *x: calls.append(x))
    assert rows_of(again) == first
    assert calls[-1] == (96, 96)
    assert len({str(row) for row in first}) == RECIPE.batch
    assert rows_of(generate(target, tokenizer, RECIPE, 1)) != first
    changed = Recipe(**{**RECIPE.__dict__, "seed": 1})
    assert rows_of(generate(target, tokenizer, changed, 0)) != first


def test_a_batch_can_be_cut(model):
    tokenizer = make_tokenizer("chatml")
    target = target_of(model, tokenizer)
    whole = generate(target, tokenizer, RECIPE, 0, features=True)
    cut = generate(target, tokenizer, RECIPE, 0, features=True, progress=lambda done, _: done == 60)
    assert [row.tokens.tolist() for row in cut.conversations] == [
        row.tokens[:60].tolist() for row in whole.conversations
    ]
    assert mx.array_equal(cut.features, whole.features[:, :60])


@pytest.mark.parametrize("name", ["chatml", "inst", None])
def test_workers_change_nothing(model, name):
    tokenizer = make_tokenizer(name)
    target = target_of(model, tokenizer)
    one, two, many = (
        generate(target, tokenizer, RECIPE, 0, features=True, workers=Workers(n)) for n in (1, 2, 9)
    )
    assert rows_of(one) == rows_of(two) == rows_of(many)
    assert mx.allclose(one.features, two.features, atol=0.05)


@pytest.mark.parametrize("count", [1, 2])
def test_features_are_those_of_a_fresh_pass(model, count):
    tokenizer = make_tokenizer("gemma")
    target = target_of(model, tokenizer)
    generated = generate(target, tokenizer, RECIPE, 0, features=True, workers=Workers(count))
    _, hidden = target.forward(mx.array(rows_of(generated)), target.make_cache())
    assert generated.features.shape == (RECIPE.batch, RECIPE.length, 64)
    assert generated.features.dtype == mx.bfloat16
    error = mx.abs(generated.features.astype(mx.float32) - hidden)
    assert (error <= 0.01 * mx.abs(hidden) + 1e-3).all()
    assert generate(target, tokenizer, RECIPE, 0).features is None


@pytest.mark.parametrize("top_k", [0, 1, 40])
def test_temperature_0_takes_the_likeliest(model, top_k):
    tokenizer = make_tokenizer("chatml")
    target = target_of(model, tokenizer)
    recipe = Recipe(length=80, batch=4, temperature=0, top_k=top_k, top_p=1, longest_user_turn=8)
    generated = generate(target, tokenizer, recipe, 0)
    logits, _ = target.forward(mx.array(rows_of(generated)), target.make_cache())
    picks = np.array(mx.argmax(logits, axis=-1))
    checked = 0
    for row, pick in zip(generated.conversations, picks, strict=True):
        said = row.trained[1:] & row.trained[:-1]  # an end would not have been taken first
        assert (row.tokens[1:][said] == pick[:-1][said]).all()
        checked += int(said.sum())
    assert checked > 10


@pytest.mark.parametrize("forbid", [False, True])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.8), (3, 1.0), (5, 0.6)])
def test_the_distribution_is_the_recipes(top_k, top_p, forbid):
    logits = 2 * mx.random.normal((1, 50), key=mx.random.key(4))
    rows = mx.broadcast_to(logits, (20000, 50))
    recipe = Recipe(top_k=top_k, top_p=top_p)
    ends, forbidden = mx.array([int(mx.argmax(logits))]), mx.full((20000, 1), forbid)  # the best one
    scores, index = selfgen._candidates(rows, recipe, ends, forbidden)
    noise = mx.random.gumbel(scores.shape, key=mx.random.key(5))
    picks = np.array(selfgen._pick(scores, index, mx.full((20000, 1), 0.7), noise))
    wanted = expected(np.array(logits[0], np.float64), [int(ends[0])] * forbid, top_k, top_p)
    found = np.bincount(picks, minlength=50) / 20000
    assert np.abs(found - wanted).max() < 0.015
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(wanted))


def expected(logits, forbidden, top_k, top_p):
    """Probabilities [V] after forbidding, top-k, top-p at temperature 1, and temperature 0.7."""
    logits[forbidden] = -np.inf
    order = np.argsort(-logits)[: top_k or None]
    probabilities = np.exp(logits[order]) / np.exp(logits[order]).sum()
    order = order[np.cumsum(probabilities) - probabilities < top_p]
    result = np.zeros(len(logits))
    result[order] = np.exp(logits[order] / 0.7)
    return result / result.sum()


@pytest.mark.parametrize("vocabulary", [100, 6400, 8191])
def test_the_best_are_found(vocabulary):
    logits = mx.random.normal((3, vocabulary), key=mx.random.key(1))
    scores, index = selfgen._best(logits, 41)
    wanted = np.argsort(-np.array(logits), axis=-1)[:, :41]
    assert np.array(index).tolist() == wanted.tolist()
    assert mx.array_equal(scores, mx.take_along_axis(logits, index, axis=-1))


def test_prompts_are_answered(model):
    tokenizer = make_tokenizer("chatml")
    target = target_of(model, tokenizer)
    prompts = [TURNS, ["seven"], ["x"], ["quick"]]
    recipe = Recipe(**{**RECIPE.__dict__, "batch": 3, "length": 150})
    generated = generate(target, tokenizer, recipe, 0, prompts=prompts)
    for row, turns in zip(generated.conversations, prompts, strict=False):
        text = tokenizer.decode(row.tokens.tolist())
        asked = [part.split("<|im_end|>")[0] for part in text.split("<|im_start|>user\n")[1:]]
        assert asked[: len(turns)] == turns[: len(asked)]
        prompt = tokenizer.apply_chat_template(messages([("user", turns[0])]), add_generation_prompt=True)
        assert row.tokens[: len(prompt)].tolist() == prompt
        assert row.trained.argmax() == len(prompt)
    assert any(row.trained.sum() > 0 and len(answers(row, tokenizer)) > 2 for row in generated.conversations)
    rest = rows_of(generate(target, tokenizer, recipe, 1, prompts=prompts))
    assert ["quick" in tokenizer.decode(row)[:90] for row in rest] == [True, False, False]


@pytest.mark.parametrize(("length", "batch"), [(20, 2), (257, 1)])  # caches of mlx-lm have room for 256
def test_a_prompt_longer_than_the_row_leaves_nothing_to_train(model, length, batch):
    prompts, recipe = [["one " * 300]], Recipe(length=length, batch=batch)
    generated = generate(Target(model), make_tokenizer("chatml"), recipe, 0, prompts=prompts, features=True)
    assert [len(row) for row in rows_of(generated)] == [length] * batch
    assert not generated.conversations[0].trained.any()
    assert generated.features.shape == (batch, length, 64)


def test_openings_start_the_first_turn(model):
    tokenizer = make_tokenizer("inst")
    recipe = Recipe(length=60, batch=40, openings=("seven eight", "the lazy"), opened=0.5)
    texts = [tokenizer.decode(row) for row in rows_of(generate(Target(model), tokenizer, recipe, 0))]
    opened = [sum(text.startswith(f"<s>[INST] {opening}") for text in texts) for opening in recipe.openings]
    assert all(count > 3 for count in opened)
    assert 10 < sum(opened) < 30
    other = [tokenizer.decode(row) for row in rows_of(generate(Target(model), tokenizer, recipe, 1))]
    assert [text[:15] for text in other] != [text[:15] for text in texts]
    fixed = Recipe(**{**recipe.__dict__, "length": 20, "opened": 1.0, "user_temperature": 0})
    assert rows_of(generate(Target(model), tokenizer, fixed, 0)) != rows_of(
        generate(Target(model), tokenizer, fixed, 1)
    )


def test_base_models_write_texts(model):
    tokenizer = make_tokenizer(None)
    target = target_of(model, tokenizer)
    generated = generate(target, tokenizer, RECIPE, 0, prompts=[["one two three " * 9]])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    given, *others = generated.conversations
    start = tokenizer.encode("one two three " * 9)[: selfgen.SEED_TOKENS]
    assert given.tokens[: 1 + len(start)].tolist() == [bos, *start]
    ended = 0
    for row in others:
        forced = (
            np.flatnonzero(row.tokens == eos)[:-1] + 1
            if row.tokens[-1] == eos
            else np.flatnonzero(row.tokens == eos) + 1
        )
        assert (row.tokens[forced] == bos).all()  # a text that ended is followed by another
        assert not row.trained[[0, *forced]].any()
        assert row.trained.sum() == RECIPE.length - 1 - len(forced)
        ended += len(forced)
    assert ended


def test_a_model_that_cannot_verify_drafts_is_refused_before_any_work(model, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("its positions are no rotary ones.")

    monkeypatch.setattr(Target, "check", fail)
    options = {}, "model", run.Evaluation({}, [], [], 0), "train"
    with pytest.raises(ValueError, match="no rotary ones"):
        run.train(
            SpeculativeModel(model, None), make_tokenizer("chatml"), Request(), tmp_path / "out", *options
        )
    assert not list(tmp_path.iterdir())


# --- Recipes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"length": 1},
        {"batch": 0},
        {"temperature": -1},
        {"user_temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"seed": -1},
        {"opened": 2},
        {"systems": ("",)},
        {"openings": (" ",)},
        {"longest_user_turn": 0},
    ],
)
def test_recipes_out_of_range(change):
    with pytest.raises(ValueError, match="not usable|no share") as error:
        Recipe(**change)
    assert "\n" not in str(error.value)


def test_openings_are_read(tmp_path):
    shipped = selfgen.read_openings()
    assert len(shipped) > 140
    assert len(set(shipped)) == len(shipped)
    path = tmp_path / "a.txt"
    path.write_text(" one \n\ntwo\n")
    assert selfgen.read_openings(path) == ("one", "two")
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no openings"):
        selfgen.read_openings(path)
    with pytest.raises(ValueError, match="cannot be read"):
        selfgen.read_openings(tmp_path / "none.txt")
