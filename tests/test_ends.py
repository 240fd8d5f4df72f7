"""Where a text ends: the tokens that a model's files, its chat template and its vocabulary name."""

import json

import mlx_lm
import pytest
from bundles import CONFIG, make_folder
from mlx_lm.utils import load_tokenizer as mlx_load_tokenizer
from test_gguf import add_byte_level, byte_level, write_model
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

import mlx_redrafter as r
from mlx_redrafter.convert.base import convert_base
from mlx_redrafter.loading.gguf import convert_gguf
from mlx_redrafter.loading.tokenizer import load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<|return|>", "<|user|>"]
WORDS = ["<end_of_turn>", "</answer>", "###"]  # added, and no special tokens


def tokenizer_folder(folder, template=CHATML, eos="<|endoftext|>", words=WORDS, **config):
    """A tokenizer with many marks; ``config`` is config.json's."""
    folder.mkdir(parents=True)
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    tokenizer.add_tokens([AddedToken(word) for word in words])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)
    fast.chat_template = template
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def ends(tokenizer):
    return {tokenizer.convert_ids_to_tokens(i) for i in tokenizer.eos_token_ids}


TURNS = {
    "ChatML": (CHATML, "<|im_end|>"),
    "a system text first": ("<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML, "<|im_end|>"),
    "always asks on": (CHATML + "<|im_start|>assistant\n", "<|im_end|>"),
    "a space before": ("{% for m in messages %}[{{ m.role }}] {{ m.content }} </s>{% endfor %}", "</s>"),
    "the last one open": (
        CHATML.replace("<|im_end|>", "{% if not loop.last %}<|im_end|>{% endif %}"),
        "<|im_end|>",
    ),
    "the next role": ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}", "<|user|>"),
    "not a special token": (CHATML.replace("<|im_end|>", "<end_of_turn>"), "<end_of_turn>"),
    "a variable": ("{% for m in messages %}{{ m.content + '<|im' + '_end|>' }}{% endfor %}", "<|im_end|>"),
    "text first": (
        "{% for m in messages %}{% if m.content is not string %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}<|return|>{% endfor %}",
        "<|return|>",
    ),
}


@pytest.mark.parametrize("name", TURNS)
def test_the_end_of_a_turn_in_the_template(tmp_path, name):
    template, end = TURNS[name]
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path / "m", template))
    assert {end, "<|endoftext|>"} <= ends(tokenizer)
    assert not {"<|im_start|>", *WORDS} & (ends(tokenizer) - {end})


GPT_OSS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>{{ m.content }}"
    "{% if m.role == 'assistant' and loop.last %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
)
TOO_EARLY = {
    "ends another message": (GPT_OSS, {"<|return|>"}, {"<|end|>", "<|im_end|>"}),
    "only after the user": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_end|>{% else %}"
        "{{ m.content }}</s>{% endif %}{% endfor %}",
        {"</s>"},
        {"<|im_end|>"},
    ),
    "nothing after the answer": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_end|>{% else %}"
        "{{ m.content }}\n{% endif %}{% endfor %}",
        set(),
        {"<|im_end|>"},
    ),
    "one part of a mark": (CHATML.replace("<|im_end|>", "<|user|>close<|im_start|>"), set(), {"<|user|>"}),
    "a heading": ("{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n{% endfor %}", set(), {"###"}),
    "a closing tag": (CHATML.replace("<|im_end|>", "</answer><|im_end|>"), set(), {"</answer>"}),
}


@pytest.mark.parametrize("name", TOO_EARLY)
def test_what_does_not_end_a_turn(tmp_path, name):
    template, some, none = TOO_EARLY[name]
    found = ends(load_tokenizer(tokenizer_folder(tmp_path / "m", template)))
    assert some | {"<|endoftext|>"} <= found
    assert not none & found


def test_ends_by_name_are_special_tokens(tmp_path):
    folder = tokenizer_folder(tmp_path / "m", words=["<end_of_turn>", "<eos>"])
    found = ends(load_tokenizer(folder))
    assert found == {"<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eot|>", "<|end|>", "<|return|>", "</s>"}


def test_without_a_template_the_ends_are_mlx_lms(tmp_path):
    folder = tokenizer_folder(tmp_path / "m", None, eos_token_id=[1, 2])
    expected = mlx_load_tokenizer(folder, eos_token_ids=[1, 2]).eos_token_ids
    assert load_tokenizer(folder, eos_token_ids=[1, 2]).eos_token_ids == expected


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% for %}", "{{ messages[0].content[0].text }}"]
)
def test_a_template_that_fails_leaves_the_names(tmp_path, template):
    assert "<|im_end|>" in ends(load_tokenizer(tokenizer_folder(tmp_path / "m", template)))


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 5}, None, {5}),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, {5, 6, 7}),
        ({"eos_token_id": 5}, {"eos_token_id": [7, 8]}, {5, 7, 8}),
        ({"eos_token_id": None}, {"eos_token_id": None}, set()),
        ({"eos_token_id": -1}, {"eos_token_id": [7, None]}, {7}),
        ({"text_config": {"eos_token_id": [5]}}, None, {5}),
        ({"eos_token_id": 10**6}, None, {10**6}),
    ],
)
def test_ends_of_every_file(tmp_path, config, generation, expected):
    folder = make_folder(tmp_path / "m", kind="random", **config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    _, tokenizer = r.load(folder, drafter=None)
    assert tokenizer.eos_token_ids == expected | {tokenizer.eos_token_id}


@pytest.mark.parametrize("draft", [True, False])
def test_generation_ends_where_the_turn_does(tmp_path, draft):
    folder = make_folder(tmp_path / "m", "the quick")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<s>"}))
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"eos_token_id": 0})
    )
    model, tokenizer = r.load(folder, drafter=None)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    last = list(r.stream_generate(model, tokenizer, prompt, 30, draft=draft))[-1]
    assert (last.finish_reason, last.token) == ("stop", 1)


