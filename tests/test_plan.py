"""Sizes from memory and time, what is foretold of a run, and its learning curve."""

import itertools
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from bundles import make_folder
from models import make_model

from mlx_redrafter.commands.main import main
from mlx_redrafter.engine import backend
from mlx_redrafter.models.drafter import Drafter
from mlx_redrafter.models.target import Target
from mlx_redrafter.train import collect, curve, evaluate, forecast, plan
from mlx_redrafter.train.data import Conversation, write_shard
from mlx_redrafter.train.selfgen import Recipe
from mlx_redrafter.train.streams import Workers
from mlx_redrafter.train.trainer import Data, Settings, Shards, Trainer
from mlx_redrafter.train.work import Request, Work, read_facts

ONE = Workers(1)


@pytest.fixture(autouse=True)
def one_blas_thread(monkeypatch):
    """Tests share the cores: threads that wait for each other would take twice the time."""
    monkeypatch.setattr("mlx_redrafter.train.run.set_blas_threads", lambda count: None)


# --- What to expect ------------------------------------------------------------------------------------


def test_the_law_is_near_the_recorded_runs():
    for known, trained, found in (*forecast.RUNS, (2.92, 11.8, 1.89)):
        assert forecast.tokens_per_step(1e6 * known, 1e6 * trained) == pytest.approx(found, rel=0.1)
    for known, trained, found in forecast.RUNS:
        assert forecast.tokens_per_step(1e6 * known, 1e6 * trained) == pytest.approx(found, abs=0.02)


def test_the_law_rises_with_what_is_known_and_trained_and_has_an_end():
    amounts = np.geomspace(1, 1e12, 60)
    for other in (1e5, 1e6, 1e8):
        for values in (
            [forecast.tokens_per_step(x, other) for x in amounts],
            [forecast.tokens_per_step(other, x) for x in amounts],
        ):
            assert values == sorted(values)
            assert values[0] >= 1 and values[-1] < 1 + forecast.GAIN
    # More epochs than were measured count for nothing.
    assert forecast.tokens_per_step(1e5, 1e9) == forecast.tokens_per_step(1e5, 1e6)


@pytest.mark.parametrize(
    ("known", "trained", "said"),
    [
        (1.1e5, 6.3e5, "about 1.5 tokens per step after 30 min (1.3 to 1.6, by the kind of text;"),
        (8.9e6, 5.8e7, "about 2.0 tokens per step after 30 min (1.6 to 2.2, by the kind of text;"),
        (1e9, 5e9, "at least 1.96 tokens per step after 30 min, on chat"),
        (5e3, 4e4, "no forecast after 30 min: 40,000 positions to train on are fewer than"),
        (0, 0, "no forecast"),
    ],
)
def test_a_forecast_says_no_more_than_was_measured(known, trained, said):
    assert forecast.forecast(known, trained, 1800).startswith(said)


def a_work(folder, **facts):
    folder.mkdir()
    return Work(folder, {"goes_on": False, **facts})


@pytest.mark.parametrize(("pace", "each"), [(0.001, 0.01), (0.1, 0.001), (1e-5, 1e-5)])
@pytest.mark.parametrize("wanted", [collect.UNLIMITED, 300_000])
def test_more_time_never_promises_less(tmp_path, monkeypatch, pace, each, wanted):
    found = []
    monkeypatch.setattr(plan, "forecast", lambda known, trained, _: found.append((known, trained)) or "")
    for minutes in (5, 10, 30, 60, 240):
        work = a_work(tmp_path / str(minutes), pace=pace)
        plan.foresee_written(work, Request(seconds=60.0 * minutes), 1000, wanted, each)
    values = [forecast.tokens_per_step(*amounts) for amounts in found]
    assert len(values) == 5 and values == sorted(values)


def test_what_to_expect_is_said_once(tmp_path, capsys):
    work = a_work(tmp_path / "a", pace=1e-3)
    for _ in range(2):
        plan.foresee_written(work, Request(), 0, 2_000_000, 0.01)
    said = capsys.readouterr().out
    assert re.fullmatch(r"Forecast: about 1\.\d tokens per step after 6 h 40 min \(.*\)\.\n", said)
    plan.foresee(a_work(tmp_path / "b", goes_on=True), Request(), 1e6, 1e6, 60)
    assert capsys.readouterr().out == "Forecast: none, because it goes on from another drafter.\n"


# --- Memory --------------------------------------------------------------------------------------------

