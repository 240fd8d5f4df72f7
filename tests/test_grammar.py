"""Structured output: what a grammar allows is said exactly as plain decoding under the same masks says it."""

import copy
import gc
import json
import random
import re
import time
import weakref
from dataclasses import replace
from functools import partial

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from bundles import TOKENIZERS, make_folder
from decoding import before_the_last, everything
from mlx_lm.generate import generate_step
from mlx_lm.tokenizer_utils import TokenizerWrapper
from models import RandomDrafter, ScriptedDrafter, Unprepared, make_model
from scipy.stats import chisquare
from test_engine import SHAPES
from test_lossless import LONG, WrongDrafter, long_state
from test_sampling import expected as probabilities
from tiny import make_tiny

from mlx_redrafter import load, stream_generate
from mlx_redrafter.decoding.sampling import Sampling, filter_settings
from mlx_redrafter.decoding.state import DraftShape, take
from mlx_redrafter.decoding.step import step
from mlx_redrafter.engine import grammar as module
from mlx_redrafter.engine.engine import Engine, Request
from mlx_redrafter.engine.grammar import Follower, Grammar, masked
from mlx_redrafter.engine.host import host_pick, host_step
from mlx_redrafter.engine.loop import Batch, Fixed, Text, bucket
from mlx_redrafter.engine.runner import Runner
from mlx_redrafter.loading.tokenizer import load_tokenizer
from mlx_redrafter.models.target import Target

