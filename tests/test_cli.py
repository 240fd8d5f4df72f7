"""The command line as a user meets it: outputs, files, interrupts, and one line for whatever is wrong."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from bundles import make_drafter, make_folder
from mlx_lm.cache_prompt import main as cache_prompt
from mlx_lm.generate import main as mlx_main
from mlx_lm.generate import setup_arg_parser
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache

from mlx_redrafter import stream_generate
from mlx_redrafter.loading.files import check_writable, shell_word
from mlx_redrafter.loading.prompt_cache import same_model
from mlx_redrafter.loading.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
SAYS = "Hé🙂好w!"
RECORD = {
    "text": str, "tokens": list, "prompt_tokens": int, "prompt_tps": float, "generation_tokens": int,
    "generation_tps": float, "steps": int, "tokens_per_step": float, "acceptance": list,
    "copied_tokens": int, "shapes": list, "peak_memory_gb": float, "finish_reason": str, "settings": dict,
    "device": dict, "versions": dict,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of models and drafters, not to be changed."""
    root = tmp_path_factory.mktemp("made")
    base = make_folder(root / "base", SAYS)
    make_drafter(root / "drafter", base)
    other = make_folder(root / "other", kind="random")
    make_drafter(root / "other-drafter", other)
    make_folder(root / "wide", SAYS, hidden_size=128)
    make_drafter(
        root / "random-wide-drafter", make_folder(root / "random-wide", kind="random", hidden_size=128)
    )
    make_folder(root / "sentencepiece", SAYS, "sentencepiece")
    make_drafter(root / "sentencepiece-drafter", root / "sentencepiece")
    return root


@pytest.fixture
def base(made, tmp_path):
    """Copies that may be spoilt."""
    shutil.copytree(made / "base", tmp_path / "base")
    shutil.copytree(made / "drafter", tmp_path / "drafter")
    return tmp_path / "base"


@pytest.fixture
def generate(run, made):
    """``generate`` with a model and its drafter, which others may override."""
    models = ["--model", made / "base", "--drafter", made / "drafter", "-p", "say"]
    return lambda *arguments, **options: run("generate", *models, *arguments, **options)


@pytest.fixture
def refused(run):
    def check(*arguments, naming="", **options):
        code, out, err = run(*arguments, **options)
        assert (code, out) == (2, ""), (code, out, err)
        assert len(err.splitlines()) == 1, err
        assert "Traceback" not in err
        assert str(naming) in err, err
        return err

    return check


@pytest.fixture
def refused_at_once(refused, monkeypatch):
    """As ``refused``, and no model may be loaded before."""

    def check(*arguments, **options):
        monkeypatch.setattr("mlx_redrafter.options.load", pytest.fail)
        monkeypatch.setattr("mlx_redrafter.loading.base.load_model", pytest.fail)
        return refused(*arguments, **options)

    return check


def spawn(*arguments, **options):
    command = [sys.executable, *(str(argument) for argument in arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT} | options
    return subprocess.Popen(command, **options)


# --- Output ------------------------------------------------------------------------------------------


def test_text_and_statistics(generate):
    code, out, err = generate()
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[:3] == ["=" * 10, SAYS, "=" * 10]
    starts = ["Prompt: ", "Generation: ", "Drafting: ", "Peak memory: "]
    assert [line[: len(start)] for line, start in zip(lines[3:], starts, strict=True)] == starts


def test_plain_decoding_says_the_same(generate):
    code, out, err = generate("--no-draft")
    assert (code, err, out.splitlines()[1]) == (0, "", SAYS)
    assert "Drafting" not in out


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("--beam-width", "2"),
        ("--no-draft",),
        ("--temp", "0.9", "--seed", "3"),
        ("-m", "1"),
        ("--stop", "好"),
    ],
)
def test_the_json_record(generate, extra):
    code, out, err = generate("--json", *extra)
    assert (code, err) == (0, "")
    record = json.loads(out, parse_constant=pytest.fail)
    assert len(out.splitlines()) == 1
    assert {name: type(value) for name, value in record.items()} == RECORD
    assert len(record["tokens"]) == record["generation_tokens"]
    assert all(isinstance(share, float) for share in record["acceptance"])
    assert record["settings"]["drafting"] == ("--no-draft" not in extra)
    assert record["versions"].keys() == {"mlx-redrafter", "mlx", "mlx-lm"}
    if "-m" in extra:
        assert (record["finish_reason"], record["generation_tokens"]) == ("length", 1)
    elif "--stop" in extra:
        assert (record["finish_reason"], record["text"]) == ("stop", "Hé🙂")
    elif "--temp" not in extra:
        assert (record["finish_reason"], record["text"]) == ("stop", SAYS)
    if "--beam-width" in extra:
        assert record["tokens_per_step"] > 2


def test_the_record_names_the_settings_in_force(generate):
    _, out, _ = generate("--json", "--beam-width", 3, "--beam-length", "2", "--max-nodes", 5)
    record = json.loads(out)
    wanted = {"beam_width": 3, "beam_length": 2, "max_nodes": 5, "lookup": 0}
    assert {name: record["settings"][name] for name in wanted} == wanted
    assert record["shapes"] == [{**wanted, "steps": record["steps"]}]


def test_lookup_in_the_record(generate):
    _, out, _ = generate("--json", "--drafter", "none", "--beam-width", 0, "--beam-length", 0, "--lookup", 3)
    record = json.loads(out)
    assert record["text"] == SAYS
    assert [shape["lookup"] for shape in record["shapes"]] == [3]
    _, out, _ = generate("--json", "--lookup", 0)
    assert {shape["lookup"] for shape in json.loads(out)["shapes"]} == {0}
    assert json.loads(out)["text"] == SAYS


@pytest.fixture
def terminal(monkeypatch):
    """Standard output is a terminal, with these environment variables."""

    def pretend(is_one=True, **variables):
        for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("sys.stdout.isatty", lambda: is_one)

    return pretend


