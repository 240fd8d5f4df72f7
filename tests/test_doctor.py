"""``mlx-redrafter doctor`` finds what is wrong, says what to do, and never fails itself."""

import json
import shutil
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from bundles import make_drafter, make_folder
from test_gguf import write_model
from test_library import hub, write  # noqa: F401

from mlx_redrafter.commands import doctor
from mlx_redrafter.loading.find import DEFAULT_MODEL


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of models and drafters, not to be changed."""
    root = tmp_path_factory.mktemp("made")
    make_drafter(root / "drafter", make_folder(root / "base"))
    make_drafter(root / "other-drafter", make_folder(root / "other", kind="random"))
    write_model(root / "m.gguf", kind=2)
    return root


@pytest.fixture
def base(made, tmp_path):
    """A copy that may be spoilt."""
    return shutil.copytree(made / "base", tmp_path / "base")


@pytest.fixture
def states(run):
    """The exit code, and the findings by what was checked."""

    def call(*arguments):
        code, out, err = run("doctor", "--json", *arguments)
        assert err == ""
        told = json.loads(out)
        assert told["ok"] == (code == 0)
        for finding in told["findings"]:
            assert (finding["state"] == "ok") == (finding["remedy"] == ""), finding
        return code, {finding["check"]: finding for finding in told["findings"]}

    return call


def failing(found) -> dict[str, str]:
    return {check: finding["text"] for check, finding in found.items() if finding["state"] == "fail"}


def test_a_sound_installation(states):
    code, found = states()
    assert code == 0, found
    assert not failing(found)
    assert {"python", "mlx", "mlx-lm", "numpy", "transformers", "device", "BLAS", "hub"} <= found.keys()


def test_the_report_for_people(run, made):
    code, out, err = run("doctor", made / "base", "--drafter", made / "other-drafter")
    assert (code, err) == (1, "")
    lines = out.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("fail"))
    assert lines[place].startswith("fail  drafter: ")
    assert lines[place + 1].startswith("      -> use the drafter of this model")
    assert "\x1b" not in out


# --- The installation --------------------------------------------------------------------------------


def test_a_package_that_is_too_old_or_missing(states, monkeypatch):
    real = doctor.metadata.version

    def version(name):
        if name == "transformers":
            raise doctor.metadata.PackageNotFoundError(name)
        return "0.1" if name == "mlx-lm" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    code, found = states()
    assert code == 1
    assert failing(found).keys() == {"mlx-lm", "transformers"}
    assert "mlx-lm>=" in found["mlx-lm"]["remedy"]


def test_extras_that_are_not_installed_are_no_failure(states, monkeypatch):
    real = doctor.metadata.version

    def version(name):
        if name == "rich":
            raise doctor.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    code, found = states()
    assert code == 0
    assert "mlx-redrafter[chat]" in found["extra chat"]["text"]
    assert {"extra benchmark", "extra server"} < found.keys()


def test_a_check_that_fails_is_a_finding(states, monkeypatch):
    def fails():
        raise RuntimeError("no such device")

    monkeypatch.setattr(doctor.backend, "current", fails)
    code, found = states()
    assert code == 1
    assert "no such device" in failing(found)["device"]
    assert "hub" in found  # the others go on


class Answers(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_error(403)

    def log_message(self, *_):
        pass


def test_the_hub(states, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server = HTTPServer(("127.0.0.1", 0), Answers)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    thread = Thread(target=server.handle_request)
    thread.start()
    code, found = states()
    thread.join()
    server.server_close()
    assert (code, found["hub"]["state"]) == (0, "ok")
    code, found = states()  # it has gone
    assert (code, found["hub"]["state"]) == (0, "warn")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "file:///etc/passwd")
    code, found = states()
    assert (code, found["hub"]["state"]) == (1, "fail")


def test_a_cache_folder_that_cannot_be_written(states, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "file" / "cache"))
    code, found = states()
    assert code == 1
    [(check, _)] = failing(found).items()
    assert "file" in check
    assert "MLX_REDRAFTER_CACHE" in found[check]["remedy"]


def test_little_room_on_the_disk(states, monkeypatch):
    monkeypatch.setattr(doctor, "LITTLE", float("inf"))
    code, found = states()
    assert code == 0
    assert [finding["state"] for check, finding in found.items() if "disk" in check] == ["warn", "warn"]


# --- A model -----------------------------------------------------------------------------------------


def test_a_sound_model(states, made):
    code, found = states(made / "base", "--drafter", made / "drafter")
    assert code == 0, failing(found)
    checks = ("model", "files", "tokenizer", "chat template", "drafts", "drafter", "memory")
    assert [found[check]["state"] for check in checks] == ["ok"] * 7


def test_names_of_models_and_drafters_here(states, made):
    code, found = states("BASE", "--model-dir", made, "--drafter", "drafter")
    assert code == 0, failing(found)
    assert found["model"]["text"] == str(made / "base")
    code, found = states("base", "--model-dir", made, "--drafter", "other-drafter")
    assert failing(found).keys() == {"drafter"}


def test_a_gguf_file(states, made):
    code, found = states(made / "m.gguf")
    assert code == 0, failing(found)
    assert found["tokenizer"]["state"] == found["memory"]["state"] == "ok"
    code, found = states(made / "m.gguf", "--drafter", made / "drafter")
    assert failing(found).keys() == {"drafter"}


def test_the_default_model_is_in_a_package_here(states):
    code, found = states(DEFAULT_MODEL, "--drafter", "smollm2-135m-instruct")
    assert code == 0, failing(found)
    assert found["drafter"]["text"] == "smollm2-135m-instruct is for this model"


@pytest.mark.parametrize("name", ["someone/missing", "missing.gguf", "\0", "a" * 5000, ".."])
def test_no_such_model(states, name):
    code, found = states(name)
    assert code == 1
    assert failing(found).keys() == {"files"}


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def exchange(folder):
    write(folder, json.loads((folder / "config.json").read_text()))


def set_template(template):
    def change(folder):
        for path in folder.glob("chat_template*"):
            path.unlink()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))

    return change


SPOILT = {
    "cut": (cut, "files"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "files"),
    "config": (lambda folder: (folder / "config.json").write_text("{"), "files"),
    "other weights": (exchange, "files"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer"),
    "template": (set_template("{{ raise_exception('no') }}"), "chat template"),
    "loop": (set_template("{% for"), "chat template"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_model(states, base, name):
    spoil, check = SPOILT[name]
    spoil(base)
    code, found = states(base)
    assert code == 1
    assert failing(found).keys() == {check}


def test_a_tokenizer_of_another_model(states, tmp_path):
    code, found = states(make_folder(tmp_path / "m", kind="random", vocab_size=100))
    assert (code, failing(found).keys()) == (1, {"tokenizer"})
    assert "100 tokens" in found["tokenizer"]["text"]


def test_a_model_that_does_not_fit(states, made, monkeypatch):
    monkeypatch.setattr(doctor.backend, "free_memory", lambda: 1000)
    code, found = states(made / "base")
    assert (code, failing(found).keys()) == (1, {"memory"})
    assert "--quantize" in found["memory"]["remedy"]


@pytest.mark.parametrize(
    "arguments", [["--drafter", "d"], ["a", "b"], ["--unknown"]], ids=["no model", "two models", "flag"]
)
def test_bad_command_lines(run, arguments):
    code, out, err = run("doctor", *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