OPEN = ("rows", "batch", "exit_dim")
TALKS = Request(recipe=Recipe(batch=64), settings=Settings(), left_open=OPEN)


def sizes(tmp_path, monkeypatch, request, room):
    target = Target(make_model("llama"), (1, 2))
    monkeypatch.setattr(backend, "free_memory", lambda: room)
    monkeypatch.setattr(plan, "NARROWEST", 8)
    work = a_work(tmp_path / "work")
    found = plan.fit_machine(work, target, request, ONE, None)
    again = plan.fit_machine(work, target, request, ONE, None)  # whatever is free by then
    assert again == found
    return found.exit_dim, found.recipe.batch, found.settings.batch, found.settings.group


def test_sizes_fit_the_memory(tmp_path, monkeypatch):
    found = []
    for power in (36, 24, 21, 10):
        folder = tmp_path / str(power)
        folder.mkdir()
        found.append(sizes(folder, monkeypatch, TALKS, 1 << power))
    assert found[0] == (None, 64, 1024, 16)
    for larger, smaller in itertools.pairwise(found):
        assert all((a or 32) >= (b or 32) for a, b in zip(larger, smaller, strict=True))
    assert found[-1] == (8, 8, 256, 1)
    assert found[1][1] < 64


def test_sizes_that_were_given_stay(tmp_path, monkeypatch):
    given = replace(TALKS, left_open=(), exit_dim=24)
    assert sizes(tmp_path, monkeypatch, given, 1 << 10)[:3] == (24, 64, 1024)


def test_a_memory_limit_counts(tmp_path, monkeypatch):
    assert sizes(tmp_path, monkeypatch, replace(TALKS, memory=1024), 1 << 40) == (8, 8, 256, 1)


# --- Time ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("models") / "cycle")
    weights = dict(mx.load(str(folder / "model.safetensors")))
    weights["lm_head.weight"] = 0.1 * weights["lm_head.weight"]
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


class Clock:
    """A time that passes only where work is done, as much as it would take on some machine."""

    def __init__(self, monkeypatch, token, position, text):
        self.began = self.now = time.monotonic()
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        generate, score = collect.generate, Trainer.score
        step, decode = Trainer._step, evaluate.decode_batch

        def write(*args, progress, **kwargs):
            def after(done, total):
                self.now += token
                return progress(done, total)

            return generate(*args, progress=after, **kwargs)

        def train(trainer, features, starts):
            self.now += position * 32 * len(starts)
            return step(trainer, features, starts)

        def scored(trainer):
            self.now += position * sum(batch.left.size for batch in trainer._held_out or [])
            return score(trainer)

        def decoded(*args):
            self.now += text
            return decode(*args)

        monkeypatch.setattr(collect, "generate", write)
        monkeypatch.setattr(evaluate, "decode_batch", decoded)
        monkeypatch.setattr(Trainer, "_step", train)
        monkeypatch.setattr(Trainer, "score", scored)


FLAGS = ["--row-length", "48", "--rows", "8", "--draft-vocab", "0", "--context-layers", "--length", "2"]
FLAGS += ["--eval-tokens", "8", "--eval-shapes", "1,2", "--workers", "1", "--temp", "2"]


@pytest.mark.parametrize(
    ("token", "position", "text"), [(1.1, 0.02, 9.0), (0.3, 0.02, 3.0), (0.5, 0.002, 0.1)]
)
def test_a_run_ends_in_time_on_slow_and_fast_machines(
    model_folder, tmp_path, monkeypatch, token, position, text
):
    """Seconds of a token of all rows, of a position in training, of a batch of answers."""
    monkeypatch.setattr(collect, "SHORTEST_CUT", 24)
    monkeypatch.setattr(collect, "MEASURED", 12)
    clock, output = Clock(monkeypatch, token, position, text), tmp_path / "out"
    command = ["train", "--model", str(model_folder), "--output", str(output), "--time", "80", *FLAGS]
    assert main(command) == 0
    assert 0.5 * 80 < clock.now - clock.began < 1.03 * 80
    facts = read_facts(tmp_path / "out.train")
    assert facts["plan"]["epochs"] > 0
    assert 0 < facts["counted"]["trained"] < 1_000_000
    assert 1 <= len(facts["scores"]) <= 13
    assert facts["scores"][-1]["step"] == facts["trained"]["steps"]
    assert facts["forecast"].startswith("no forecast after 1 min: ")