@pytest.mark.parametrize(
    ("is_one", "variables", "colours"),
    [
        (True, {"TERM": "xterm"}, True),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {}, False),
        (False, {"FORCE_COLOR": "1"}, True),
        (False, {"FORCE_COLOR": "0"}, False),
        (False, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_drafted_text_in_colour(generate, terminal, is_one, variables, colours):
    terminal(is_one, **variables)
    _, out, _ = generate("--show-draft", "--beam-width", 2, "--verbose", "False")
    assert ("\033[32m" in out) == colours
    assert out.replace("\033[32m", "").replace("\033[0m", "") == f"{SAYS}\n"


def test_a_terminal_does_not_obey_the_model(run, tmp_path, terminal):
    folder = make_folder(tmp_path / "rude", "a\x1b]0;b\x07\x9b\tc\nd")
    command = ("generate", "--model", folder, "--no-draft", "--verbose", "False")
    assert run(*command)[1] == "a\x1b]0;b\x07\x9b\tc\nd\n"
    terminal()
    assert run(*command)[1] == "a\\x1b]0;b\\x07\\x9b\tc\nd\n"


@pytest.mark.parametrize("prompt", ["a\n\tb", r"Simplify \nabla \times F"])
def test_prompts_are_taken_as_typed(run, made, prompt):
    command = ("generate", "--model", made / "base", "--no-draft", "--ignore-chat-template", "--json")
    ids = mlx_lm.load(str(made / "base"))[1].encode(prompt)
    for given in (run(*command, "-p", prompt), run(*command, "-p", "-", stdin=prompt.encode())):
        assert (given[0], json.loads(given[1])["prompt_tokens"]) == (0, len(ids))


def test_stop_and_system_texts_are_taken_as_typed(run, generate, tmp_path):
    folder = make_folder(tmp_path / "tex", r"a\nb c")
    command = ("generate", "--model", folder, "--no-draft", "--json")
    assert json.loads(run(*command, "--stop", r"\n")[1])["text"] == "a"
    assert json.loads(run(*command, "--stop", "\n")[1])["text"] == r"a\nb c"
    typed, broken = (generate("--json", "--system-prompt", text)[1] for text in (r"\n", "\n"))
    assert json.loads(typed)["prompt_tokens"] == json.loads(broken)["prompt_tokens"] + 1


@pytest.mark.parametrize("tokenizer", ["byte-level", "sentencepiece"])
def test_output_that_goes_on_keeps_its_first_space(run, tmp_path, tokenizer):
    start, says = ("x>", " the") if tokenizer == "byte-level" else ("x >", "the")  # SentencePiece adds spaces
    folder = make_folder(tmp_path / "model", says, tokenizer)
    drafter = make_drafter(tmp_path / "drafter", folder)

    def text(*flags):
        return json.loads(run("generate", "--json", "--model", folder, *flags)[1])["text"]

    for decoding in (("--no-draft",), ("--drafter", drafter, "--beam-width", 1), ("--draft-model", folder)):
        assert text(*decoding, "-p", start, "--ignore-chat-template") == " the"
        if tokenizer == "byte-level":
            assert text(*decoding, "--prefill-response", "A fox>") == " the"
            assert text(*decoding, "--prefill-response", "A fox>", "--stop", " the") == ""
            assert text(*decoding) == text(*decoding, "--prefill-response", "") == "the"  # as in mlx-lm


def test_text_survives_a_template_that_wants_parts(run, tmp_path):
    folder = make_folder(tmp_path / "parts", SAYS)
    command = ("generate", "--model", folder, "--no-draft", "--json", "--system-prompt", "Be brief", "-p")
    whole = json.loads(run(*command, "tea")[1])
    template = (folder / "chat_template.jinja").read_text()
    parts = "{% for p in m['content'] %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    assert "{{ m['content'] }}" in template
    (folder / "chat_template.jinja").write_text(template.replace("{{ m['content'] }}", parts))
    found = json.loads(run(*command, "tea")[1])
    assert (found["text"], found["prompt_tokens"]) == (SAYS, whole["prompt_tokens"])
    answers = run(*command, "tea", "--prefill-response", "two cups >")
    assert json.loads(answers[1])["prompt_tokens"] > whole["prompt_tokens"]


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        (("--top-p", "0.9", "--top-k", "3"), ["--top-p", "--top-k"]),
        (("--temp", "1", "--top-p", "0.9", "--min-p", "0.1", "--min-tokens-to-keep", "2"), []),
        (("--temp", "1", "--min-tokens-to-keep", "2"), ["--min-tokens-to-keep"]),
        (("--xtc-threshold", "0.1"), ["--xtc-threshold"]),
        (("--kv-group-size", "32", "--quantized-kv-start", "9"), ["--kv-group-size", "--quantized-kv-start"]),
        (("--num-draft-tokens", "2"), ["--num-draft-tokens"]),
        (("--drafter", "none", "--beam-length", "2"), ["--beam-length"]),
        (("--no-draft", "--beam-length", "2"), []),  # the baseline of the same command line
        (("--no-draft", "--show-draft"), ["--show-draft"]),
        (("--ignore-chat-template", "--system-prompt", "Be kind"), ["--system-prompt"]),
        (("--ignore-chat-template", "--prefill-response", "I"), ["--prefill-response"]),
        (("--seed", "3"), []),
    ],
)
def test_flags_that_do_nothing_are_named(generate, flags, idle):
    code, _, err = generate(*flags, "--verbose", "False")
    assert code == 0
    assert [line.split()[1] for line in err.splitlines() if "does nothing" in line] == idle
    assert len(err.splitlines()) == len(idle)


def test_template_and_raw_prompts(generate):
    with_template = json.loads(generate("--json")[1])["prompt_tokens"]
    with_system = json.loads(generate("--json", "--system-prompt", "be kind")[1])["prompt_tokens"]
    raw = json.loads(generate("--json", "--ignore-chat-template")[1])["prompt_tokens"]
    assert raw < with_template < with_system


def test_stop_texts_and_further_ends(generate):
    assert json.loads(generate("--json", "--stop", "x", "--stop", "好w")[1])["text"] == "Hé🙂"
    assert json.loads(generate("--json", "--extra-eos-token", "w", "H")[1])["tokens"].__len__() == 1


