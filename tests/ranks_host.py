"""Starts ranks for tests: a process that has imported everything, and forks them (``test_ranks.py``).

Each line on standard input is a job as JSON; one line as JSON answers it.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import bailing_hybrid, llama, qwen2, qwen3, qwen3_moe, qwen3_next  # noqa: F401
from models import RandomDrafter, ScriptedDrafter, make_model
from tiny import make_tiny

from mlx_redrafter.commands.main import main
from mlx_redrafter.decoding.state import DraftShape
from mlx_redrafter.decoding.step import pick
from mlx_redrafter.engine import ranks as ranks_module
from mlx_redrafter.engine import step_times
from mlx_redrafter.engine.engine import Request, engine_here
from mlx_redrafter.engine.loop import Fixed
from mlx_redrafter.engine.policy import StepTimes
from mlx_redrafter.engine.runner import Runner
from mlx_redrafter.loading.split import split
from mlx_redrafter.models import recurrent
from mlx_redrafter.models.target import Target

PROMPTS = [[5, 9, 5, 9, 5, 9], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [30, 20, 30, 20, 30]]
SHAPES = [DraftShape(2, 3), DraftShape(0, 0, None, 4), DraftShape(3, 3, 6, 3), DraftShape(0, 0)]


class Turns:
    """Shapes in turn."""

    def __init__(self):
        self.count = 0

    def choose(self, rows, texts):
        self.count += 1
        return SHAPES[self.count % len(SHAPES)]

    def observe(self, *_):
        pass


class Loaded:
    """Stands in for a loaded model."""

    def __init__(self, runner):
        self.prepare = lambda: runner


def together(names):
    """A job that decodes with each of these models, and with each rank's own drafter and way to pick."""

    def run(ranks):
        runners = {}
        for number, name in enumerate(names):
            case = CASES[name]
            model = case.model()
            split(model, ranks.group, "the model")
            target = Target(model, case.layers)
            if target.is_part:
                if name == "branchless" and ranks.rank:
                    recurrent.CLOSED = {}  # how it would run its layers along a tree
                target.check(agree=ranks.first_problem)
                print(f"trees: {target.trees}", file=sys.stderr)
            make, picks = case.own(ranks.rank)
            runners[name] = Runner(target, make(target), picks, case.compiled)
            ranks.lead(runners[name])
            ranks.models[number] = Loaded(runners[name]), None
        if ranks.rank:
            return ranks.follow(None)
        print(json.dumps({name: CASES[name].texts(runner) for name, runner in runners.items()}))
        return 0

    original = ranks_module.Ranks.follow
    ranks_module.Ranks.follow = lambda self, load: (
        setattr(ranks_module.Ranks, "follow", original) or run(self)
    )
    return ranks_module.run_together(run, None)


def crowd(runner, policy=None):
    """What four texts say, which come and go."""
    engine = engine_here(runner, policy or Turns(), 4)
    said = {}

    def submit(number):
        limit = 10 + 5 * number
        request = Request(PROMPTS[number], limit, sampling(number), seed=number)
        said[engine.submit(request)] = []

    submit(0), submit(1)
    left, steps = [2, 3], 0
    dropped = engine.submit(Request(PROMPTS[0], 50))
    while engine.is_busy or left:
        for each in engine.step():
            if each.number in said:
                said[each.number] += each.tokens
        steps += 1
        if steps == 4:
            engine.cancel(dropped)
        if left and steps in (3, 6):
            submit(left.pop(0))
    engine.close()
    return [said[number] for number in sorted(said)]


def sampling(number):
    from mlx_redrafter.decoding.sampling import Sampling

    return Sampling(0.8, top_k=20) if number == 3 else Sampling()


def alone(runner):
    """The same texts, one after another in one process, plainly."""
    texts = []
    for number, prompt in enumerate(PROMPTS):
        engine = engine_here(runner, Fixed(DraftShape(0, 0)))
        engine.submit(Request(prompt, 10 + 5 * number, sampling(number), seed=number))
        text = []
        while engine.is_busy:
            for each in engine.step():
                text += each.tokens
        texts.append(text)
    return texts