@pytest.mark.parametrize(("pace", "batch"), [(1e-5, 8192), (1e-2, 1024), (0.15, 512), (1.0, 256)])
def test_a_batch_leaves_enough_steps(tmp_path, monkeypatch, pace, batch):
    """Of 28,000 seconds of training, with ten million positions known."""
    target, known = Target(make_model("llama"), ()), 10_000_000
    shards = Shards([known], lambda _: None)
    monkeypatch.setattr(plan, "Trainer", lambda *args: SimpleNamespace(score=lambda: None))
    monkeypatch.setattr(plan, "_step_time", lambda _: pace)
    drafter = Drafter(plan.drafter_config(target, Request()))
    work = a_work(tmp_path / "work", pace=pace)
    work.facts["seconds"] = 60_000.0
    request = Request(seconds=1e5)
    for left_open, wanted in ((OPEN, batch), ((), 1024)):
        asked, data = replace(request, left_open=left_open), Data(shards, shards, np.arange(9))
        work.facts.pop("plan", None)
        assert plan.fit_time(work, target, drafter, data, asked, ONE)[0].batch == wanted


# --- The curve -----------------------------------------------------------------------------------------

GIVEN = ["--data", "rows.npz", "--epochs", "3", "--batch", "64", "--eval-tokens", "0", "--workers", "1"]
GIVEN += ["--draft-vocab", "0", "--context-layers", "--length", "2"]


def given_rows():
    random = np.random.RandomState(0)
    rows = [random.randint(0, 250, 60).astype(np.int32) for _ in range(12)]
    write_shard(Path("rows.npz"), [Conversation(row, np.arange(60) > 9) for row in rows])


def test_the_curve_of_a_run_that_was_killed_is_whole(model_folder, tmp_path, monkeypatch):
    """Scores after the last checkpoint are made again when it goes on."""
    monkeypatch.chdir(tmp_path)
    given_rows()
    command = ["train", "--model", str(model_folder), *GIVEN]
    assert main([*command, "--output", "whole"]) == 0
    wanted = read_facts(Path("whole.train"))["scores"]
    assert len(wanted) >= 12 and [score["step"] for score in wanted] == sorted({x["step"] for x in wanted})
    assert [x["positions"] for x in wanted] == [64 * x["step"] for x in wanted]
    assert [x["seconds"] for x in wanted] == sorted(x["seconds"] for x in wanted)
    save, score = Trainer.save, Trainer.score

    def killed(trainer):
        if trainer.progress.step == wanted[5]["step"]:
            raise MemoryError
        if trainer.progress.step == wanted[3]["step"]:
            save(trainer, Path("parts.train/checkpoint.safetensors"))
        return score(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "score", killed)
        with pytest.raises(MemoryError):
            run_again = [*command, "--output", "parts"]
            main(run_again)
    assert len(read_facts(Path("parts.train"))["scores"]) == 5
    assert main(run_again) == 0
    found = read_facts(Path("parts.train"))["scores"]
    assert [{**x, "seconds": 0} for x in found] == [{**x, "seconds": 0} for x in wanted]
    card = Path("parts", "README.md").read_text()
    assert f"![Learning curve]({curve.NAME})" in card
    assert Path("parts", curve.NAME).read_bytes().startswith(b"\x89PNG")


def test_the_curve_shows_loss_and_tokens_per_step():
    scores = [
        {
            "step": n,
            "positions": 64 * n,
            "seconds": 60.0 * n,
            "loss": [4 / n, 5 / n],
            "tokens_per_step": 1 + n / 9,
        }
        for n in (1, 2, 3)
    ]
    figure = curve.plot(scores)
    left, right = figure.axes
    assert left.lines[0].get_xydata().tolist() == [[1, 4.5], [2, 2.25], [3, 1.5]]
    assert right.lines[0].get_ydata().tolist() == [1 + n / 9 for n in (1, 2, 3)]
    assert "192 positions" in left.get_title()


def test_training_is_not_lost_without_what_draws(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given_rows()
    monkeypatch.setattr(curve, "PACKAGE", "no_such_package")
    with pytest.warns(UserWarning, match=r"no learning curve is drawn without no_such_package: pip install"):
        assert main(["train", "--model", str(model_folder), *GIVEN, "--epochs", "1", "--output", "out"]) == 0
    assert "Learning curve" not in Path("out", "README.md").read_text()
    assert not Path("out", curve.NAME).exists()