def test_further_ends_are_ids_or_texts_of_one_token(generate, run, made):
    token = load_tokenizer(made / "base").get_vocab()["w"]
    length = len(json.loads(generate("--json", "--extra-eos-token", "w")[1])["tokens"])
    assert len(json.loads(generate("--json", "--extra-eos-token", token)[1])["tokens"]) == length
    assert json.loads(generate("--json", "--extra-eos-token", token)[1])["finish_reason"] == "stop"
    command = ["generate", "--model", made / "sentencepiece", "--no-draft", "--json", "--extra-eos-token"]
    assert run(*command, "w")[0] == 0


@pytest.mark.parametrize("kind", ["base", "sentencepiece"])
@pytest.mark.parametrize("token", ["<|im_end|>", "two words", "", "99999", "-1", "☃"])
def test_further_ends_that_are_no_token(refused, made, kind, token):
    command = ("generate", "--model", made / kind, "--no-draft", "--extra-eos-token", token)
    refused(*command, naming=f"--extra-eos-token {token!r} is not one token of this model")


def test_sampling_depends_on_the_seed_alone(run, made):
    def tokens(seed):
        command = ["generate", "--model", made / "other", "--drafter", made / "other-drafter", "--json"]
        return json.loads(run(*command, "--temp", "1", "--seed", seed)[1])["tokens"]

    assert tokens(1) == tokens(1) != tokens(2)


def test_no_drafter_for_the_model_is_said_once(run, made):
    code, out, err = run("generate", "--model", made / "other", "-m", "3", "--json")
    assert (code, json.loads(out)["settings"]["drafting"]) == (0, False)
    assert err.startswith("warning: no drafter ships for")
    assert len(err.splitlines()) == 1
    assert run("generate", "--model", made / "other", "-m", "3", "--drafter", "none")[2] == ""


def test_a_rotating_cache_decodes_plainly(generate):
    code, out, err = generate("--json", "--max-kv-size", "30")
    assert code == 0
    assert json.loads(out)["acceptance"] == []
    assert "without the drafter" in err


def test_a_cache_that_cannot_be_quantized_is_one_line(refused, made):
    command = ("generate", "--model", made / "base", "--drafter", made / "drafter", "--kv-bits", "8")
    refused(*command, "--quantized-kv-start", "0")


@pytest.mark.parametrize("command", ["generate", "tune"])
def test_an_unknown_flag_names_the_help_of_its_command(refused, command):
    refused(command, "--unknown", naming=f"--unknown (see mlx-redrafter {command} --help)")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_types_of_weights(generate, dtype):
    assert json.loads(generate("--json", "--dtype", dtype)[1])["text"] == SAYS


def test_byte_fallback(run, made):
    folder = made / "sentencepiece"
    command = ("generate", "--model", folder, "--drafter", made / "sentencepiece-drafter", "-p", ">")
    assert run(*command)[1].splitlines()[1] == f" {SAYS}"


# --- Next to mlx_lm.generate -------------------------------------------------------------------------


@pytest.fixture
def as_mlx_lm(run, monkeypatch, capsys):
    """Run ``generate`` and ``mlx_lm.generate`` with the same flags: both must say the same."""

    def check(*flags, mine=()):
        flags = [str(flag) for flag in flags]
        code, out, _ = run("generate", *flags, *mine)
        monkeypatch.setattr("sys.argv", ["mlx_lm.generate", *flags])
        mlx_main()
        assert code == 0
        text, theirs = (printed.split("=" * 10)[-2:][0] for printed in (out, capsys.readouterr().out))
        assert text == theirs

    return check


def test_every_flag_of_mlx_lm_is_known(run):
    help_text = run("generate", "--help")[1]
    flags = {flag for action in setup_arg_parser()._actions for flag in action.option_strings}
    missing = {flag for flag in flags if not re.search(rf"(^|[\s,\[]){flag}\b", help_text)}
    assert missing <= {"--image"}


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--max-tokens", "1"),
        ("--prefill-response", "I say", "--system-prompt", "be kind"),
        ("--chat-template-config", '{"unused": 1}', "--use-default-chat-template"),
        ("--ignore-chat-template", "-p", "one\ntwo"),
        ("--verbose", "False"),
        ("--draft-model", "OTHER", "--num-draft-tokens", "2"),
        ("--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0"),
        ("--max-kv-size", "20"),
        ("--extra-eos-token", "a", "b", "c"),
    ],
)
def test_flags_mean_what_they_mean_there(as_mlx_lm, made, flags):
    folder = made / ("random-wide" if "--kv-bits" in flags else "other")
    shared = [made / "other" if flag == "OTHER" else flag for flag in flags]
    drafter = ["--drafter", f"{folder}-drafter"] if "--draft-model" not in flags else []
    as_mlx_lm("--model", folder, "-m", "30", *shared, mine=drafter)


@pytest.mark.parametrize(
    ("flags", "drafts"),
    [
        (("--xtc-probability", "0.5", "--xtc-threshold", "0.1"), True),
        (("--min-p", "0.9", "--min-tokens-to-keep", "3"), True),
    ],
)
def test_every_filter_of_mlx_lm_drafts(generate, flags, drafts):
    code, out, err = generate("--json", "--temp", "2", "--seed", "4", *flags)
    assert (code, err) == (0, "")
    assert json.loads(out)["settings"]["drafting"] == drafts
    assert (
        json.loads(generate("--json", "--temp", "2", "--seed", "4", *flags)[1])["tokens"]
        == json.loads(out)["tokens"]
    )


# --- Prompt caches -----------------------------------------------------------------------------------


@pytest.fixture
def cache_file(made, tmp_path):
    """A cache of the first words, as mlx_lm.cache_prompt writes it."""
    return write_cache(made / "base", tmp_path / "cache.safetensors")


