"""Drafters on the hub: published, found by themselves, and no server's answer holds up a generation.

A local server speaks the hub's API to the real client.
"""

import base64
import contextlib
import json
import os
import subprocess
import sys
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlsplit

import pytest
from bundles import make_drafter, make_folder
from test_bundle import CONFIG, identity, weights_of

from mlx_redrafter import load
from mlx_redrafter.commands import train as train_command
from mlx_redrafter.loading import find, hub_drafters
from mlx_redrafter.loading.base import load_base
from mlx_redrafter.loading.hub import check_upload
from mlx_redrafter.loading.library import library
from mlx_redrafter.loading.search import downloads, search_drafter
from mlx_redrafter.models.bundle import load_drafter
from mlx_redrafter.models.identity import TAG, identity_of
from mlx_redrafter.models.save import write_drafter
from mlx_redrafter.train import run as training
from mlx_redrafter.train.card import Facts, model_card

ME, COMMIT = identity(1), "0123456789" * 4
SLOW = hub_drafters.MOMENT + 2  # seconds; the rest is this machine's, which may be busy; servers take 5
LIST, REPO = "/api/models", "someone/drafter"
JSON, WEIGHTS = (
    f"/{REPO}/resolve/{revision}" for revision in ("main/config.json", f"{COMMIT}/model.safetensors")
)


class Server:
    """What is at each path: bytes, or a function of the handler; keeps what was asked for."""

    def __init__(self):
        self.at, self.asked, self.tokens = {}, [], []
        self.open = True

        class Handler(BaseHTTPRequestHandler):
            def answer(handler):
                path, query = urlsplit(handler.path).path, urlsplit(handler.path).query
                self.asked.append((path, parse_qs(query)))
                self.tokens.append(handler.headers.get("authorization"))
                handler.body = handler.rfile.read(int(handler.headers.get("content-length") or 0))
                there = self.at.get(path)
                with contextlib.suppress(OSError):  # the client went away
                    there(handler) if callable(there) else give(handler, there)
                handler.close_connection = True

            do_GET = do_POST = answer

            def log_message(handler, *words):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *words: None
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def paths(self):
        return [path for path, _ in self.asked]

    def close(self):
        self.open = False
        self.http.shutdown()
        self.http.server_close()


def give(handler, body, status=200, **headers):
    handler.send_response(404 if body is None else status)
    for name, value in {"content-length": len(body or b""), "x-repo-commit": COMMIT, **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body or b"")


def start(handler, *headers):
    handler.send_response(200)
    for name, value in headers:
        handler.send_header(name, value)
    handler.end_headers()


def endless(handler):
    start(handler)
    while True:
        handler.wfile.write(b"[" * 65536)


def endless_redirect(handler):
    handler.send_response(302)
    handler.send_header("location", LIST)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x" * 65536)


def silent(handler):
    time.sleep(5)


def dripping(handler, count=100, pause=0.05):
    start(handler, ("content-length", "1000000"))
    for _ in range(count):
        handler.wfile.write(b"[")
        handler.wfile.flush()
        time.sleep(pause)


def dripping_headers(handler):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    for number in range(50):
        handler.wfile.write(f"x-{number}: y\r\n".encode())
        handler.wfile.flush()
        time.sleep(0.1)


def compressed(handler):
    import zlib

    packed = zlib.compressobj(9, zlib.DEFLATED, 31)
    body = packed.compress(b"[" * (1 << 24)) + packed.flush()
    give(handler, body, **{"content-encoding": "gzip"})


def redirect(to):
    return lambda handler: give(handler, b"", 302, location=to)


def huge(handler):
    start(handler, ("content-length", str(50 << 30)))
    while True:
        handler.wfile.write(b"x" * 65536)


def stalling(handler):
    start(handler, ("content-length", "5000"))
    handler.wfile.write(b"x" * 1000)
    handler.wfile.flush()
    time.sleep(5)


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = Server()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(find, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)
    yield server
    server.close()