def test_converted_folders_stop_in_mlx_lm(tmp_path):
    folder = make_folder(tmp_path / "m", kind="random", eos_token_id=0)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<s>"}))
    (folder / "generation_config.json").write_text('{"eos_token_id": 5, "top_p": 0.9}')
    convert_base(folder, tmp_path / "out")
    assert mlx_lm.load(str(tmp_path / "out"))[1].eos_token_ids == {0, 1, 5}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["top_p"] == 0.9


def test_an_end_of_text_that_is_no_token(tmp_path):
    folder = make_folder(tmp_path / "m", kind="random")
    assert load_tokenizer(folder, options={"eos_token": "q"}).eos_token == "q"
    with pytest.raises(ValueError, match=r"eos_token '<nope>' is not a token of .*m: give one"):
        load_tokenizer(folder, options={"eos_token": "<nope>"})


# --- GGUF --------------------------------------------------------------------------------------------


def gguf_ends(tmp_path, change=None, **options):
    """The texts that end what mlx-lm generates with a converted GGUF file; ``change`` edits its metadata."""

    def tokenizer(writer):
        made = add_byte_level(writer, **options)
        edits = {} if change is None else change(writer.kv_data[0])
        for key, value in edits.items():
            if value is None:
                del writer.kv_data[0][f"tokenizer.{key}"]
            else:
                writer.kv_data[0][f"tokenizer.{key}"].value = value
        return made

    write_model(tmp_path / "m.gguf", tokenizer=tokenizer)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = mlx_lm.load(tmp_path / "out")[1]
    assert load_tokenizer(tmp_path / "out", eos_token_ids=None).eos_token_ids == tokenizer.eos_token_ids
    return {tokenizer.convert_ids_to_tokens(i) for i in tokenizer.eos_token_ids}


def rename(data, *names):
    """Call the three control tokens otherwise."""
    tokens = data["tokenizer.ggml.tokens"].value
    return {"ggml.tokens": [*names, *tokens[len(names) :]]}


BASE = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GGUFS = {
    "the base model's eos": (
        lambda d: rename(d, *BASE) | {"ggml.eos_token_id": 0, "chat_template": CHATML},
        set(BASE[::2]),
    ),
    "no eos": (
        lambda d: rename(d, *BASE) | {"ggml.eos_token_id": None, "chat_template": CHATML},
        set(BASE[::2]),
    ),
    "eos out of range": (
        lambda d: rename(d, *BASE) | {"ggml.eos_token_id": 9999, "chat_template": CHATML},
        set(BASE[::2]),
    ),
    "no template": (
        lambda d: rename(d, *BASE) | {"ggml.eos_token_id": 0, "chat_template": None},
        set(BASE[::2]),
    ),
    "no types": (
        lambda d: (
            rename(d, *BASE) | {"ggml.eos_token_id": 0, "chat_template": CHATML, "ggml.token_type": None}
        ),
        set(BASE[::2]),
    ),
    "text alike, no template": (
        lambda d: (
            rename(d, "<|a|>", "</s>", "<|b|>")
            | {"ggml.eos_token_id": 0, "chat_template": None}
            | normal(d, 1)
        ),
        {"<|a|>"},
    ),
    "text alike, another template": (
        lambda d: (
            rename(d, *BASE) | {"ggml.eos_token_id": 0, "chat_template": "{{ messages }}"} | normal(d, 2)
        ),
        {"<|endoftext|>"},
    ),
}


def normal(data, i):
    types = data["tokenizer.ggml.token_type"].value
    return {"ggml.token_type": [*types[:i], 1, *types[i + 1 :]]}


@pytest.mark.parametrize("name", GGUFS)
def test_ends_of_gguf_files(tmp_path, name):
    change, expected = GGUFS[name]
    assert gguf_ends(tmp_path, change) == expected


@pytest.mark.parametrize("key", ["eot", "eom"])
def test_ends_that_the_metadata_names(tmp_path, key):
    assert gguf_ends(tmp_path, **{f"{key}_token_id": 300}) >= {"</s>", byte_level().id_to_token(300)}


def test_an_end_of_text_that_is_given_as_an_object(tmp_path):
    folder = make_folder(tmp_path / "model", tokenizer="sentencepiece")
    config = folder / "tokenizer_config.json"
    given = json.loads(config.read_text()) if config.exists() else {}
    config.write_text(json.dumps(given | {"eos_token": {"content": "</s>", "lstrip": False}}))
    assert ends(load_tokenizer(folder)) == {"</s>"}