def write_cache(folder, path, **metadata):
    model, tokenizer = mlx_lm.load(str(folder))
    cache = make_prompt_cache(model)
    messages = [{"role": "user", "content": "say"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False, continue_final_message=True)
    model(mx.array([ids]), cache=cache)
    save_prompt_cache(str(path), cache, {"model": str(folder), "tokenizer_config": "{}"} | metadata)
    return path


def test_a_prompt_cache_names_the_model(run, made, cache_file):
    command = ["generate", "--prompt-cache-file", cache_file, "--json", "-p", " it"]
    code, out, err = run(*command, "--drafter", made / "drafter")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert record["text"] == SAYS
    assert record["prompt_tokens"] < 16  # only what follows "say"
    assert record["steps"] < record["generation_tokens"]
    assert json.loads(run(*command, "--no-draft")[1])["tokens"] == record["tokens"]


def test_a_prompt_cache_continues_as_in_mlx_lm(as_mlx_lm, made, tmp_path):
    path = write_cache(made / "other", tmp_path / "cache.safetensors")
    drafter = ["--drafter", made / "other-drafter"]
    as_mlx_lm("--prompt-cache-file", path, "-p", " it", "-m", "30", mine=drafter)


@pytest.mark.parametrize("flags", [("--kv-bits", "8", "--kv-group-size", "32"), ("--max-kv-size", "9")])
def test_caches_of_other_kinds_continue_as_in_mlx_lm(as_mlx_lm, made, tmp_path, monkeypatch, flags):
    path, folder = tmp_path / "cache.safetensors", made / "random-wide"
    made_by = ["cache_prompt", "--model", str(folder), "--prompt-cache-file", str(path), "--prompt", "say"]
    monkeypatch.setattr(
        "sys.argv", [*made_by, *flags, *(["--quantized-kv-start", "0"] if "9" not in flags else [])]
    )
    cache_prompt()
    same = flags if "--kv-bits" in flags else ()
    drafter = ["--drafter", made / "random-wide-drafter"]
    as_mlx_lm("--prompt-cache-file", path, "-p", " it", "-m", "30", *same, mine=drafter)


def test_names_of_one_model_fit_its_prompt_cache(run, made, cache_file, monkeypatch, tmp_path):
    monkeypatch.chdir(made)
    (tmp_path / "link").symlink_to(made / "base")
    command = ("generate", "--no-draft", "--json", "--prompt-cache-file", cache_file, "--model")
    for name in ("base", "./base/", f"{made}/base/", "drafter/../base", tmp_path / "link"):
        code, out, err = run(*command, name, "-p", " it")
        assert (code, err, json.loads(out)["text"]) == (0, "", SAYS)
    _, _, err = run(*command, "base", "--system-prompt", "Be kind", "--max-kv-size", "99")
    assert [line.split()[1] for line in err.splitlines()] == ["--system-prompt", "--max-kv-size"]
    hub = tmp_path / "hub/models--some--model-4bit/snapshots/12ab"
    hub.mkdir(parents=True)
    assert same_model(str(hub), "some/model-4bit")
    assert not same_model(str(hub), "some/model-8bit")
    assert not same_model("some/model", "other/model")


def test_the_cache_brings_the_tokenizers_options(run, made, tmp_path):
    path = write_cache(made / "base", tmp_path / "cache.safetensors", tokenizer_config='{"eos_token": "w"}')
    code, out, _ = run("generate", "--prompt-cache-file", path, "--no-draft", "-p", " it")
    assert (code, out.splitlines()[1]) == (0, SAYS.split("w")[0])


def test_prompt_caches_that_do_not_fit(refused, made, tmp_path, cache_file):
    command = ("generate", "--no-draft", "--prompt-cache-file")
    refused(
        *command, cache_file, "--model", made / "wide", naming=f"--model {made / 'wide'} is not the model"
    )
    refused(
        *command, tmp_path / "missing.safetensors", naming="missing.safetensors is no usable prompt cache"
    )
    refused(*command, tmp_path, naming="is no usable prompt cache")
    lying = write_cache(made / "wide", tmp_path / "lying.safetensors", model=str(made / "base"))
    refused(*command, lying, naming="lying.safetensors does not fit the model")
    content = cache_file.read_bytes()
    for name, spoilt in (("cut", content[:-9]), ("empty", b""), ("text", b"hello"), ("head", content[:40])):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(spoilt)
        refused(*command, path, naming=f"{name}.safetensors is no usable prompt cache")
    refused(*command, made / "base/model.safetensors", naming="is no usable prompt cache")
    nan = write_cache(made / "base", tmp_path / "nan.safetensors")
    arrays, metadata = mx.load(str(nan), return_metadata=True)
    name = next(name for name, value in arrays.items() if value.ndim == 4)
    mx.save_safetensors(str(nan), arrays | {name: arrays[name] * mx.nan}, metadata)
    refused(*command, nan, naming="nan.safetensors does not fit the model")


# --- Bad command lines -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "naming"),
    [
        (["-p", ""], "the prompt is empty"),
        (["-p", "  \n"], "the prompt is empty"),
        (["--verbose", "no"], "'no' is not usable"),
        (["-p", "\udcff"], "--prompt '\\udcff' is not text"),
        (["-m", "0"], "--max-tokens 0"),
        (["-m", "-2"], "--max-tokens -2"),
        (["-m", "many"], "'many'"),
        (["-m", "1.5"], "'1.5'"),
        (["--temp", "-1"], "temperature -1.0"),
        (["--temp", "nan"], "temperature nan"),
        (["--temp", "inf"], "temperature inf"),
        (["--top-p", "1.1"], "top-p 1.1"),
        (["--min-p", "-0.1"], "min-p -0.1"),
        (["--top-k", "-1"], "top-k -1"),
        (["--seed", "-1"], "--seed -1"),
        (["--seed", str(1 << 64)], f"--seed {1 << 64}"),
        (["--stop", ""], "--stop ''"),
        (["--model", ""], "--model ''"),
        (["--drafter", ""], "--drafter ''"),
        (["--max-kv-size", "0"], "--max-kv-size 0"),
        (["--context-length", "0"], "--context-length 0"),
        (["--prefill-step-size", "0"], "--prefill-step-size 0"),
        (["--kv-bits", "7"], "7"),
        (["--kv-group-size", "8"], "8"),
        (["--quantized-kv-start", "-5"], "--quantized-kv-start -5"),
        (["--dtype", "int8"], "int8"),
        (["--xtc-probability", "2"], "--xtc-probability 2.0"),
        (["--xtc-threshold", "nan"], "--xtc-threshold nan"),
        (["--min-tokens-to-keep", "0"], "--min-tokens-to-keep 0"),
        (["--num-draft-tokens", "0"], "--num-draft-tokens 0"),
        (["--chat-template-config", "{"], "--chat-template-config"),
        (["--chat-template-config", "[1]"], "--chat-template-config [1]"),
        (["--beam-width", "0"], "beam width 0"),
        (["--beam-width", "-3"], "beam width -3"),
        (["--beam-length", "0"], "beam length 0"),
        (["--beam-width", "99999"], "beam width 99999 exceeds the drafter's vocabulary of 300"),
        (["--beam-length", "1000000"], "1000000"),
        (["--max-nodes", "1"], "1 tree nodes"),
        (["--max-nodes", "-1"], "-1 tree nodes"),
        (["--max-nodes", "1000000"], "1000000 tree nodes"),
        (["--beam-width", "2", "--beam-length", "2", "--max-nodes", "6"], "give 2 to 5"),
        (["--json", "--show-draft"], "--show-draft"),
        (["--no-such-flag"], "--no-such-flag"),
        (["stray\nlines"], "stray lines"),
        (["--drafter", "missing"], "missing"),
        (["--drafter", "/"], "config.json"),
        (["--drafter", __file__], "test_cli.py is a file"),
        (["--prompt-cache-file", "missing"], "missing is no usable prompt cache"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_loaded(refused_at_once, made, flags, naming):
    command = ["generate", "--model", made / "base", "--drafter", made / "drafter"]
    refused_at_once(*command, *flags, naming=naming)


@pytest.mark.parametrize(
    ("arguments", "naming"),
    [
        ([], "COMMAND"),
        (["generat"], "generat"),
        (["convert"], "nothing to convert"),
        (["convert", "--model", "x", "-q", "-d"], "-q and -d"),
        (["convert", "--model", "x", "--q-bits", "4"], "need -q"),
        (["convert", "--model", "x", "-q", "--q-bits", "7"], "--q-bits is 7"),
        (["convert", "--model", "x", "-q", "--q-mode", "best"], "best"),
        (["convert", "--model", "x", "--dtype", "int8"], "int8"),
        (["convert", "--model", "x", "--draft-vocab", "9"], "--draft-vocab is for drafters"),
        (["convert", "--model", "x", "--upload-repo", "a b"], "'a b'"),
        (["convert", "--model", "x", "--mlx-path", __file__], "exists already"),
        (["convert", "--model", "x", "--mlx-path", "/dev/null/out"], "/dev/null"),
        (["convert", "--model", "x", "--mlx-path", ""], "''"),
        (["convert", "--model", "/missing"], "/missing"),
        (["convert", "--model", "missing.gguf"], "missing.gguf"),
        (["convert", "--model", __file__], "test_cli.py"),
        (["convert", "--drafter", "/missing"], "/missing"),
        (["convert", "--drafter", "x", "--drafter-q-bits", "7"], "7"),
        (["convert", "--drafter", "x", "--draft-vocab", "0", "--frequencies", "f"], "0 tokens"),
        (["convert", "--drafter", "x", "--draft-vocab", "5"], "--frequencies"),
        (["convert", "--drafter", "x", "--draft-vocab", "5", "--frequencies", "missing.txt"], "missing.txt"),
        (["convert", "--drafter", "x", "--frequencies", __file__, "--save-frequencies", "a.doc"], "a.doc"),
        (
            ["convert", "--drafter", "x", "--frequencies", __file__, "--save-frequencies", "/no/a.npz"],
            "/no/a.npz",
        ),
        (["export"], "--drafter"),
        (["export", "--drafter", "/missing"], "/missing"),
        (["export", "--drafter", "/", "--output", "/"], "exists already"),
    ],
)
def test_other_bad_command_lines(refused_at_once, tmp_path, monkeypatch, arguments, naming):
    monkeypatch.chdir(tmp_path)
    refused_at_once(*arguments, naming=naming)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "naming"), [(b" \n\t", "the prompt is empty"), (b"caf\xe9", "not text in UTF-8")]
)
def test_bad_standard_input(refused_at_once, content, naming):
    refused_at_once("generate", "-p", "-", stdin=content, naming=naming)


def test_standard_input_is_utf_8_in_every_locale(made):
    command = ["-m", "mlx_redrafter", "generate", "--model", made / "base", "--no-draft", "-p", "-"]
    variables = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = spawn(*command, stdin=subprocess.PIPE, env=variables)
    out, err = process.communicate("é".encode(), timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert b"Generation: 13 tokens" in out


def test_a_repository_without_a_network(refused):
    refused("generate", "--model", "nobody/nothing", naming="nobody/nothing")
    refused("generate", "--model", "nobody/nothing", "--drafter", "no/drafter", naming="no/drafter")
    refused("convert", "--model", "nobody/nothing", "--mlx-path", "/tmp/never", naming="nobody/nothing")


# --- Bad models --------------------------------------------------------------------------------------


def edit(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def spoil_weights(folder, change):
    path = folder / "model.safetensors"
    weights = dict(mx.load(str(path)))
    change(weights)
    mx.eval(weights)
    mx.save_safetensors(str(path), weights)


def nan(weights):
    name = sorted(weights)[0]
    weights[name] = weights[name] * mx.nan


def rename(weights):
    name = sorted(weights)[0]
    weights["new"] = weights.pop(name)


def cut(path, size=-100):
    path.write_bytes(path.read_bytes()[:size])


SPOILS = {
    "no config": lambda f: (f / "config.json").unlink(),
    "config is a folder": lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
    "config is no JSON": lambda f: cut(f / "config.json", 20),
    "config is a list": lambda f: (f / "config.json").write_text("[1]"),
    "config is deep": lambda f: (f / "config.json").write_text("[" * 100_000),
    "config is not UTF-8": lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "weights are a pickle": lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
    "weights are a folder": lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
    "weights are empty": lambda f: cut(f / "model.safetensors", 0),
    "weights are cut": lambda f: cut(f / "model.safetensors"),
    "header is cut": lambda f: cut(f / "model.safetensors", 100),
    "nan": lambda f: spoil_weights(f, nan),
    "renamed": lambda f: spoil_weights(f, rename),
    "other sizes": lambda f: edit(f / "config.json", hidden_size=32),
    "larger vocabulary": lambda f: edit(f / "config.json", vocab_size=2**31 - 1),
    "huge": lambda f: edit(f / "config.json", hidden_size=10**9, vocab_size=10**9),
    "text for a number": lambda f: edit(f / "config.json", hidden_size="many"),
    "negative": lambda f: edit(f / "config.json", vocab_size=-300),
}
BASE_SPOILS = {
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "tokenizer is no JSON": lambda f: cut(f / "tokenizer.json"),
    "tokenizer is another": lambda f: (f / "tokenizer.json").write_text('{"version": "1.0", "model": 3}'),
    "endless layers": lambda f: edit(f / "config.json", num_hidden_layers=10**9),
    "unknown architecture": lambda f: edit(f / "config.json", model_type="os"),
    "own code": lambda f: edit(f / "config.json", model_file="model.py"),
    "heads do not fit": lambda f: edit(f / "config.json", num_attention_heads=3, head_dim=16),
    "context is text": lambda f: edit(f / "config.json", max_position_embeddings="long"),
    "ends are text": lambda f: edit(f / "config.json", eos_token_id="</s>"),
    "epsilon is not a number": lambda f: edit(f / "config.json", rms_norm_eps="small"),
    "rope is nothing": lambda f: edit(f / "config.json", rope_theta=None),
    "quantized by nothing": lambda f: edit(f / "config.json", quantization=4),
}
DRAFTER_SPOILS = {
    "no drafter": lambda f: edit(f / "config.json", model_type="llama"),
    "endless layers": lambda f: edit(f / "config.json", num_draft_layers=10**9),
    "damaged record": lambda f: edit(f / "config.json", mlx_redrafter={"format": 1, "base": [1]}),
    "damaged list": lambda f: edit(f / "config.json", mlx_redrafter={"format": 1, "unused_tensors": 5}),
    "of the future": lambda f: edit(f / "config.json", mlx_redrafter={"format": 99}),
}


@pytest.mark.parametrize("spoil", [*SPOILS, *BASE_SPOILS])
def test_a_bad_model_is_one_line(refused, base, spoil):
    (SPOILS | BASE_SPOILS)[spoil](base)
    err = refused("generate", "--model", base, "--no-draft", naming=base)
    assert len(err) < 1000
    if spoil not in (
        "context is text",
        "ends are text",
        "heads do not fit",
        "epsilon is not a number",
        "rope is nothing",
    ):
        refused("convert", "--model", base, "--mlx-path", base.parent / "out", naming=base)
        assert not (base.parent / "out").exists()


@pytest.mark.parametrize("spoil", [*SPOILS, *DRAFTER_SPOILS])
def test_a_bad_drafter_is_one_line(refused, base, spoil):
    drafter = base.parent / "drafter"
    (SPOILS | DRAFTER_SPOILS)[spoil](drafter)
    naming = "damaged base" if spoil == "damaged record" else drafter
    refused("generate", "--model", base, "--drafter", drafter, naming=naming)
    refused("export", "--drafter", drafter, "--output", base.parent / "out", naming=naming) if (
        spoil not in ("nan", "damaged record")
    ) else None
    assert not (base.parent / "out").exists()


def test_the_drafter_of_another_model(refused, made, tmp_path):
    command = ("generate", "--model", made / "base", "--drafter")
    refused(*command, made / "other-drafter", naming="other-drafter is for tiny")
    make_drafter(tmp_path / "wide", made / "wide", record=False)
    refused(*command, tmp_path / "wide", naming="is for hidden size 128 and vocabulary 300")
    make_drafter(tmp_path / "more", make_folder(tmp_path / "large", vocab_size=400), record=False)
    refused(*command, tmp_path / "more", naming="vocabulary 400")


def test_a_tokenizer_with_more_tokens_than_the_model(refused, tmp_path):
    small = make_folder(tmp_path / "small", vocab_size=60)
    refused("generate", "--model", small, "--no-draft", "-p", "hello 🙂", naming="the model knows 60")


def test_a_prompt_beyond_the_context(refused, generate, made):
    command = ("generate", "--model", made / "base", "--drafter", made / "drafter", "-p")
    refused(*command, "a b " * 1000, naming="context of 1024")
    refused("generate", "--model", made / "base", "-p", "a b " * 1000, naming="context of 1024")
    short = ["--model", made / "base", "--context-length", "9"]
    refused("generate", *short, "-p", "a b " * 9, naming="context of 9")
    long = ["--context-length", "3000", "-m", "2", "-p", "a b " * 600]
    for flags in (["--no-draft"], ["--beam-width", "1"]):
        assert generate(*long, *flags)[0] == 0


def test_bad_adapters(refused, made, tmp_path):
    command = ("generate", "--model", made / "base", "--no-draft", "--adapter-path")
    refused(*command, tmp_path / "missing", naming="missing")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(*command, tmp_path, naming=tmp_path)


# --- Conversion --------------------------------------------------------------------------------------


def test_converted_models_load_in_mlx_lm(run, made, tmp_path):
    code, out, err = run("convert", "--model", made / "base", "--mlx-path", tmp_path / "plain")
    assert (code, err) == (0, "")
    assert str(tmp_path / "plain") in out
    model, tokenizer = mlx_lm.load(str(tmp_path / "plain"))
    assert mlx_lm.generate(model, tokenizer, ">") == SAYS
    flags = ("-q", "--q-bits", "8", "--q-group-size", "32")
    assert run("convert", "--model", made / "base", "--mlx-path", tmp_path / "q", *flags)[0] == 0
    model, tokenizer = mlx_lm.load(str(tmp_path / "q"))
    assert mlx_lm.generate(model, tokenizer, ">") == SAYS
    command = ("generate", "--model", tmp_path / "q", "--drafter", made / "drafter", "--json")
    assert json.loads(run(*command)[1])["text"] == SAYS


def test_converted_drafters_draft(run, made, tmp_path):
    (tmp_path / "text.txt").write_text(f"{SAYS} the quick brown fox " * 9)
    trimmed, counts = tmp_path / "trimmed", tmp_path / "counts.json"
    command = ["convert", "--drafter", made / "drafter", "--model", made / "base", "--mlx-path", trimmed]
    flags = ["--draft-vocab", "40", "--frequencies", tmp_path / "text.txt", "--save-frequencies", counts]
    code, out, err = run(*command, *flags, "--drafter-q-bits", "8", "--drafter-q-group-size", "32")
    assert (code, err) == (0, "")
    assert "40 of 300 tokens" in out
    assert json.loads(counts.read_text())["vocab_size"] == 300
    command = ("generate", "--model", made / "base", "--drafter", trimmed, "--json")
    record = json.loads(run(*command, "--beam-width", "2")[1])
    assert record["text"] == SAYS
    assert record["tokens_per_step"] > 1.5
    assert run(*command, "--beam-width", "41")[0] == 2


def test_exported_drafters_convert_again(run, made, tmp_path):
    assert run("export", "--drafter", made / "drafter", "--output", tmp_path / "apple")[0] == 0
    assert "mlx_redrafter" not in json.loads((tmp_path / "apple/config.json").read_text())
    command = ("convert", "--model", tmp_path / "apple", "--mlx-path", tmp_path / "again")
    assert run(*command)[0] == 0  # a drafter is recognised
    command = ("generate", "--model", made / "base", "--drafter", tmp_path / "again", "--json")
    assert json.loads(run(*command)[1])["text"] == SAYS


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("no route")])
def test_a_failed_upload_keeps_the_folder(refused, made, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    command = ("convert", "--model", made / "base", "--mlx-path", tmp_path / "out", "--upload-repo", "me/it")
    refused(*command, naming=f"{tmp_path / 'out'} is converted, but uploading it to me/it failed (no route)")
    assert (tmp_path / "out/model.safetensors").exists()


# --- Processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "naming"),
    [
        (["-m", "mlx_redrafter", "generate", "--model", "/missing"], "/missing"),
        (["generate.py", "--max-tokens", "0"], "--max-tokens 0"),
        (["convert.py", "--model", "/missing", "--mlx-path", "/tmp/never"], "/missing"),
    ],
)
def test_errors_of_processes(command, naming):
    process = spawn(*command)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, b"")
    assert len(err.decode().splitlines()) == 1, err
    assert naming in err.decode()


