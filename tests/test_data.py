"""Training data: every format, what is trained of a conversation, and cleaning."""

import json
from pathlib import Path

import bundles
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mlx_redrafter.train import data
from mlx_redrafter.train.data import Cleaner, Conversation, Dropped

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }} </s>"
    "{% else %}{{ raise_exception('no system prompts') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "<s>{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system prompts') }}"
    "{% endif %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    "<s>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}### Human: {{ m['content'] }}\n"
    "{% else %}### Assistant: {{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:{% endif %}"
)
FORGETFUL = (  # leaves out the thoughts of earlier turns, as Qwen3's does
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1] | trim }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
IM = ("<|im_start|>", "<|im_end|>")
TEMPLATES = {  # name -> template, its special tokens, the one that ends an answer
    "chatml": (CHATML, IM, "<|im_end|>"),
    "inst": (INST, (), "</s>"),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "llama3": (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "zephyr": (ZEPHYR, (), "</s>"),
    "plain": (PLAIN, (), ""),
    "forgetful": (FORGETFUL, IM, "<|im_end|>"),
}
TALK = [("user", "user, say one"), ("assistant", "one two"), ("user", "you"), ("assistant", "naïve 🙂 café")]


def make_tokenizer(name: str | None) -> TokenizerWrapper:
    """A tiny byte-level tokenizer with one of the templates, or with none."""
    rust = Tokenizer.from_str(bundles._trained_byte_level())
    fast = PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>")
    ends = {fast.eos_token_id}
    if name is not None:
        fast.chat_template, special, end = TEMPLATES[name]
        fast.add_special_tokens({"additional_special_tokens": list(special)})
        ends |= {fast.convert_tokens_to_ids(end)} if end else set()
    return TokenizerWrapper(fast, eos_token_ids=ends)


def messages(talk: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in talk]


def conversation(spoken: list[int], before: int = 3) -> Conversation:
    trained = np.array([False] * before + [True] * len(spoken))
    return Conversation(np.array([0] * before + spoken, np.int32), trained)


def spoken(conversation: Conversation, tokenizer: TokenizerWrapper) -> str:
    return tokenizer.decode(conversation.tokens[conversation.trained].tolist())


def write(path: Path, *items: object) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in items), "utf-8")
    return path


# --- What is trained -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_only_answers_and_their_ends_are_trained(name):
    tokenizer = make_tokenizer(name)
    found = data.tokenize(messages(TALK), tokenizer, 500)
    assert found.tokens.tolist() == tokenizer.apply_chat_template(messages(TALK))
    end = TEMPLATES[name][2]
    space = " " if name == "inst" else ""
    lead = " " if name in ("inst", "plain") else ""
    expected = "".join(f"{lead}{text}{space}{end}" for role, text in TALK if role == "assistant")
    assert spoken(found, tokenizer) == expected
    assert found.tokens.dtype == np.int32
    assert found.trained.dtype == bool


def test_a_word_of_the_template_is_no_answer():
    tokenizer = make_tokenizer("chatml")
    found = data.tokenize(
        messages([("user", "m"), ("assistant", "s"), ("user", "s"), ("assistant", "user")]), tokenizer, 99
    )
    assert spoken(found, tokenizer) == "s<|im_end|>user<|im_end|>"
    assert found.tokens[found.trained.nonzero()[0][0] - 1] == tokenizer.encode("\n")[0]


def test_an_empty_thought_that_the_template_puts_before_answers():
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = CHATML.replace(
        "{{ m['content'] }}",
        "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
    )
    found = data.tokenize(
        messages([("user", "a"), ("assistant", "t"), ("user", "b"), ("assistant", "h")]), tokenizer, 99
    )
    assert spoken(found, tokenizer) == "t<|im_end|>h<|im_end|>"


def test_thoughts_that_the_template_leaves_out():
    tokenizer = make_tokenizer("forgetful")
    talk = [
        ("user", "a"),
        ("assistant", "<think>one</think>two"),
        ("user", "b"),
        ("assistant", "<think>x</think>y"),
    ]
    found = data.tokenize(messages(talk), tokenizer, 500)
    assert spoken(found, tokenizer) == "two<|im_end|>x</think>y<|im_end|>"