@pytest.fixture
def made(tmp_path, server):
    """A drafter's config as the server has it; and the drafter is listed."""
    write_drafter(tmp_path / "made", CONFIG, weights_of(), ME)
    server.at[LIST] = json.dumps([{"id": REPO, "tags": ME.tags()}]).encode()
    server.at[JSON] = (tmp_path / "made/config.json").read_bytes()
    server.at[WEIGHTS] = (tmp_path / "made/model.safetensors").read_bytes()
    return json.loads(server.at[JSON])


def timed(who=ME):
    began = time.monotonic()
    return search_drafter(who), time.monotonic() - began


def test_found_checked_and_kept(server, made, capsys):
    folder, _ = timed()
    assert folder == downloads() / REPO
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert load_drafter(folder, ME).config == CONFIG
    assert server.paths == [LIST, JSON, WEIGHTS]  # the weights of the commit whose config.json was read
    assert server.asked[0][1]["filter"] == [TAG, "redrafter-32x50"]  # a local model's name is not told
    assert set(server.tokens) == {"Bearer hf_secret"}
    assert REPO in capsys.readouterr().err
    assert search_drafter(ME) == folder and len(server.asked) == 3  # it is on this machine now
    assert [entry.name for entry in library() if entry.is_drafter] == [REPO]


def test_a_repository_is_looked_for_by_its_name_first(server, made):
    who = identity(1)
    who = type(who)(**{**vars(who), "name": "org/Model"})
    listed = server.at[LIST]
    server.at[LIST] = lambda handler: give(handler, listed if "base_model" in handler.path else b"[]")
    assert search_drafter(who) is not None
    assert [query["filter"] for path, query in server.asked if path == LIST] == [
        [TAG, "base_model:org/Model"]
    ]


def test_a_download_elsewhere_does_not_take_the_token_along(server, made, monkeypatch):
    other = Server()
    other.at["/blob"] = server.at[WEIGHTS]
    server.at[WEIGHTS] = redirect(f"{other.url}/blob")
    assert search_drafter(ME) is not None
    assert other.tokens == [None]
    other.close()


def test_drafters_of_other_models_are_not_downloaded(server, made):
    other = identity(2)
    server.at[LIST] = json.dumps([{"id": REPO}, {"id": "x/y", "tags": other.tags()}]).encode()
    made["mlx_redrafter"]["base"] = vars(other)
    server.at[JSON] = json.dumps(made).encode()
    assert search_drafter(ME) is None
    assert server.paths == [LIST, JSON]  # and x/y tells by its tags that it is another's
    assert search_drafter(ME) is None and len(server.asked) == 2  # for a day


def test_the_answer_that_there_is_none_is_old_after_a_day(server, made, monkeypatch):
    listed, server.at[LIST] = server.at[LIST], b"[]"
    assert search_drafter(ME) is None
    server.at[LIST] = listed
    assert search_drafter(ME) is None
    for note in Path(os.environ["MLX_REDRAFTER_CACHE"]).rglob("*.json"):
        os.utime(note, (time.time() - 90_000,) * 2)
    assert search_drafter(ME) is not None


@pytest.mark.parametrize(
    "listing",
    [
        b"",
        b"no JSON",
        b"\xff\xfe",
        b"[" * 100_000,
        b"5",
        b'{"error": "x"}',
        b'[1, null, [], {"id": 5}, {"id": "../../etc"}, {"id": "a/b/c"}, {"id": "a/b", "tags": 7}]',
        b'[{"id": "a/..", "tags": [null, {}]}]',
        None,
        endless,
        endless_redirect,
        compressed,
        huge,
        redirect(LIST),
        redirect("file:///etc/passwd"),
        redirect("http://"),
        silent,
        dripping,
        dripping_headers,
    ],
)
def test_hostile_lists(server, listing):
    server.at[LIST] = listing
    found, seconds = timed()
    assert found is None and seconds < SLOW
    before = len(server.asked)
    found, seconds = timed()
    assert (
        found is None and seconds < hub_drafters.MOMENT and len(server.asked) == before
    )  # not again for an hour