def endless(made, *flags):
    """A process that generates for a long time."""
    command = ("-m", "mlx_redrafter", "generate", "--model", made / "other", "--no-draft", "-m", "500000")
    return spawn(*command, *flags)


def test_an_interrupt_ends_with_what_there_is(made):
    process = endless(made)
    process.stdout.read(30)  # it has begun
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().split() == ["Interrupted."]
    assert b"Generation: " in out


def test_an_interrupt_ends_with_a_record_of_what_there_is(generate, monkeypatch):
    def interrupted(*args, **options):
        yield from islice(stream_generate(*args, **options), 6)
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_redrafter.commands.generate.stream_generate", interrupted)
    code, out, err = generate("--json")
    assert (code, err.split()) == (130, ["Interrupted."])
    record = json.loads(out)
    assert (record["text"], record["generation_tokens"], record["finish_reason"]) == ("Hé", 6, None)


@pytest.mark.parametrize("flags", [(), ("--json", "-m", "5")])
def test_a_reader_that_leaves_is_no_error(made, flags):
    process = endless(made, *flags)
    if not flags:
        process.stdout.read(5)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line(made):
    with open("/dev/full", "w") as full:
        process = spawn(
            "-m", "mlx_redrafter", "generate", "--model", made / "other", "--no-draft", stdout=full
        )
        err = process.stderr.read().decode()
        assert process.wait(timeout=60) == 2
    assert len(err.splitlines()) == 1
    assert "No space left" in err