def test_a_system_prompt_goes_into_the_first_turn_if_it_must():
    tokenizer = make_tokenizer("gemma")
    found = data.tokenize(messages([("system", "be brief"), *TALK]), tokenizer, 500)
    assert "be brief\n\nuser, say one" in tokenizer.decode(found.tokens.tolist())


def test_what_the_template_refuses_or_rewrites_is_unusable(tmp_path):
    tokenizer = make_tokenizer("inst")
    talk = {"messages": messages(TALK)}
    bad = {"messages": messages([("tool", "x"), ("assistant", "y")])}
    empty = {"messages": messages([("user", "x"), ("assistant", " ")])}
    told = "left out 2 unusable rows; the first, line 2: the chat template refuses messages of tool"
    with pytest.warns(UserWarning, match=told):
        given = data.read_given(write(tmp_path / "a.jsonl", talk, bad, empty), tokenizer, 500)
    assert (len(given.conversations), given.unusable) == (1, 2)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="rewrites the answers"):
        data.tokenize(messages(TALK), tokenizer, 500)
    tokenizer.chat_template = CHATML.replace(
        "{{ m['role'] }}", "{{ 'bot' if m['role'] != 'user' else 'user' }}"
    )
    with pytest.raises(ValueError, match="rewrites the answers"):
        data.tokenize(messages([("user", "x"), ("assistant", "ot")]), tokenizer, 500)


def test_conversations_are_cut(tmp_path):
    tokenizer = make_tokenizer("chatml")
    whole = data.tokenize(messages(TALK), tokenizer, 500)
    assert data.tokenize(messages(TALK), tokenizer, 60).tokens.tolist() == whole.tokens[:60].tolist()
    path = write(tmp_path / "a.jsonl", {"messages": messages(TALK)}, {"prompt": "x"})
    tokenizer.chat_template = CHATML.replace("You help.", "")
    with pytest.warns(UserWarning, match="line 1: nothing to train on: no answer has text within 20 tokens"):
        given = data.read_given(path, tokenizer, 20)
    assert (given.conversations, given.prompts, given.unusable) == ([], [["x"]], 1)


# --- Formats -------------------------------------------------------------------------------------------

SHAREGPT = {
    "conversations": [{"from": "human", "value": "user, say one"}, {"from": "gpt", "value": "one two"}]
}
PARTS = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "user, say one"}]},
        {"role": "assistant", "content": "one two"},
    ]
}
UNANSWERED = {"messages": messages([*TALK[:2], ("user", "and?")])}
COMPLETION = {"prompt": "user, say one", "completion": "one two"}


@pytest.mark.parametrize("item", [SHAREGPT, PARTS, UNANSWERED, COMPLETION, {"messages": messages(TALK[:2])}])
def test_formats_of_conversations(tmp_path, item):
    tokenizer = make_tokenizer("chatml")
    expected = data.tokenize(messages(TALK[:2]), tokenizer, 500)
    (tmp_path / "a.json").write_text(json.dumps([item]))
    for path in (write(tmp_path / "a.jsonl", item, ""), tmp_path / "a.json"):
        (found,) = data.read_given(path, tokenizer, 500).conversations
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.trained.tolist() == expected.trained.tolist()


