"""Conversations: every turn reads only what is new, and `chat` as its user meets it."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from types import SimpleNamespace

import mlx.core as mx
import pytest
from bundles import follow, make_cycle, make_drafter, make_folder, make_weights

from mlx_redrafter import DraftShape, Sampling, Session, load, stream_generate
from mlx_redrafter.commands.chat import Chat, finished_blocks
from mlx_redrafter.commands.main import build_parser
from mlx_redrafter.engine.loop import Fixed
from mlx_redrafter.loading.tokenizer import load_tokenizer
from mlx_redrafter.options import PromptOptions

SAYS = "Hé🙂好w!"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model that says SAYS after ``>``, its drafter, one that says anything, and one that never ends."""
    root = tmp_path_factory.mktemp("folders")
    base = make_folder(root / "base", SAYS)
    make_drafter(root / "drafter", base)
    make_folder(root / "random", kind="random")
    endless = make_folder(root / "endless", max_position_embeddings=1 << 18)
    config, end = json.loads((endless / "config.json").read_text()), load_tokenizer(endless).eos_token_id
    after = make_cycle(config["vocab_size"], [])
    after[after.index(end)], after[end] = after[end], end
    mx.save_safetensors(str(endless / "model.safetensors"), follow(make_weights(config), after))
    make_folder(root / "heading", f"# {SAYS}")
    for template in root.glob("*/chat_template.jinja"):
        template.write_text(template.read_text().replace("<says>", "<assistant>"))  # as usual ones have it
    return root


@pytest.fixture
def session(folders):
    return make_session(folders, PromptOptions(system_prompt="the quick brown fox"))


def make_session(folders, prompting=None):
    model, tokenizer = load(folders / "random", drafter=None)
    model.use_policy(Fixed(DraftShape(0, 0, None, 3)))
    return Session(model, tokenizer, prompting)


def said(responses):
    return "".join(response.text for response in responses)


# --- Session -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_p=0.9)])
def test_a_turn_reads_only_what_is_new(session, sampling):
    words = ["one two three", "tea", "jumps over the lazy dog"]
    read = 0  # and said, but for the last token
    for turn, text in enumerate(words):
        session.messages.append({"role": "user", "content": text})
        ids = session.encode()
        session.messages.pop()
        answer = said(session.say(text, max_tokens=12, sampling=sampling, seed=turn))
        again = stream_generate(
            session.model, session.tokenizer, ids, max_tokens=12, sampling=sampling, seed=turn
        )
        tokens = [response.token for response in again]
        assert session.tokenizer.decode(ids).count(text) == 1
        assert (session.prompt_tokens, session.cached_tokens) == (len(ids), read)
        read = len(ids) + len(tokens) - 1
        assert session.messages[-1] == {"role": "assistant", "content": answer}
        assert session._tokens == [*ids, *tokens][: len(session._tokens)]
    assert len(session.messages) == 6


def test_a_turn_renders_the_conversation_once(session, monkeypatch):
    rendered, render = [], PromptOptions.render
    monkeypatch.setattr(PromptOptions, "render", lambda *given: rendered.append(1) or render(*given))
    for turn in range(3):
        assert said(session.say("one", max_tokens=3)) and len(rendered) == turn + 1
    assert session.cached_tokens > 20


def test_an_answer_that_is_broken_off_is_kept_and_an_empty_one_is_not(session):
    answer = ""
    with contextlib.closing(session.say("one", max_tokens=50)) as responses:
        for response in responses:
            answer += response.text
            if len(answer) > 3:
                break
    assert session.messages == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": answer},
    ]
    session.model.context_length = 5
    with pytest.raises(ValueError, match="more than the model's context of 5"):
        said(session.say("two"))
    assert len(session.messages) == 2


def test_another_model_reads_everything_anew(session):
    said(session.say("one", max_tokens=5))
    session.model.model.lm_head.weight = session.model.model.lm_head.weight * 2
    mx.eval(session.model.model.parameters())
    said(session.say("two", max_tokens=5))
    assert session.cached_tokens == 0
    said(session.say("three", max_tokens=5))
    assert session.cached_tokens > 0


# --- The command -------------------------------------------------------------------------------------


@pytest.fixture
def chat(run, folders):
    """What `chat` prints for lines that are piped in."""
    models = ["--model", folders / "base", "--drafter", folders / "drafter"]

    def call(*lines, flags=()):
        code, out, err = run("chat", *models, *flags, stdin="".join(f"{x}\n" for x in lines).encode())
        return code, out.splitlines(), err

    return call


def test_piped_lines_are_answered_as_plain_text(chat):
    assert chat("one", "", "two\\", "three") == (0, [SAYS, SAYS], "")
    assert chat("one", flags=("--max-tokens", 1)) == (0, [SAYS[:1]], "")
    assert chat("one", flags=("--no-draft",)) == (0, [SAYS], "")