CLOSED = {"stdin": 0, "stdout": 1, "stderr": 2}


@pytest.mark.parametrize("closed", [["stdin"], ["stdout"], ["stderr"], ["stdin", "stdout", "stderr"]])
def test_closed_standard_streams(made, closed):
    command = ["-m", "mlx_redrafter", "generate", "--model", made / "base", "--verbose", "False"]
    process = spawn(*command, close_fds=False, preexec_fn=lambda: [os.close(CLOSED[name]) for name in closed])
    out, err = (text.decode() for text in process.communicate(timeout=60))
    if "stdout" in closed:
        assert (process.returncode, out) == (2, "")
        assert err == "" if "stderr" in closed else err.startswith("error: standard output is closed")
    else:  # no drafter ships for this model, which is told on standard error only
        assert (process.returncode, out) == (0, f"{SAYS}\n")
        assert len(err.splitlines()) == (0 if "stderr" in closed else 1)


@pytest.mark.parametrize(
    "command",
    [
        ("convert", "--model", "base", "--mlx-path", "OUT"),
        ("export", "--drafter", "drafter", "--output", "OUT"),
    ],
)
def test_files_are_written_without_standard_input(made, tmp_path, command):
    places = {"OUT": tmp_path / "out", "base": made / "base", "drafter": made / "drafter"}
    words = [places.get(word, word) for word in command]
    process = spawn("-m", "mlx_redrafter", *words, close_fds=False, preexec_fn=lambda: os.close(0))
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 0
    assert (tmp_path / "out/config.json").stat().st_size > 0