U, A = messages(TALK[:2])
TOOL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
IMAGE = {
    "role": "user",
    "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": "x"}],
}
SAME = [  # rows that say what TALK[:2] says
    {"prompt": TALK[0][1], "response": TALK[1][1]},
    {"instruction": TALK[0][1], "input": "", "output": TALK[1][1]},
    {"Question": TALK[0][1], "Answer": TALK[1][1], "id": 3},
    {"prompt": [U], "completion": [A]},
    {"prompt": [U], "chosen": [A], "rejected": [U]},
    {"prompt": TALK[0][1], "chosen": [U, A], "rejected": [U]},
    {"chosen": [U, A], "rejected": [U]},
    {
        "conversations": [{"from": "human", "value": TALK[0][1]}],
        "chosen": {"from": "gpt", "value": TALK[1][1]},
    },
    {"conversation": [U, A]},
    {"turns": [U, A]},
    [U, A],
    {"Messages": [{"Role": "User", "Content": TALK[0][1]}, {"Role": "Assistant", "Content": TALK[1][1]}]},
    {"messages": [A, U, A]},  # begins with the assistant
    {"messages": [{"role": "system", "content": ""}, U, A]},
    {"messages": [U, A], "prompt": None, "text": None},
    *(
        {"conversations": [{"from": "human", "value": TALK[0][1]}, {"from": role, "value": TALK[1][1]}]}
        for role in ("chatgpt", "bing", "bard", "gpt", "model", "function_call")
    ),
    *(
        {"messages": [{"role": role, "content": TALK[0][1]}, {"role": "ASSISTANT", "content": TALK[1][1]}]}
        for role in ("human", "prompter", "User")
    ),
]
UNUSABLE = [  # a row of which nothing can be trained on, and what is told
    ({}, "it has only the keys"),
    ({"conversations": []}, r"messages is \[\]"),
    ({"messages": [{"role": "system", "content": "s"}]}, "no message has the role user"),
    ({"messages": [A]}, "no message has the role user"),
    ({"messages": [U, TOOL, {"role": "tool", "content": "3"}, A]}, "a message calls tools"),
    ({"messages": [U, {"role": "assistant", "content": None}]}, "a message's content is None"),
    ({"messages": [IMAGE, A]}, "a message's content is"),
    ({"messages": [U, {**A, "weight": 0}]}, "nothing to train on"),
    ({"messages": [U, {**A, "weight": 0.5}]}, "weight 0.5 is not usable"),
    ({"messages": [U, {**A, "content": " "}]}, "nothing to train on"),
    ({"instruction": "i", "output": "o", "history": [["a", "b"]]}, "history is not read"),
    ({"output": "o"}, "an answer without a question"),
    ({"prompt": "x", "completion": 3}, "messages is 3"),
    ({"prompt": "user " * 900}, "no token is left of 500"),
    ("header", "'header' is no object"),
]


@pytest.mark.parametrize("row", SAME, ids=str)
def test_other_keys_and_roles_say_the_same(tmp_path, row):
    tokenizer = make_tokenizer("chatml")
    expected = data.tokenize(messages(TALK[:2]), tokenizer, 500)
    (found,) = data.read_given(write(tmp_path / "a.jsonl", row), tokenizer, 500).conversations
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.trained.tolist() == expected.trained.tolist()


@pytest.mark.parametrize(("row", "says"), UNUSABLE, ids=str)
def test_an_unusable_row_does_not_spoil_the_others(tmp_path, row, says):
    path = write(tmp_path / "a.jsonl", SHAREGPT, json.dumps(row), json.dumps(row), {"prompt": "x"})
    with pytest.warns(UserWarning, match=f"left out 2 unusable rows; the first, line 2: .*{says}") as told:
        given = data.read_given(path, make_tokenizer("chatml"), 500)
    assert (len(given.conversations), given.prompts, given.unusable) == (1, [["x"]], 2)
    assert len(told) == 1 and "\n" not in str(told[0].message)


def test_what_a_template_refuses_is_left_out(tmp_path):
    strict = "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    tokenizer = make_tokenizer("inst")
    tokenizer.chat_template = strict + "{{ raise_exception('alternate') }}{% endif %}{% endfor %}" + INST
    path = write(tmp_path / "a.jsonl", {"messages": [U, U, A]}, {"messages": [U, A]})
    told = "line 1: the chat template refuses messages of user, user, assistant .alternate"
    with pytest.warns(UserWarning, match=told):
        assert len(data.read_given(path, tokenizer, 500).conversations) == 1


def test_tool_results_and_weights_are_context():
    tokenizer = make_tokenizer("chatml")
    talk = [
        U,
        {**A, "weight": 0},
        {"role": "tool", "content": "you"},
        {"role": "assistant", "content": "two"},
    ]
    found = data.tokenize(talk, tokenizer, 500)
    assert spoken(found, tokenizer) == "two<|im_end|>"
    assert "<|im_start|>tool\nyou<|im_end|>" in tokenizer.decode(found.tokens.tolist())