def tied():
    """A model that always likes two tokens best, equally."""
    model = make_model("llama-untied")
    weights = dict(tree_flatten(model.parameters()))
    head = weights["lm_head.weight"]
    model.load_weights([("lm_head.weight", head[mx.arange(head.shape[0]) // 2 * 2])], strict=False)
    return model


def last_pick(tree, state, logits, _):
    """Picks the last of the likeliest tokens."""
    return logits, logits.shape[-1] - 1 - mx.argmax(logits[..., ::-1], axis=-1)


def asked(runner):
    """What texts say in whose steps the host has a say; one of them fails."""
    engine = engine_here(runner, Turns(), 4)

    def rather_even(tokens, logits):
        return logits - 2 * (mx.arange(logits.shape[-1]) % 2)

    def fails(tokens, logits):
        if tokens.size > 14:
            raise ValueError("enough")
        return logits

    given = [
        {},
        {"processors": [rather_even]},
        {"processors": [fails]},
        {"sampler": lambda x: mx.argmin(x, -1)},
    ]
    said = {
        engine.submit(Request(PROMPTS[2], 12, sampling(3 * (n == 1)), seed=n, **each)): []
        for n, each in enumerate(given)
    }
    while engine.is_busy:
        for each in engine.step():
            said[each.number] += [*each.tokens, *([str(each.error)] if each.error else [])]
    engine.close()
    return list(said.values())


class LayersDrafter(ScriptedDrafter):
    """Knows a text, and its place in it by the outputs of layers alone."""

    def __init__(self, target):
        whole, text = Target(gated_delta(), target.layers_read), [*PROMPTS[0]]
        for _ in range(20):
            logits, _ = whole.forward(mx.array([text]), whole.make_cache())
            text.append(int(mx.argmax(logits[0, -1])))
        super().__init__(whole, text)
        self.width = whole.embed.weight.shape[1]
        self.places = self.prepare(self.places)

    def prepare(self, context):
        return context[..., self.width :]


def with_drafts(runner):
    """A text, and how much of it was drafted in each step."""
    engine = engine_here(runner, Fixed(DraftShape(1, 3)), 4)
    engine.submit(Request(PROMPTS[0], 20))
    found = []
    while engine.is_busy:
        found += [[*each.tokens, each.drafted] for each in engine.step()]
    return found


@dataclass
class Case:
    """What ranks decode: a model, each rank's drafter and way to pick, what is said with one, and alone.

    ``layers`` are those that the drafter reads.
    """

    model: Callable
    own: Callable = lambda rank: (RandomDrafter, pick)
    compiled: bool = False
    texts: Callable = crowd
    alone: Callable = alone
    layers: tuple = ()


def gated_delta():
    """A model that mlx-lm splits by layers only; each rank gets one of each kind."""
    return make_tiny("qwen3_next", full_attention_interval=2)


def quantized():
    model = make_model("llama", hidden_size=128, head_dim=32, intermediate_size=128)
    nn.quantize(model, 64, 4)
    return model


CASES = {
    **{
        name: Case(lambda name=name: make_model(name))
        for name in ("llama", "llama-mha", "qwen2", "qwen3", "qwen3_moe")
    },
    "quantized": Case(quantized),
    "compiled": Case(lambda: make_model("llama"), compiled=True),
    "tied": Case(
        tied, lambda rank: (lambda target: RandomDrafter(target, seed=1 + rank), last_pick if rank else pick)
    ),
    "asked": Case(lambda: make_model("llama"), texts=asked, alone=asked),
    "by-layers": Case(gated_delta),
    "by-layers-compiled": Case(gated_delta, compiled=True),
    "context": Case(
        gated_delta,
        lambda rank: (LayersDrafter, pick),
        texts=with_drafts,
        alone=with_drafts,
        layers=(1, 4),
    ),
    "by-layers-asked": Case(gated_delta, texts=asked, alone=asked),
    "branchless": Case(gated_delta),
    "lightning": Case(lambda: make_tiny("bailing_hybrid")),
}


def expected(names):
    said = {}
    for name in names:
        target = Target(CASES[name].model(), CASES[name].layers)
        said[name] = CASES[name].alone(Runner(target, CASES[name].own(0)[0](target)))
    print(json.dumps(said))
    return 0


# --- Who asks a server -------------------------------------------------------------------------------------

HELLO = "the quick brown fox"
FORM = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORM = {
    "type": "json_schema",
    "json_schema": {"name": "it", "schema": {**FORM, "additionalProperties": False}},
}


def request(url, text=HELLO, **more):
    messages = [{"role": "user", "content": text}]
    body = {"model": "default", "messages": messages, "max_tokens": 16, "temperature": 0, **more}
    headers = {"Content-Type": "application/json"}
    return urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)


def ask(url, *text, **more):
    """What is answered: the text and how many tokens were known; or the status of an error."""
    try:
        with urllib.request.urlopen(request(url, *text, **more), timeout=60) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code
    known = found["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found["choices"][0]["message"]["content"], known


def stream(url, act=lambda: None, **more):
    """The last events of a stream; acts after the first one. None acts: leave."""
    with urllib.request.urlopen(request(url, stream=True, **more), timeout=60) as answer:
        answer.readline()
        if act is None:
            return []
        act()
        return [json.loads(line[6:]) for line in answer if line.startswith(b"data: {")][-1:]


def answers(url, pids):
    """Texts of all kinds, together; those of models that are loaded when asked for; an end."""
    wanted = [
        {},
        {"temperature": 1, "seed": 3, "logit_bias": {"7": 2}, "frequency_penalty": 0.5},
        {"response_format": FORM, "max_tokens": 30},
        {"draft": False, "stop": ["o"]},
    ]
    with ThreadPoolExecutor(5) as pool:
        leaving = pool.submit(stream, url, None, max_tokens=300)
        found = [done.result() for done in [pool.submit(ask, url, **each) for each in wanted]]
        found = [text for text, _ in found]  # what is known depends on who comes first
        leaving.result()
        found += [ask(url), ask(url, model="nine"), ask(url, model="only")]
        loading, healthy = pool.submit(ask, url, model="second"), 0
        while not loading.done():
            with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
                healthy += answer.status == 200 and not loading.done()
            time.sleep(0.05)
        found.append(loading.result())
    (last,) = stream(url, lambda: os.kill(pids[0], signal.SIGTERM), model="second", max_tokens=30)
    return {"said": found, "healthy": healthy, "last": last["choices"][0]["finish_reason"]}


def death(url, pids):
    """What a client hears of the death of the other rank."""
    (last,) = stream(url, lambda: os.kill(pids[1], signal.SIGKILL), max_tokens=900)
    return last


CLIENTS = {"answers": answers, "death": death}


def rank(number, job, files):
    """Be one of the ranks."""
    if number is not None:
        os.environ.update(MLX_RANK=str(number), MLX_HOSTFILE=files["hosts"])
    os.chdir(job["folders"][number or 0] if "folders" in job else ".")
    if job.get("old") == number:
        ranks_module.versions = lambda: {"mlx": "0.1"}
    if "words" in job:
        step_times.step_times = known_times if "client" in job else step_times.step_times
        return main(job["words"])
    return together(job["names"]) if number is not None else expected(job["names"])


def known_times(runner, shapes, texts=1):
    """Measuring takes time."""
    return StepTimes([0.01 + 0.001 * shape.size for shape in shapes], [0.0] * len(shapes))


def start(job, number, folder, files):
    """Fork a rank; its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{name}{number}", os.O_WRONLY | os.O_CREAT), stream)
        signal.alarm(240)
        code = rank(number, job, files)
        sys.stdout.flush()
    except SystemExit as error:
        code = error.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def run(job):
    """Do a job: exit codes, what was written, and seconds (from a signal on, if one is sent)."""
    with tempfile.TemporaryDirectory() as name:
        folder, files = Path(name), {"hosts": str(Path(name) / "hosts")}
        size = job.get("size")
        if size:
            Path(files["hosts"]).write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports(size)]))
        if "client" in job:
            import mlx_redrafter.server.run  # noqa: F401
        pids = [start(job, number, folder, files) for number in (range(size) if size else [None])]
        begun = time.monotonic()
        if "signal" in job:
            while not any(path.stat().st_size for path in folder.glob("out*")):
                time.sleep(0.05)  # until something is said
                if time.monotonic() - begun > 60:
                    break
            begun = time.monotonic()
            for number in job["to"]:
                os.kill(pids[number], getattr(signal, job["signal"]))
        heard = (
            CLIENTS[job["client"]](address(folder / f"err{0 if size else None}"), pids)
            if "client" in job
            else None
        )
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        read = {kind: [(folder / f"{kind}{n}").read_text() for n in (range(size) if size else [None])]
                for kind in ("out", "err")}  # fmt: skip
        return {"codes": codes, "seconds": time.monotonic() - begun, "heard": heard, **read}


def address(errors):
    """Where a server listens, which says so."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if errors.exists() and (found := re.search(r"Serving .* at (\S+)\n", errors.read_text())):
            return found[1]
        time.sleep(0.05)
    raise TimeoutError(errors.read_text())


def ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


if __name__ == "__main__":
    for line in sys.stdin:
        with Path(__file__).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ranks that wait for each other take all cores
            answer = run(json.loads(line))
        print(json.dumps(answer), flush=True)