@pytest.mark.parametrize("where", ["full", "left"])
def test_what_standard_error_cannot_take_stops_nothing(made, where):
    if where == "full" and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    reader, writer = os.pipe()
    os.close(reader)
    stderr = os.open("/dev/full", os.O_WRONLY) if where == "full" else writer
    process = spawn(
        "-m", "mlx_redrafter", "generate", "--model", made / "base", "--verbose", "f", stderr=stderr
    )
    assert process.communicate(timeout=60)[0].decode() == f"{SAYS}\n"
    assert process.returncode == 0


@pytest.mark.parametrize("command", [["-m", "mlx_redrafter"], ["generate.py"]])
def test_an_interrupt_during_imports_is_one_line(tmp_path, command):
    (tmp_path / "mlx_lm.py").write_text("raise KeyboardInterrupt")
    process = spawn(*command, "generate", env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.split()) == (130, b"", [b"Interrupted."])


def test_a_blas_that_is_not_there_is_one_line():
    process = spawn("-m", "mlx_redrafter", "generate", env=os.environ | {"MLX_REDRAFTER_BLAS": "/missing.so"})
    err = process.communicate(timeout=60)[1].decode()
    if sys.platform.startswith("linux"):
        assert process.returncode == 2
        assert err.startswith("error: MLX_REDRAFTER_BLAS=/missing.so cannot be loaded")
        assert len(err.splitlines()) == 1