SIZE = 350  # of the models' vocabulary, more than the tokenizer's
PROMPT = [5, 9, 33, 2, 17, 60, 3]
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["fox", "dog", "other"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 1, "maxItems": 2},
        "good": {"type": "boolean"},
    },
    "required": ["kind", "age", "tags", "good"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},  # or a random model says nothing else
}
GRAMMARS = {
    "schema": lambda tokenizer: Grammar.json(tokenizer, SCHEMA),
    "object": lambda tokenizer: Grammar.json(tokenizer),
    "regex": lambda tokenizer: Grammar.regex(tokenizer, r"(the|one|two) [a-f]{2,9}(\.|!|🙂)"),
    "lark": lambda tokenizer: Grammar.lark(
        tokenizer, 'start: sum\nsum: NUMBER ("+" sum)~0..3 | "(" sum ")"\nNUMBER: /[0-9]{1,3}/'
    ),
    "choice": lambda tokenizer: Grammar.choice(tokenizer, ['a "quick" fox', "a", "naïve\nfox", "/.*/"]),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZERS["byte-level"](folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return {name: make(tokenizer) for name, make in GRAMMARS.items()}


@pytest.fixture(scope="module")
def model():
    return make_model("llama3-rope", vocab_size=SIZE)


def allowed(grammar, said):
    """The tokens that may come after what was said, by a matcher that has seen nothing else."""
    matcher = grammar.matcher.deep_copy()
    assert matcher.consume_tokens(said), said
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def constrained(model, grammar, ends, count, prompt=PROMPT, **options):
    """What mlx-lm says with a logits processor of the test's own."""
    starts = []

    def process(tokens, logits):
        starts.append(tokens.size)
        said = tokens[starts[0] :].tolist()
        mask = np.full(logits.shape, -np.inf, np.float32)
        mask[..., list(ends if ends & set(said) else allowed(grammar, said))] = 0
        return logits + mx.array(mask)

    found = []
    for token, _ in generate_step(
        mx.array(prompt), model, max_tokens=count, logits_processors=[process], **options
    ):
        found.append(int(token))
        if token in ends:
            break
    return found


def say(engine, *requests):
    """What the requests get, submitted at once, and how many tokens of it were drafted."""
    numbers = [engine.submit(request) for request in requests]
    said, drafted = {number: [] for number in numbers}, 0
    while engine.is_busy:
        for each in engine.step():
            assert each.error is None, each.error
            said[each.number] += each.tokens
            drafted += each.drafted
    return [said[number] for number in numbers], drafted


def check(name, text):
    """A finished output is what was asked for."""
    if name in ("schema", "object"):
        jsonschema.validate(json.loads(text), SCHEMA if name == "schema" else {"type": "object"})
    elif name == "regex":
        assert re.fullmatch(r"(the|one|two) [a-f]{2,9}(\.|!|🙂)", text)
    elif name == "choice":
        assert text in ('a "quick" fox', "a", "naïve\nfox", "/.*/")
    else:
        assert re.fullmatch(r"[(]*\d{1,3}([+(]*\d{1,3}\)*)*\)*", text)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", GRAMMARS)
def test_greedy_is_constrained_plain_decoding(model, tokenizer, grammars, name, eager):
    ends, target = tokenizer.eos_token_ids, Target(model)
    wanted = constrained(model, grammars[name], ends, 60)
    if name != "object":  # which goes on and on
        check(name, tokenizer.decode(wanted[:-1]))
    oracle = ScriptedDrafter(target, PROMPT + wanted)
    for drafter in (oracle, RandomDrafter(target), WrongDrafter(target, PROMPT + wanted)):
        for shape in SHAPES:
            engine = Engine(Runner(target, drafter), Fixed(shape), eager=eager)
            request = Request(PROMPT, 60, grammar=grammars[name], stop=frozenset(ends))
            (said,), drafted = say(engine, request)
            assert said == wanted
            if drafter is oracle and shape.width and len(wanted) > 3:
                assert drafted > len(wanted) // 2


@pytest.fixture
def uncompiled():
    """mlx-lm's compiled parts as they are: for each of them a CPU calls a C++ compiler."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize("name, trees", [("qwen3_next", True), ("rwkv7", False)])
def test_a_recurrent_model_follows_a_grammar(uncompiled, tokenizer, grammars, name, trees):
    model = make_tiny(name)
    target = Target(model)
    target.check()
    assert target.trees == trees
    wanted = constrained(model, grammars["schema"], tokenizer.eos_token_ids, 40)
    engine = Engine(Runner(target, ScriptedDrafter(target, PROMPT + wanted)), Fixed(SHAPES[2]))
    request = Request(PROMPT, 40, grammar=grammars["schema"], stop=frozenset(tokenizer.eos_token_ids))
    (said,), drafted = say(engine, request)
    assert said == wanted and drafted


def add_one(tokens, logits):
    """A user's logits processor that looks at the tokens."""
    return mx.where(mx.arange(logits.shape[-1]) == tokens[-1], logits + 1, logits)


WAYS = [
    Sampling(1.0),
    Sampling(0.8, top_p=0.9, top_k=20),
    Sampling(1.0, min_p=0.05, min_tokens_to_keep=2, repetition_penalty=1.3),
    Sampling(1.0, xtc_probability=0.5, xtc_threshold=0.05, presence_penalty=0.5, frequency_penalty=0.3),
    Sampling(logit_bias=((5, 3.0), (9, -np.inf))),
    Sampling(1.2, top_k=100),
]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_seed_gives_the_same_text_alone_and_in_mixed_company(model, tokenizer, grammars, compiled):
    target, ends = Target(model), frozenset(tokenizer.eos_token_ids)
    run = Runner(target, RandomDrafter(target), compiled=compiled)
    rng, asks = random.Random(1), []
    for i in range(18):  # with a grammar, without one, and with a user's function, or both
        prompt = [rng.randrange(2, 300) for _ in range(rng.choice((1, 9, 30)))]
        chosen = [*grammars.values()][i % 5] if i % 3 else None
        functions = [add_one] if i % 4 > 1 else []
        asks.append(Request(prompt, 25, WAYS[i % 6], i, ends, functions, grammar=chosen))
    alone = [say(Engine(run, Fixed(SHAPES[i % 4])), ask)[0][0] for i, ask in enumerate(asks)]
    engine = Engine(run, Fixed(SHAPES[2]), 16, texts=7, padded=lambda n: 1 << (n - 1).bit_length())
    assert say(engine, *asks)[0] == alone
    names, finished = [*GRAMMARS], 0
    for i, said in enumerate(alone):
        if i % 3 and said[-1] in ends:
            check(names[i % 5], tokenizer.decode(said[:-1]))
            finished += 1
    assert finished > 5
    for i, ask in enumerate(asks):  # the neighbours are as they were before there were grammars
        if not i % 3:
            assert say(Engine(run, Fixed(SHAPES[0])), replace(ask))[0][0] == alone[i]


def test_a_mask_leaves_the_random_numbers_alone(model, tokenizer):
    """A grammar that allows the same tokens at every place, beside a bias that does so."""
    target, grammar = Target(model), Grammar.regex(tokenizer, "[a-z ]*")
    bans = {*range(SIZE)} - allowed(grammar, []) | tokenizer.eos_token_ids
    sampling = Sampling(1.0, logit_bias=tuple((token, -np.inf) for token in bans))
    bound = replace(Request(PROMPT, 40, sampling, 4), grammar=grammar)
    engine = Engine(Runner(target, RandomDrafter(target)), Fixed(SHAPES[1]))
    (free, said), _ = say(engine, Request(PROMPT, 40, sampling, 4), bound)
    assert free == said and len(set(free)) > 5


def test_the_masks_of_a_tree_are_those_of_each_path(grammars, tokenizer):
    rng, ends = random.Random(0), tokenizer.eos_token_ids
    for grammar in grammars.values():
        follower, said = grammar.follower(), []
        for _ in range(12):
            tokens, parents, paths = [7], [0], [[]]
            while len(tokens) < 12:
                parent = rng.randrange(len(tokens))
                choices = (
                    sorted(allowed(grammar, [*said, *paths[parent]])) if paths[parent] is not None else []
                )
                token = rng.choice(choices) if choices and rng.random() < 0.8 else rng.randrange(-1, SIZE)
                path = [*paths[parent], token] if token in choices and token not in ends else None
                tokens.append(token), parents.append(parent), paths.append(path)
            follower.follow(said)
            masks = follower.masks(tokens, parents)
            for mask, path in zip(masks, paths, strict=True):
                if path is not None:
                    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
                    assert set(np.flatnonzero(bits).tolist()) == allowed(grammar, [*said, *path])
            more = max((path for path in paths if path is not None), key=len)
            said = [*said, *more]
            if allowed(grammar, said) <= ends:
                break


class Letters(Unprepared):
    """Drafts any of some tokens."""

    def __init__(self, target, tokens):
        self.start = mx.zeros(target.embed(mx.array([0])).shape[-1])
        likely = [(i in tokens) * (2 + (i * 7) % 5) for i in range(target.vocabulary)]
        self.likely = mx.array(likely, mx.float32)

    def advance(self, embedding, state):
        return state

    def logits(self, context, state):
        return mx.broadcast_to(self.likely, (*state.shape[:-1], self.likely.size))

    def to_target(self, index):
        return index


@pytest.mark.parametrize("options", [{"temperature": 1.3}, {"temperature": 0.8, "top_p": 0.9, "min_p": 0.05}])
@pytest.mark.parametrize("values", [(1, 2), (3, 2, 6), (0, 0)])
def test_tokens_have_the_masked_targets_distribution(tokenizer, values, options):
    """Of all texts of three letters that fit, by enumeration."""
    rows, target = 2000, Target(make_model("llama", seed=3, vocab_size=SIZE))
    grammar = Grammar.regex(tokenizer, "a[bd][cd]|b[acd]a|c[abcd][ab]|d(ab|c[xyz])")
    known = {}

    def enumerate_from(said, chance):
        if len(said) == 3:
            known[tuple(said)] = chance
            return
        logits = np.array(target.model(mx.array([PROMPT + said])))[0, -1].astype(np.float64)
        logits[[t for t in range(SIZE) if t not in allowed(grammar, said)]] = -np.inf
        for token, p in enumerate(probabilities(logits, **options)):
            if p > 0:
                enumerate_from([*said, token], chance * p)

    enumerate_from([], 1.0)
    assert len(known) > 8 and abs(sum(known.values()) - 1) < 1e-9
    texts = [Text(i, grammar=grammar.follower()) for i in range(rows)]
    drafter = Letters(target, {token for said in known for token in said})
    state = take(before_the_last(target, PROMPT), [0] * rows, 32)
    seeds = mx.random.randint(0, 1 << 32, (rows, 2), mx.uint32, key=mx.random.key(5))
    state = replace(state, seeds=seeds, sampling=filter_settings([Sampling(**options)] * rows, SIZE))
    drafted = 0
    while min(len(text.said) for text in texts) < 3:
        state, output = step(target, drafter, host_pick(texts), DraftShape(*values), state, everything(state))
        for text, tokens, count in zip(texts, output.tokens.tolist(), output.count.tolist(), strict=True):
            text.said += tokens[:count]
            drafted += count - 1
    counts = dict.fromkeys(known, 0)
    for text in texts:
        counts[tuple(text.said[:3])] += 1  # a KeyError: what cannot be
    likely = [said for said in known if known[said] * rows >= 5]
    found, wanted = [counts[said] for said in likely], np.array([known[said] for said in likely])
    assert chisquare(found, wanted * sum(found) / wanted.sum()).pvalue > 1e-3
    assert drafted > rows / 10 or values == (0, 0)


def test_from_the_front_with_and_without_drafts(tmp_path):
    folder = make_folder(tmp_path / "m", kind="random", vocab_size=SIZE)
    model, tokenizer = load(folder)
    model.use_policy(Fixed(DraftShape(0, 0, None, 3)))
    for name, make in GRAMMARS.items():
        grammar, texts = make(tokenizer), set()
        for draft in (False, True):
            for sampling in (Sampling(), Sampling(1.0)):
                out = [
                    *stream_generate(
                        model,
                        tokenizer,
                        "the fox",
                        50,
                        grammar=grammar,
                        seed=3,
                        sampling=sampling,
                        draft=draft,
                    )
                ]
                text = "".join(each.text for each in out)
                texts.add((sampling.temperature, text))
                if out[-1].finish_reason == "stop":
                    check(name, text)
        assert len({temperature for temperature, _ in texts}) == len(texts) == 2


@pytest.mark.parametrize("schema", [None, {"type": "array", "items": {"type": "object"}, "minItems": 1}])
def test_whitespace_between_parts_of_json_comes_to_an_end(tokenizer, schema):
    grammar = Grammar.json(tokenizer, schema)
    blank = {t for t in range(SIZE) if (text := tokenizer.decode([t])) and not text.strip()}
    follower, said, run = grammar.follower(), [], 0
    letters = list('{"a":[1,{"b":null}]}' if schema is None else '[{"a":{"b":[1,true]}}]')
    while letters:
        follower.follow(said)
        bits = np.unpackbits(follower.masks([0], [0])[0].view(np.uint8), bitorder="little")
        can = blank & set(np.flatnonzero(bits).tolist())
        if can and tokenizer.decode(said).count('"') % 2 == 0:  # not in a string
            said.append(min(can))
            run += 1
        else:
            said += tokenizer.encode(letters.pop(0), add_special_tokens=False)
            run = 0
        assert run <= 41
    assert json.loads(tokenizer.decode(said)) and len(said) > 41
    indented = json.dumps({"a": {"b": [{"c": [1, 2]}] * 2}}, indent=4)
    schema = {"type": "object"}
    assert follows(Grammar.json(tokenizer, schema), tokenizer, indented)
    far = '{"a":' + " " * 60 + "1}"
    assert not follows(Grammar.json(tokenizer, schema), tokenizer, far)
    assert follows(Grammar.json(tokenizer, schema | {"x-guidance": {}}), tokenizer, far)
    assert not follows(
        Grammar.json(tokenizer, schema | {"x-guidance": {"whitespace_flexible": False}}),
        tokenizer,
        '{ "a":1}',
    )


def follows(grammar, tokenizer, text):
    """Whether a text fits, to its end."""
    matcher, ids = grammar.matcher.deep_copy(), tokenizer.encode(text, add_special_tokens=False)
    return all(map(matcher.consume_token, ids)) and matcher.is_accepting()


def test_only_ends_of_text_come_after_it_all_of_them_and_never_before(model, tokenizer):
    several = TokenizerWrapper(tokenizer._tokenizer, eos_token_ids=[1, 20, 330])  # 20 is a usual character
    mark = several.decode([20])
    grammar = Grammar.regex(several, f"a{re.escape(mark)}?b{{2}}")
    letter = {t: several.encode(t, add_special_tokens=False)[0] for t in "ab"}
    follower, said = grammar.follower(), []
    for text in "abb":
        follower.follow(said)
        bits = np.unpackbits(follower.masks([0], [0])[0].view(np.uint8), bitorder="little")
        assert not bits[[1, 20, 330]].any() and bits[letter[text]]
        said.append(letter[text])
    for more in ([], [20], [330, 5]):
        follower.follow(said + more[:1])
        bits = np.unpackbits(follower.masks([0, 1, 2], [0, 0, 1]).view(np.uint8), bitorder="little")
        assert set(np.flatnonzero(bits.reshape(3, -1).all(axis=0))) == {1, 20, 330} and bits.sum() == 9


def test_a_vocabulary_of_whole_words_and_tokens_that_are_not_in_it(tokenizer):
    """Bits of masks come in words of 32, and the library may give one more."""
    fast = copy.deepcopy(tokenizer._tokenizer)
    fast.add_tokens([f"<extra{i}>" for i in range(320 - len(fast))])
    padded = TokenizerWrapper(fast, eos_token_ids=[1])
    for each, size in ((tokenizer, 300), (padded, 320)):
        masks = Grammar.regex(each, "(?s:.*)").follower().masks([0], [0])
        logits = np.array(masked(mx.zeros((1, 1, 400)), mx.array(masks)[None]))[0, 0]
        assert np.isneginf(logits[size:]).all() and logits[each.eos_token_id] == 0 and len(fast) == 320


def test_what_cannot_go_on_ends_with_an_error(model, tokenizer):
    """After ``a`` nothing can come; whoever says ``b`` is left alone, drafted dead ends included."""
    target, ends = Target(model), frozenset(tokenizer.eos_token_ids)
    grammar = Grammar.lark(tokenizer, 'start: "a" never | "b"\nnever: never "x"')
    a, b = (tokenizer.encode(text, add_special_tokens=False)[0] for text in "ab")
    for shape in SHAPES:
        drafter = Letters(target, {a, b})
        for bias, error in (((a, 1e3),), True), (((b, 1e3),), False):
            engine = Engine(Runner(target, drafter), Fixed(shape))
            engine.submit(Request(PROMPT, 9, Sampling(logit_bias=bias), stop=ends, grammar=grammar))
            emitted = []
            while engine.is_busy:
                emitted += engine.step()
            assert emitted[-1].finish == ("error" if error else "stop")
            assert ("cannot be followed" in str(emitted[-1].error)) == error


def nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


ITSELF = {"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"}
ANY = [[{"properties": {f"a{i}": {"const": j}}} for j in range(5)] for i in range(12)]
PRODUCT = {"allOf": [{"anyOf": each} for each in ANY]}
EXPANDING = "start: a0\n" + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(60)) + 'a60: "x"'
LOOP = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
SPLIT = {"allOf": [{"type": "integer", "multipleOf": n} for n in (97, 89, 83)]}
DOUBLING = "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(60)) + 'A60: "x"'
REFUSED = {
    "type": ("json", {"type": "strung"}, "strung"),
    "keyword": ("json", {"not": {"type": "string"}}, "not"),
    "nothing": ("json", False, "false"),
    "impossible": ("json", {"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    "loop": ("json", LOOP, "not usable"),
    "self": ("json", {"$ref": "#"}, "not usable"),
    "elsewhere": ("json", {"$ref": "http://example.com/x.json"}, "example.com"),
    "deep": ("json", nested(300), "recursion"),
    "deeper": ("json", nested(100_000), "recursion"),
    "wide": ("json", {"enum": ["x" * 30 + str(i) for i in range(10_000)]}, "characters"),
    "no object": ("json", [1], "no object"),
    "nan": ("json", {"const": float("nan")}, "no JSON"),
    "multiples": ("json", SPLIT, "multipleOf 83, 89, 97|multipleOf 97, 89, 83"),
    "multiple": ("json", {"type": "integer", "multipleOf": 99_999_989}, "multipleOf 99999989"),
    "fine multiple": ("json", {"type": "number", "multipleOf": 1e-300}, "multipleOf"),
    "pattern": ("json", {"type": "string", "pattern": "a{100000}"}, "100000 times"),
    "product": ("json", PRODUCT, "too large"),
    "unclosed": ("regex", "(a", "unclosed group"),
    "look-ahead": ("regex", "(?=a)b", "look-around"),
    "back": ("regex", r"(a)\1", "backreferences"),
    "parentheses": ("regex", "(" * 100_000 + "a" + ")" * 100_000, "not usable"),
    "repeats": ("regex", "a{1000000000}", "1000000000 times"),
    "range": ("regex", "[a-z]{0, 4000000000}", "4000000000 times"),
    "repeated repeats": ("regex", "a{9999}{9999}", "more than 100,000 characters"),
    "nested repeats": ("regex", r"x(b|a{99}[^{](?:\p{L}\{){99}){999}", "more than 100,000 characters"),
    "neighbours": ("regex", "a{9999}" * 300, "more than 100,000 characters"),
    "nests of repeats": ("regex", "(" * 5000 + "a" + "){99}" * 5000, "more than 100,000 characters"),
    "pattern's repeats": ("json", {"pattern": "a{1,999}{999}", "type": "string"}, "more than 100,000"),
    "terminals": ("lark", "start: A{9999}\nA: /a{9999}/", "more than 100,000 characters"),
    "tildes": ("lark", 'start: A~1..9999\nA: B ~ 99 // twice\nB.2: "aa"', "more than 100,000 characters"),
    "tilde": ("lark", 'start: "a"~99999', "99999 times"),
    "no text": ("regex", 3, "give a text"),
    "long": ("regex", "a" * 300_000, "300000 characters"),
    "unknown": ("lark", "start: foo", "foo"),
    "empty": ("lark", "", "Empty"),
    "itself": ("lark", "start: start", "not usable"),
    "nested": ("lark", "start: " + "(" * 100_000 + '"a"' + ")" * 100_000, "nested"),
    "doubling": ("lark", DOUBLING, "too big"),
    "hidden": ("lark", r'start: %json {"type": "integer", "multipl\u0065Of": 99999989}', "multipleOf"),
    "none": ("choice", [], "list of texts"),
    "text": ("choice", "yes", "list of texts"),
    "blank": ("choice", ["yes", ""], "list of texts"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_in_a_line_and_soon(tokenizer, name):
    kind, given, reason = REFUSED[name]
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=reason) as found:
        getattr(Grammar, kind)(tokenizer, given)
    assert "\n" not in str(found.value) and len(str(found.value)) < 400
    assert time.perf_counter() - begun < 10


def test_repeats_that_multiply_are_known_before_anything_is_compiled(monkeypatch, tokenizer):
    monkeypatch.setattr(module, "_library", None)
    for name in REFUSED:
        kind, given, reason = REFUSED[name]
        if "100,000" in reason:
            with pytest.raises(ValueError, match=reason):
                getattr(Grammar, kind)(tokenizer, given)
    begun = time.perf_counter()
    for text in (
        "[" * (1 << 18),
        r"\p{" * 80_000,
        "{1" * (1 << 17),
        "(" * (1 << 18),
        '"' + r"\"" * (1 << 17),
    ):
        assert module._size(text) >= 0 and module._lark_size(f"start: {text}") >= 0
        assert module._lark_size(f"start: /{text}") >= 0 and module._lark_size(text + "\n" * 1000) == 0
    assert module._lark_size("".join(f"A{i}: A{i + 1}\n" for i in range(20_000))) >= 0
    assert time.perf_counter() - begun < 10
    for pattern, size in (("(ab{4}){4}", 20), (r"\{2}[{9}]{3}(?:\x{41}|b){2,}", 3 + 3 + 2 * 5), ("", 0)):
        assert module._size(pattern) == size


ENDURED = {
    "quantifiers": ("regex", "(((a*)*)*)*b"),
    "products": ("regex", "((a{1,999}){1,999}){1,999}"),
    "states": ("regex", "([ab]*a[ab]{200}|[bc]*c[abc]{300}|.*z.{500}){10}"),
    "backtracking": ("regex", "(x+x+)+y"),
    "most repeats": ("regex", "a{9999}"),
    "many repeats": ("regex", "(a{9}[(]{9}){99}(b{9999}c){9}"),
    "rules": ("lark", 'start: a{9999}\na: b{9999}\nb: "x"'),
    "letters": ("regex", r"[\w\s]{1,9999}[\d\p{L}]{9999}"),
    "items": ("json", {"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000}),
    "length": ("json", {"type": "string", "minLength": 100_000, "maxLength": 1_000_000_000}),
    "recursion": ("json", ITSELF),
    "ambiguous": ("lark", 'start: s\ns: s s s | /[ab]/ | '),
    "expanding": ("lark", EXPANDING),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDURED)
def test_what_explodes_is_followed_step_by_step_or_given_up(tokenizer, name):
    kind, given = ENDURED[name]
    begun = time.perf_counter()
    try:
        follower, said = getattr(Grammar, kind)(tokenizer, given).follower(), []
        for _ in range(40):
            follower.follow(said)
            bits = np.unpackbits(follower.masks([0], [0])[0].view(np.uint8), bitorder="little")
            said.append(int(np.flatnonzero(bits)[-1 if len(said) % 2 else 0]))
    except ValueError as error:
        assert "\n" not in str(error)
    assert time.perf_counter() - begun < 20


def test_a_tokenizer_is_looked_at_once_and_let_go(tmp_path):
    TOKENIZERS["sentencepiece"](tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    first = Grammar.regex(tokenizer, "a+")
    kept = module._tokenizers[tokenizer._tokenizer]
    Grammar.json(tokenizer)
    assert module._tokenizers[tokenizer._tokenizer] is kept
    gone = weakref.ref(tokenizer._tokenizer)
    del tokenizer, kept
    gc.collect()
    assert gone() is None and Follower(first).masks([0], [0]).any()


def test_tokenizers_that_do_not_fit_and_a_missing_library_are_named(tokenizer, monkeypatch):
    class Slow:
        pass

    slow = TokenizerWrapper(tokenizer._tokenizer, eos_token_ids=[1])
    slow._tokenizer = Slow()
    with pytest.raises(ValueError, match="Slow.*fast"):
        Grammar.regex(slow, "a")
    endless = TokenizerWrapper(tokenizer._tokenizer, eos_token_ids=[1])
    endless._eos_token_ids = set()
    with pytest.raises(ValueError, match="no end of text"):
        Grammar.regex(endless, "a")
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"mlx-redrafter\[server\]"):
        Grammar.regex(tokenizer, "a")


def test_models_that_are_not_drafted_for_follow_grammars(model, tokenizer, grammars):
    said = [r.token for r in stream_generate(model, tokenizer, PROMPT, 60, grammar=grammars["schema"])]
    assert said == constrained(model, grammars["schema"], tokenizer.eos_token_ids, 60)


def test_a_step_that_asks_the_host_copies_no_cache(tokenizer):
    """Peak memory over the model and one cache of 4,000 tokens; the buffers grow on the way."""
    size = {"num_hidden_layers": 8, "head_dim": 64, "max_position_embeddings": 8192, "vocab_size": SIZE}
    target = Target(make_model("llama", **size))
    step_of, letters = Runner(target, RandomDrafter(target)), Grammar.regex(tokenizer, "[a-z ]*")

    def decode_on(eager):
        batch = Batch(
            lambda texts: partial(host_step, step_of, texts), Fixed(SHAPES[2]), SIZE, 1, eager=eager
        )
        text = Text(1, left=60, rows=LONG, is_new=False, grammar=letters.follower())
        batch.join(text, long_state())
        while batch.everyone:
            batch.step()

    for eager in (False, True):
        decode_on(eager)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        decode_on(eager)
        rows = 2 * 8 * 2 * 64 * 4 * bucket(LONG + 60)  # bytes of the buffers when they have grown
        assert rows < mx.get_peak_memory() - before < 1.1 * rows