def test_an_instruction_has_an_input_and_a_system_prompt(tmp_path):
    tokenizer = make_tokenizer("chatml")
    row = {"system": "be brief", "instruction": "say", "input": "one", "output": "two"}
    (found,) = data.read_given(write(tmp_path / "a.jsonl", row), tokenizer, 500).conversations
    talk = [("system", "be brief"), ("user", "say\n\none"), ("assistant", "two")]
    assert found.tokens.tolist() == data.tokenize(messages(talk), tokenizer, 500).tokens.tolist()


def test_keys_beside_prompts_are_told(tmp_path):
    given = data.read_given(
        write(tmp_path / "a.jsonl", {"prompt": "x", "target": "y"}), make_tokenizer("chatml"), 500
    )
    assert (given.prompts, given.unread) == ([["x"]], {"target"})


ROW, ASKED = json.dumps(SHAREGPT), '{"prompt": "x"}'


@pytest.mark.parametrize(
    ("name", "text", "unusable"),
    [
        ("a.json", f"[{ROW}, {ASKED}]", 0),
        ("a.json", f"[{ROW},\n{ASKED},\n]", 0),
        ("a.json", f"[{ROW},\n{ASKED},\n" + '{"prom', 1),
        ("a.json", f"{ROW}\n{ASKED}\n", 0),
        ("a.json", f'{{"data": [{ROW}, {ASKED}]}}', 0),
        ("a.json", json.dumps([SHAREGPT, {"prompt": "x"}], indent=2), 0),
        ("a.jsonl", f"[\n{ROW},\n{ASKED}\n]\n", 0),
        ("a.jsonl", f"\ufeff{ROW}\r\n\r\n{ASKED}\r\n", 0),
        ("a.jsonl", f"{ROW},\n{ASKED},\n", 0),
        ("a.jsonl", f"prompt,completion\n{ROW}\n{ASKED}", 1),
        ("a.jsonl", f"{ROW[:40]}\n{ROW}\n{ASKED}", 1),
        ("a.jsonl", f"{ROW}\n{ASKED}\n{ROW[:40]}", 1),
        ("a.jsonl", f"{ROW}\n{ASKED}\n" + "\0" * 99, 1),
        ("a.jsonl", f'{ROW}\n{{"prompt": "\udce9"}}\n{ASKED}', 1),  # a byte that is not UTF-8
    ],
)
@pytest.mark.filterwarnings("ignore:.*left out 1 unusable row")
def test_layouts_of_files(tmp_path, name, text, unusable):
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    given = data.read_given(tmp_path / name, make_tokenizer("chatml"), 500)
    assert (len(given.conversations), given.prompts, given.unusable) == (1, [["x"]], unusable)


def test_one_bad_byte_does_not_spoil_a_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one two\n\nthre\xe9\n\nfour")
    tokenizer = make_tokenizer(None)
    with pytest.warns(UserWarning, match="the first, paragraph 2: not UTF-8"):
        (found,) = data.read_given(tmp_path / "a.txt", tokenizer, 500).conversations
    assert spoken(found, tokenizer) == "one two\n\nfour\n\n"


def test_formats_of_prompts(tmp_path):
    asked = {"messages": messages([("system", "be brief"), ("user", "why?")])}
    path = write(tmp_path / "a.jsonl", {"prompt": "hi"}, {"turns": ["a", "b"]}, asked)
    given = data.read_given(path, make_tokenizer("chatml"), 500)
    assert given.prompts == [["hi"], ["a", "b"], ["be brief\n\nwhy?"]]
    assert given.conversations == []