@pytest.mark.parametrize(
    "config",
    [
        None,
        b"no JSON",
        b"[]",
        b"{}",
        b'{"a":' * 100_000,
        {"mlx_redrafter": 5},
        {"mlx_redrafter": {"base": None}},
        {"mlx_redrafter": {"base": {**vars(ME), "more": 1}}},
        {"mlx_redrafter": {"base": {**vars(ME), "embedding_digest": [1]}}},
        {"model_type": "llama"},
        {"hidden_size": 64},
        {"num_draft_layers": 10**9},
        {"exit_dim": 10**9},
        {"exit_dim": 10**4000},
        endless,
        silent,
    ],
)
def test_hostile_configs(server, made, config):
    server.at[JSON] = json.dumps({**made, **config}).encode() if isinstance(config, dict) else config
    found, seconds = timed()
    assert found is None and seconds < SLOW
    assert WEIGHTS not in server.paths


@pytest.mark.parametrize(
    "weights",
    [None, b"", b"no weights" * 50, endless, huge, silent, stalling, dripping],
)
def test_hostile_weights(server, made, weights):
    server.at[WEIGHTS] = weights
    with pytest.warns(
        UserWarning, match="someone/drafter has a drafter for this model, but it cannot be used"
    ):
        found, seconds = timed()
    assert found is None and seconds < SLOW
    assert not list(downloads().rglob("*.safetensors"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert search_drafter(ME) is None  # not again for an hour


def test_a_slow_download_goes_on_as_long_as_it_does_not_stand_still(server, made, monkeypatch):
    monkeypatch.setattr(hub_drafters, "LEAST_RATE", 8 << 10)
    whole = server.at[WEIGHTS]

    def slow(handler):
        start(handler, ("content-length", str(len(whole))))
        for at in range(0, len(whole), len(whole) // 8):
            handler.wfile.write(whole[at : at + len(whole) // 8])
            handler.wfile.flush()
            time.sleep(0.2)

    server.at[WEIGHTS] = slow
    found, seconds = timed()
    assert found is not None and seconds > 1.4


def test_nobody_is_asked(server, made, monkeypatch):
    monkeypatch.setenv("MLX_REDRAFTER_SEARCH", "off")
    assert search_drafter(ME) is None
    monkeypatch.delenv("MLX_REDRAFTER_SEARCH")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert search_drafter(ME) is None
    assert server.asked == []


def test_nothing_listens(server, monkeypatch):
    server.close()
    found, seconds = timed()
    assert found is None and seconds < SLOW


def test_one_in_the_hubs_cache_is_found(server, tmp_path):
    snapshot = tmp_path / "hub/models--me--mine/snapshots" / COMMIT
    write_drafter(snapshot, CONFIG, weights_of(), ME)
    write_drafter(tmp_path / ".lmstudio/models/me/other", CONFIG, weights_of(), identity(2))
    assert search_drafter(ME) == snapshot
    assert server.asked == []


def test_a_damaged_one_that_nobody_asked_for_is_left(server, tmp_path):
    base = make_folder(tmp_path / "base")
    folder = make_drafter(downloads() / "me/mine", base)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="decoding without the drafter that was found: .*model.safetensors"):
        model, _ = load(str(base))
    assert model.drafter is None


def test_generate_with_the_hubs_drafter(server, tmp_path):
    """As a user does, by environment variables alone."""
    base = make_folder(tmp_path / "base")
    folder = make_drafter(tmp_path / "drafter", base)
    server.at[LIST] = json.dumps([{"id": REPO, "tags": ["mlx-redrafter"]}]).encode()
    server.at[JSON] = (folder / "config.json").read_bytes()
    server.at[WEIGHTS] = (folder / "model.safetensors").read_bytes()
    words = [sys.executable, "-m", "mlx_redrafter", "generate", "--model", str(base), "--json", "-m", "8"]
    setting = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **setting})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["settings"]["drafting"] and REPO in done.stderr


@pytest.fixture
def listed(server, run, tmp_path):
    """The rows of ``mlx-redrafter models`` for a model on this machine, of which the hub has a drafter."""
    base = make_folder(tmp_path / "models/base")
    tags = identity_of(load_base(base)[0]).tags()
    others = [
        {"id": "x/y", "tags": identity(2).tags()},
        {"id": "x/z", "tags": [TAG]},
        {"id": "../x", "tags": tags},
    ]
    server.at[LIST] = json.dumps([*others, {"id": REPO, "tags": ["base_model:me/base", *tags]}]).encode()

    def call(*flags):
        code, out, err = run("models", "--json", "--model-dir", tmp_path / "models", *flags)
        assert (code, err) == (0, "")
        return [(row["name"], row["drafter"], row["drafter_at"]) for row in json.loads(out)["models"]]

    return call


def test_models_names_the_drafter_that_the_hub_has(server, listed, run, tmp_path):
    make_folder(tmp_path / "models/unlike", kind="random", hidden_size=128)
    assert listed() == [("base", REPO, "hub"), ("unlike", None, None)]
    assert server.paths == [LIST]  # for all models at once, and nothing is told of them
    assert server.asked[0][1]["filter"] == [TAG]
    assert f"{REPO} (hub)" in run("models", "--model-dir", tmp_path / "models")[1]
    make_drafter(tmp_path / "models/its", tmp_path / "models/base")
    assert listed()[0] == ("base", "its", "local")


def test_models_does_not_ask_the_hub_without_need(server, listed, tmp_path, monkeypatch):
    assert listed("--offline") == [("base", None, None)]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert listed() == [("base", None, None)]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    make_drafter(tmp_path / "models/its", tmp_path / "models/base")
    assert listed() == [("base", "its", "local")]
    assert server.asked == []


@pytest.mark.parametrize(
    "listing",
    [b"", b"[" * 100_000, b"5", b'[1, {"id": 5}, {"id": "a/b", "tags": 7}]', None, endless, silent, dripping],
)
def test_models_leaves_a_hub_out_that_does_not_answer(server, listed, listing):
    server.at[LIST] = listing
    began = time.monotonic()
    assert listed() == [("base", None, None)]
    assert time.monotonic() - began < SLOW


# --- Publishing ----------------------------------------------------------------------------------------


USER = {"name": "me", "orgs": [{"name": "org"}], "auth": {"accessToken": {"role": "write"}}}


def accept(server):
    """Have the server take uploads; they are in the list that is returned, as (name, bytes)."""
    taken = []

    def commit(handler):
        for line in map(json.loads, handler.body.splitlines()):
            if line["key"] == "file":
                taken.append((line["value"]["path"], base64.b64decode(line["value"]["content"])))
        url = f"{server.url}/me/drafter/commit/{COMMIT}"
        give(handler, json.dumps({"success": True, "commitOid": COMMIT, "commitUrl": url}).encode())

    def preupload(handler):
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
            for file in json.loads(handler.body)["files"]
        ]
        give(handler, json.dumps({"files": files}).encode())

    answers = {
        "/api/whoami-v2": USER,
        "/api/repos/create": {"url": f"{server.url}/me/drafter", "name": "me/drafter"},
        "/api/validate-yaml": {"errors": [], "warnings": []},
    }
    server.at |= {path: json.dumps(answer).encode() for path, answer in answers.items()}
    server.at |= {
        "/api/models/me/drafter/preupload/main": preupload,
        "/api/models/me/drafter/commit/main": commit,
    }
    return taken


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """``train`` writes a drafter without training."""

    def train(model, tokenizer, request, output, *rest):
        card = model_card(Facts("org/base", request.upload_repo, tags=ME.tags()))
        write_drafter(output, CONFIG, weights_of(), ME, card=card)
        return {}

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(train_command.models, "load", lambda *words, **options: (None, None))
    monkeypatch.chdir(tmp_path)


def test_a_trained_drafter_is_published_with_its_card(server, trained, run):
    taken = accept(server)
    code, out, err = run("train", "--output", "mine", "--upload-repo", "me/drafter")
    assert (code, out.splitlines()[-1]) == (0, "Uploaded to https://huggingface.co/me/drafter"), err
    files = dict(taken)
    assert set(files) == {"README.md", "config.json", "model.safetensors"}
    front = files["README.md"].decode().split("---\n")[1]
    for line in ("library_name: mlx-redrafter", "base_model: org/base", *(f"- {tag}" for tag in ME.tags())):
        assert line in front.splitlines()
    assert "--drafter me/drafter" in files["README.md"].decode()
    assert (
        json.loads(files["config.json"])["mlx_redrafter"]["base"]["embedding_digest"] == ME.embedding_digest
    )


@pytest.mark.parametrize("fails", ["/api/repos/create", "/api/models/me/drafter/commit/main"])
def test_what_was_trained_is_there_when_publishing_fails(server, trained, run, tmp_path, fails):
    accept(server)
    server.at[fails] = lambda handler: give(handler, b'{"error": "Forbidden"}', 403)
    code, out, err = run("train", "--output", "mine", "--upload-repo", "me/drafter")
    assert code == 2 and "Wrote mine" in out
    assert "mine is trained, but uploading it to me/drafter failed (" in err
    assert "`hf upload me/drafter mine`" in err and err.count("\n") == 1
    assert load_drafter(tmp_path / "mine", ME).config == CONFIG


@pytest.mark.parametrize(
    ("repo", "user", "complaint"),
    [
        ("a b", USER, "'a b' is not the name of a Hugging Face repository"),
        ("you/drafter", USER, "me is not you"),
        ("me/drafter", {**USER, "auth": {"accessToken": {"role": "read"}}}, "me may only read"),
        ("me/drafter", {}, "does not say who you are"),
        ("me/drafter", None, "does not say who you are"),
    ],
)
def test_who_may_not_publish_is_told_before_the_work(server, trained, run, tmp_path, repo, user, complaint):
    accept(server)
    server.at["/api/whoami-v2"] = None if user is None else json.dumps(user).encode()
    code, _, err = run("train", "--output", "mine", "--upload-repo", repo)
    assert code == 2 and complaint in err and err.count("\n") == 1
    assert not (tmp_path / "mine").exists()


def test_no_token_is_told(server, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(ValueError, match="does not say who you are .*hf auth login") as told:
        check_upload("me/drafter")
    assert "\n" not in str(told.value)


def test_an_organisation_may_be_published_to(server):
    accept(server)
    check_upload("org/drafter")
    check_upload("drafter")


# --- Starting from what is known -----------------------------------------------------------------------


def test_a_fine_tuned_model_starts_from_the_drafter_of_its_base(server, tmp_path, capsys):
    write_drafter(tmp_path / "shipped/one", CONFIG, weights_of(), ME)
    tuned = type(ME)(**{**vars(ME), "name": "me/tuned"})
    work, auto = training.Work(tmp_path / "w"), training.Request(start_from="auto")
    assert training._start(auto, tuned, work).config == CONFIG
    assert "--start-from none starts from nothing." in capsys.readouterr().out
    assert work.facts == {"start": str(tmp_path / "shipped/one")}
    assert training._start(training.Request(start_from="none"), tuned, training.Work(tmp_path / "w")) is None
    assert training._start(auto, ME, training.Work(tmp_path / "w")) is None  # another one for that very model
    assert training._start(auto, ME, work).config == CONFIG  # a run goes on as it began
    (tmp_path / "shipped/one").rename(tmp_path / "gone")
    server.at[LIST] = b"[]"
    assert training._start(auto, tuned, training.Work(tmp_path / "w")) is None