def test_names_beyond_ascii_in_every_locale(made, tmp_path):
    name = "mödel 好"
    shutil.copytree(made / "base", tmp_path / name)
    variables = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    options = {"env": variables | {"PYTHONPATH": str(ROOT)}, "cwd": tmp_path}
    process = spawn("-m", "mlx_redrafter", "convert", "--model", name, "--mlx-path", f"{name} 2", **options)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.decode(), err) == (0, f"{name} 2: the model {name}\n", b"")
    process = spawn("-m", "mlx_redrafter", "generate", "--model", f"{name} 2", "--verbose", "f", "--no-draft",
                    **options)  # fmt: skip
    assert process.communicate(timeout=60) == (f"{SAYS}\n".encode(), b"")


def test_warnings_as_errors_stop_nothing(made):
    process = spawn(
        "-W", "error", "-m", "mlx_redrafter", "generate", "--model", made / "base", "--verbose", "f"
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.decode()) == (0, f"{SAYS}\n")
    assert b"warning: no drafter ships for" in err


# --- Advice ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "with space", "-dash", "it's"])
def test_words_for_a_command_line_are_what_they_name(tmp_path, name):
    (tmp_path / name).write_text("found")
    command = f"cat {shell_word(name)}"
    assert subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True).stdout == b"found"


@pytest.mark.parametrize("name", ["out", "my drafter", "-out"])
def test_the_line_that_train_ends_with_works(run, made, tmp_path, monkeypatch, name):
    def train(model, tokenizer, request, output, *_):
        shutil.copytree(made / "drafter", output)
        return {}

    monkeypatch.setattr("mlx_redrafter.train.run.train", train)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "base", "a model")
    code, out, _ = run("train", "--model", "a model", f"--output={name}")
    program, *words = shlex.split(out.splitlines()[0].partition("Use it with: ")[2])
    assert (code, program) == (0, "mlx-redrafter")
    code, out, err = run(*words, "--json")
    assert (code, err, json.loads(out)["text"]) == (0, "", SAYS)
    assert json.loads(out)["settings"]["drafting"]


@pytest.mark.parametrize("name", ["out", "my drafter", "-out"])
def test_the_line_that_an_interrupted_train_ends_with_works(run, made, tmp_path, monkeypatch, name):
    def train(model, tokenizer, request, output, *_):
        if Path(f"{name}.train").exists():
            return {"resumed": []}
        Path(f"{name}.train").mkdir()
        Path(f"{name}.train/run.json").write_text(json.dumps({"asked": {"model": str(made / "base")}}))
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_redrafter.train.run.train", train)
    monkeypatch.chdir(tmp_path)
    code, _, err = run("train", "--model", made / "base", f"--output={name}")
    assert code == 130
    line = next(line for line in err.splitlines() if "Go on with: " in line)
    code, out, _ = run(*shlex.split(line.partition("Go on with: ")[2])[1:])
    assert code == 0
    assert "Tokens per step, resumed:" in out


def test_the_card_of_a_drafter_quotes_its_model(run, made, tmp_path):
    shutil.copytree(made / "base", tmp_path / "a model")
    command = ("convert", "--drafter", made / "drafter", "--model", tmp_path / "a model")
    assert run(*command, "--mlx-path", tmp_path / "out")[0] == 0
    lines = (tmp_path / "out/README.md").read_text().splitlines()
    line = next(line for line in lines if line.startswith("mlx-redrafter generate"))
    assert shlex.split(line)[3] == "a model"


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="needs a place where even root cannot write")
@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("train", "--output"),
        ("convert", "--mlx-path"),
        ("export", "--output"),
        ("benchmark", "--json"),
        ("benchmark", "--markdown"),
        ("benchmark", "--plots"),
    ],
)
def test_places_that_cannot_be_written_are_named_before_the_work(refused, made, monkeypatch, command, flag):
    monkeypatch.setattr("mlx_redrafter.benchmark.session.load_model", pytest.fail)
    monkeypatch.setattr("mlx_redrafter.model.load", pytest.fail)
    monkeypatch.setattr("mlx_redrafter.loading.base.load_model", pytest.fail)
    source = ("--drafter", made / "drafter") if command == "export" else ("--model", made / "base")
    prompts = ("--prompts", made / "prompts.jsonl") if command == "benchmark" else ()
    (made / "prompts.jsonl").write_text('{"prompt": "tea"}')
    refused(command, *source, *prompts, flag, "/proc/out", naming="/proc/out")


def test_json_and_markdown_are_not_mixed(refused, made):
    (made / "prompts.jsonl").write_text('{"prompt": "tea"}')
    command = ("benchmark", "--model", made / "base", "--prompts", made / "prompts.jsonl")
    refused(*command, "--json", "--markdown", naming="--json and --markdown would be mixed")


def test_places_that_cannot_be_written_are_named(tmp_path):
    check_writable(tmp_path / "new/folder")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for place in (tmp_path / "file/below", Path("/proc/nowhere"), tmp_path / ("n" * 300)):
        if place.parent.exists():
            with pytest.raises(ValueError, match="cannot be written"):
                check_writable(place)