def test_commands(chat, folders, tmp_path):
    file = tmp_path / "conversation.jsonl"
    code, out, err = chat(
        "/stats", "/system be brief", "one", "/tokens", "/draft off", "two", "/stats", f"/save {file}",
        "/reset", "/tokens", "/drafter none", "/drafter", f"/drafter {folders / 'drafter'}",
        f"/model {folders / 'random'}", f"/load {file}", "/system", "/system none", "/draft on", "/help",
    )  # fmt: skip
    assert code == 0, err
    assert out[0] == "Nothing has been said yet."
    assert out[1:3] == ["System message: be brief", SAYS]
    assert " tokens of 1024, kept: " in out[3] and int(out[3].split()[0]) > 10
    assert out[4:6] == ["Drafting is off.", SAYS]
    assert out[6].startswith("Prompt: ") and "Drafting: 1.00 tokens per step" in out[8]
    assert out[10] == "Read: 20 of the prompt's tokens, the others were known"
    assert out[11:14] == [f"Wrote {file}.", "A new conversation.", "0 tokens of 1024, kept: " + out[13][24:]]
    assert out[14:17] == ["Drafter: none", "Drafter: none", f"Drafter: {folders / 'drafter'}"]
    assert out[17:21] == [
        f"Model: {folders / 'random'}. Drafter: none",
        "4 messages.",
        "System message: be brief",
        "System message: none",
    ]
    assert out[22] == "/help            this"
    answer = {"role": "assistant", "content": SAYS}
    assert json.loads(file.read_text()) == {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "one"},
            answer,
            {"role": "user", "content": "two"},
            answer,
        ]
    }


@pytest.mark.parametrize(
    "line, message",
    [
        ("/nothing", "/nothing is no command: /help lists them"),
        ("/draft maybe", "/draft maybe is not usable: give on or off."),
        ("/save", "/save needs a file: name one."),
        ("/load missing.jsonl", "missing.jsonl"),
        ("/model missing", "missing"),
        ("/drafter missing", "missing"),
    ],
)
def test_what_cannot_be_done(chat, line, message):
    code, out, err = chat(line)
    assert (code, out) == (2, [])
    assert message in err and len(err.splitlines()) == 1


def test_blocks_of_markdown():
    text = "# One\n\n- a\n- b\n\n```\ncode\n\nmore\n```\n\nlast"
    for place in range(len(text) + 1):
        done, rest = finished_blocks(text[:place])
        assert done + rest == text[:place]
        assert done.count("```") % 2 == 0
    assert finished_blocks(text) == (text[:-4], "last")


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(folders, monkeypatch, capsys):
    words = ["chat", "--model", folders / "endless", "--drafter", "none", "--max-tokens", "9999"]
    words += ["--beam-width", "0", "--beam-length", "0"]
    chat = Chat(build_parser("chat").parse_args([str(word) for word in words]))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    before, timer = (
        signal.getsignal(signal.SIGINT),
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)),
    )
    timer.start()
    chat.take("one")
    timer.join()
    assert signal.getsignal(signal.SIGINT) is before
    assert chat.last.finish_reason is None
    assert [message["role"] for message in chat.session.messages] == ["user", "assistant"]
    assert capsys.readouterr().out == chat.session.messages[1]["content"] + "\n"
    assert chat.session.prefixes.nbytes > 0


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, *words, **environment):
        self.end, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        settings = {"TERM": "xterm", "COLUMNS": "80", "LINES": "24", "HF_HUB_OFFLINE": "1", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlx_redrafter", *map(str, words)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={name: value for name, value in os.environ.items() if name != "NO_COLOR"} | settings,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
        )
        os.close(theirs)
        self.raw = b""

    def type(self, text):
        os.write(self.end, text.encode())

    def wait_for(self, pattern, seconds=40):
        """Read until the screen's text has it; all that was read since the last time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if select.select([self.end], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):  # it has ended
                    part = os.read(self.end, 1 << 16)
                    if b"\x1b[6n" in part:  # where is the cursor?
                        self.type("\x1b[1;1R")
                    self.raw += part
            if re.search(pattern, text := plain(self.raw)):
                self.raw = b""
                return text
        raise AssertionError(f"{pattern} is not in {plain(self.raw)!r}")


def plain(raw):
    """What a terminal is sent, without escape sequences."""
    return re.sub(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|[()].|[=>])", "", raw.decode("utf-8", "replace"))


def test_in_a_terminal_answers_are_markdown_and_ctrl_c_stops_them(folders):
    terminal = Terminal("chat", "--model", folders / "heading", "--drafter", "none", "--max-tokens", 1 << 17)
    try:
        terminal.wait_for(">>>")
        terminal.type("one\r")
        shown = terminal.wait_for(r"(?s)Hé🙂好w!.*>>>")
        assert " " * 20 + SAYS in shown and "#" not in shown  # a heading
        terminal.type(f"/model {folders / 'endless'}\r")
        terminal.wait_for(r"(?s)Model: .*>>>")
        terminal.type("two\r")
        time.sleep(1.0)
        terminal.type("\x03")
        terminal.wait_for(">>>")
        terminal.type("/stats\r")
        assert "were known" in terminal.wait_for(r"(?s)tokens per step.*>>>")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.end)
