"""Starts ranks for tests: a process that has imported everything, and forks them (``test_ranks.py``).

Each line on standard input is a job as JSON; one line as JSON answers it.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen2, qwen3, qwen3_moe  # noqa: F401
from models import RandomDrafter, make_model

from mlx_redrafter.commands.main import main
from mlx_redrafter.decoding.state import DraftShape
from mlx_redrafter.decoding.step import pick
from mlx_redrafter.engine import ranks as ranks_module
from mlx_redrafter.engine.engine import Request, engine_here
from mlx_redrafter.engine.loop import Fixed
from mlx_redrafter.engine.runner import Runner
from mlx_redrafter.loading.split import split
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


def together(model, texts, own=lambda rank: (RandomDrafter, pick), compiled=False):
    """A job that decodes with each rank's own drafter and way to pick, as ``texts`` says."""

    def job():
        def run(ranks):
            return decoding(ranks)

        def decoding(ranks):
            found = model()
            split(found, ranks.group, "the model")
            target = Target(found)
            make, picks = own(ranks.rank)
            runner = Runner(target, make(target), picks, compiled)
            ranks.lead(runner)
            ranks.models[0] = Loaded(runner), None
            if ranks.rank:
                return ranks.follow(None)
            print(json.dumps(texts(runner)))
            return 0

        original = ranks_module.Ranks.follow
        ranks_module.Ranks.follow = lambda self, load: (
            setattr(ranks_module.Ranks, "follow", original) or decoding(self)
        )
        return ranks_module.run_together(run, None)

    return job


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


def last_pick(tree, state, logits):
    """Picks the last of the likeliest tokens."""
    return logits, logits.shape[-1] - 1 - mx.argmax(logits[..., ::-1], axis=-1)


JOBS = {
    **{
        name: together(lambda name=name: make_model(name), crowd)
        for name in ("llama", "llama-mha", "qwen2", "qwen3", "qwen3_moe")
    },
    "compiled": together(lambda: make_model("llama"), crowd, compiled=True),
    "tied": together(
        tied,
        crowd,
        lambda rank: (lambda target: RandomDrafter(target, seed=1 + rank), last_pick if rank else pick),
    ),
}
MODELS = {"tied": tied, "compiled": lambda: make_model("llama")}


def expected(name):
    model = MODELS[name]() if name in MODELS else make_model(name)
    target = Target(model)
    print(json.dumps(alone(Runner(target, RandomDrafter(target)))))
    return 0


def rank(number, job, files):
    """Be one of the ranks."""
    if number is not None:
        os.environ.update(MLX_RANK=str(number), MLX_HOSTFILE=files["hosts"])
        os.chdir(job["folders"][number] if "folders" in job else ".")
    if job.get("old") == number:
        ranks_module.versions = lambda: {"mlx": "0.1"}
    if "words" in job:
        return main(job["words"])
    return JOBS[job["name"]]() if number is not None else expected(job["name"])


def start(job, number, folder, files):
    """Fork a rank; its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{name}{number}", os.O_WRONLY | os.O_CREAT), stream)
        signal.alarm(90)
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
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        read = {kind: [(folder / f"{kind}{n}").read_text() for n in (range(size) if size else [None])]
                for kind in ("out", "err")}  # fmt: skip
        return {"codes": codes, "seconds": time.monotonic() - begun, **read}


def ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