def test_plain_text_is_joined_and_all_trained(tmp_path):
    tokenizer = make_tokenizer(None)
    paragraphs = ["one two three", "four five\nsix", "seven " * 12]
    path = tmp_path / "a.txt"
    path.write_text("\n \n".join(paragraphs))
    given = data.read_given(path, tokenizer, 30)
    texts = [spoken(c, tokenizer) for c in given.conversations]
    assert texts[0] == "one two three\n\nfour five\nsix\n\n"
    assert "".join(texts) == "\n\n".join(p.strip() for p in paragraphs) + "\n\n"
    assert all(len(c.tokens) <= 30 and c.trained.all() for c in given.conversations)
    items = write(tmp_path / "a.jsonl", *({"text": p} for p in paragraphs))
    assert [spoken(c, tokenizer) for c in data.read_given(items, tokenizer, 30).conversations] == texts


def test_plain_text_starts_as_the_tokenizer_starts_it(tmp_path):
    from mlx_redrafter.loading.tokenizer import load_tokenizer

    bundles.write_sentencepiece(tmp_path)
    path = tmp_path / "a.txt"
    path.write_text("the quick brown fox")
    tokenizer = load_tokenizer(tmp_path)
    (found,) = data.read_given(path, tokenizer, 40).conversations
    assert found.tokens[0] == tokenizer.bos_token_id
    assert found.trained.tolist() == [False] + [True] * (len(found.tokens) - 1)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"messages": [', "line 2: not JSON"),
        ("[1]", r"line 2: messages is \[1\]"),
        ('{"x": 1}', r"line 2: it has only the keys \['x'\]"),
        ('{"messages": []}', "line 2: messages is \\[\\]"),
        ('{"messages": [{"role": "cat", "content": "x"}]}', "line 2: role 'cat' is not known"),
        ('{"messages": [{"role": "user", "content": 3}]}', "line 2: a message's content is 3"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "line 2: no message has the role user"),
        ('{"prompt": null}', r"line 2: it has only the keys \[\]"),
        ('{"prompt": "\\ud83d"}', "line 2: prompt is .*half of a character"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, says):
    path = write(tmp_path / "a.jsonl", {"prompt": "x"}, line)
    with pytest.warns(UserWarning, match=says) as told:
        given = data.read_given(path, make_tokenizer("chatml"), 50)
    assert (given.prompts, given.unusable) == ([["x"]], 1)
    assert str(told[0].message).startswith(f"{path}: left out 1 unusable row; the first, line 2: ")
    with pytest.raises(
        ValueError, match="holds nothing that can be used .1 unusable row; the first, "
    ) as error:
        data.read_given(write(tmp_path / "b.jsonl", line), make_tokenizer("chatml"), 50)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_used(tmp_path):
    tokenizer = make_tokenizer("chatml")
    for name in ("none.txt", "none.jsonl", "none.npz"):
        with pytest.raises(ValueError, match="does not exist"):
            data.read_given(tmp_path / name, tokenizer, 50)
    for name in ("a.csv", "a.jsonl.gz", "a.parquet"):
        with pytest.raises(
            ValueError, match="is no training data: .*unpack an archive first, and write Parquet"
        ):
            data.read_given(tmp_path / name, tokenizer, 50)
    with pytest.raises(ValueError, match="holds nothing that can be used .it is empty"):
        data.read_given(write(tmp_path / "b.txt", ""), tokenizer, 50)
    with pytest.raises(ValueError, match="it has only the keys"):
        data.read_given(write(tmp_path / "b.json", {}), tokenizer, 50)
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="UTF-8"):
        data.read_given(tmp_path / "c.txt", tokenizer, 50)
    with pytest.raises(ValueError, match="no chat template"):
        data.read_given(write(tmp_path / "d.jsonl", SHAREGPT), make_tokenizer(None), 50)


# --- Shards --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [40, 70000])
def test_shards_round_trip(tmp_path, largest):
    path = tmp_path / "deep" / "a.npz"
    wanted = [conversation([1, 2, largest]), conversation([5], before=0)]
    data.write_shard(path, wanted)
    found = data.read_shard(path, largest + 1)
    assert [c.tokens.tolist() for c in found] == [c.tokens.tolist() for c in wanted]
    assert [c.trained.tolist() for c in found] == [c.trained.tolist() for c in wanted]
    assert np.load(path)["toks"].dtype == (np.uint16 if largest < 65536 else np.uint32)
    assert [p.name for p in path.parent.iterdir()] == ["a.npz"]
    data.write_shard(path, [])
    assert data.read_shard(path) == []


def test_shards_of_equal_rows(tmp_path):
    toks = np.arange(12, dtype=np.uint16).reshape(3, 4)
    np.savez(tmp_path / "a.npz", toks=toks, role=(toks % 2).astype(np.uint8))
    given = data.read_given(tmp_path / "a.npz", make_tokenizer("chatml"), 3)
    assert [c.tokens.tolist() for c in given.conversations] == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
    assert given.conversations[0].trained.tolist() == [False, True, False]


@pytest.mark.parametrize(
    "arrays",
    [
        {"toks": [1, 2]},
        {"toks": [1, 2], "role": [1]},
        {"toks": [1, 2], "role": [1, 1]},
        {"toks": [1, 2], "role": [1, 1], "lengths": [3]},
        {"toks": [1, 2], "role": [1, 1], "lengths": [2, 0]},
        {"toks": [1, 99], "role": [1, 1], "lengths": [2]},
        {"toks": [1, -1], "role": [1, 1], "lengths": [2]},
        {"toks": [1.0, 2.0], "role": [1, 1], "lengths": [2]},
        {"toks": np.array([None, 3]), "role": [1, 1], "lengths": [2]},
    ],
)
def test_wrong_shards(tmp_path, arrays):
    path = tmp_path / "a.npz"
    np.savez(path, **{name: np.array(value) for name, value in arrays.items()})
    with pytest.raises(ValueError, match=r"a\.npz") as error:
        data.read_shard(path, vocab_size=99)
    assert "\n" not in str(error.value)


def test_damaged_shards(tmp_path):
    path = tmp_path / "a.npz"
    rng = np.random.default_rng(0)
    toks = rng.integers(0, 60000, 500).astype(np.uint16)
    np.savez_compressed(path, toks=toks, role=np.ones(500, np.uint8), lengths=np.array([500], np.int32))
    whole = path.read_bytes()
    for place in range(0, len(whole), 37):
        path.write_bytes(whole[:place])
        with pytest.raises(ValueError, match=r"a\.npz"):
            data.read_shard(path)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            data.read_shard(path)  # some bytes do not matter
        except ValueError as error:
            assert "a.npz" in str(error)


# --- Cleaning, splitting, counting ---------------------------------------------------------------------


def test_duplicates_and_loops_are_dropped():
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 900, 200).tolist() for _ in range(2))
    nearly = [*first[:100], 7, *first[101:]]  # 8 of 193 shingles differ
    half = [*first[:100], *rng.integers(0, 900, 100).tolist()]
    loop = [*rng.integers(0, 900, 20).tolist(), *[5, 6, 7] * 60]
    short_loop = [8] * 20
    talks = [conversation(x) for x in (first, second, nearly, half, loop, short_loop, first)]
    kept, dropped = data.clean(talks)
    assert [i for i, talk in enumerate(talks) if any(talk is c for c in kept)] == [0, 1, 3, 5]
    assert dropped == Dropped(duplicates=2, loops=1)
    assert Cleaner(least_distinct=0.05).keep(talks[4])


def test_only_what_the_model_says_counts_for_cleaning():
    rng = np.random.default_rng(0)
    question = conversation([], before=300)
    cleaner = Cleaner()
    for _ in range(3):
        answer = conversation(rng.integers(0, 900, 40).tolist(), before=0)
        tokens = np.concatenate([question.tokens, answer.tokens])
        assert cleaner.keep(Conversation(tokens, np.concatenate([question.trained, answer.trained])))
    assert cleaner.keep(question)
    assert cleaner.dropped == Dropped()


def test_tokens_are_counted():
    counts = data.count_tokens([conversation([1, 2, 2]), conversation([4, 2])], 6)
    assert counts.tolist() == [[0, 1, 3, 0, 1, 0], [0, 1, 2, 0, 1, 0]]
    assert counts.dtype == np.int64
    with pytest.raises(ValueError, match="token 6 is not in the vocabulary of 6"):
        data.count_tokens([conversation([6])], 6)
