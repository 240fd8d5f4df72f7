"""Step times: measured, kept, read again, and told."""

import io
import json
import math
import os
import random
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from models import VOCABULARY, make_model

from mlx_redrafter.commands import tune as tune_command
from mlx_redrafter.commands.main import build_parser
from mlx_redrafter.decoding.state import DraftShape
from mlx_redrafter.engine import backend, loop
from mlx_redrafter.engine import step_times as kept
from mlx_redrafter.engine import stopwatch as calibrate
from mlx_redrafter.engine.loop import Fixed
from mlx_redrafter.engine.policy import Policy, StepTimes, policy_for
from mlx_redrafter.engine.runner import TRIALS
from mlx_redrafter.engine.step_times import candidates, make_policy, step_times
from mlx_redrafter.engine.stopwatch import LONG, SHORT, Measured, _Stopwatch, after_text, between, measure
from mlx_redrafter.model import SpeculativeModel
from mlx_redrafter.models import trial
from mlx_redrafter.models.drafter import Drafter, DrafterConfig

PLAIN = DraftShape(0, 0)
THREE = [PLAIN, DraftShape(0, 0, None, 3), DraftShape(1, 2)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of each test's own, and short calibrations."""
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrate, "MOST_ROUNDS", 3)
    monkeypatch.setattr(calibrate, "STEADY", math.inf)  # whatever else runs meanwhile
    monkeypatch.setattr(calibrate, "DOUBT", math.inf)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    return tmp_path / "step-times"


def speculative(drafter: bool = True, **changes: Any) -> SpeculativeModel:
    config = DrafterConfig(32, VOCABULARY, 48, 1, rnn=True)
    mx.random.seed(1)
    return SpeculativeModel(make_model(**changes), Drafter(config).train(False) if drafter else None)


def test_times_every_shape_in_every_round() -> None:
    model = speculative()
    measured = measure(model.prepare(), THREE)
    assert len(measured.seconds) == 3
    assert [len(times) for times in measured.rounds] == [3, 3, 3]
    assert all(0 < t < 10 for times in measured.rounds for t in times)
    assert len(measured.seconds) == 3
    assert (
        len(measure(model.prepare(), THREE, seconds=0.0).rounds[2]) == 2
    )  # in no time: as many as can be kept


def play(watch: _Stopwatch, took: Callable[[DraftShape], float]) -> list[DraftShape]:
    """The steps of a calibration; shapes are chosen one step ahead, as in the loop."""
    chosen = [watch.choose()]
    while not watch.finished:
        chosen.append(watch.choose())
        watch.observe(chosen[-2], [], took(chosen[-2]))
    return chosen[:-1]


def test_rounds_go_up_and_down_and_are_few_where_they_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "STEADY", 0.3)
    copy, draft, large = DraftShape(0, 0, None, 3), DraftShape(1, 3), DraftShape(3, 3, 8)
    up, down = [PLAIN, copy, draft, large], [large, draft, copy, PLAIN]
    watch = _Stopwatch([PLAIN, large, copy, draft], 50.0)
    twice = [shape for shape in down for _ in range(2)]  # once to settle
    assert play(watch, lambda shape: float(shape.size)) == up + twice
    assert watch.measured.rounds == [[1, 1], [8, 8], [4, 4], [4, 4]]
    watch = _Stopwatch([PLAIN, large, copy, draft], 51.0, doubt=2.0)
    chosen = play(watch, lambda shape: float(shape.size))
    assert chosen == [*up, PLAIN, *twice]  # whether the large one was worth it had to be seen


def test_rounds_that_differ_are_followed_by_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "STEADY", 0.3)
    monkeypatch.setattr(calibrate, "MOST_ROUNDS", 15)
    draft, slow = DraftShape(1, 3), iter([6.0])
    watch = _Stopwatch([PLAIN, draft], 10.0)
    play(watch, lambda shape: next(slow, 2.0) if shape == draft else 1.0)
    assert watch.measured.rounds[1] == [6, 2, 2]
    assert watch.measured.seconds == [1, 2]


def test_only_what_differs_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "STEADY", 0.3)
    monkeypatch.setattr(calibrate, "MOST_ROUNDS", 15)
    copy, draft, slow = DraftShape(0, 0, None, 3), DraftShape(1, 3), iter([9.0])
    watch = _Stopwatch([PLAIN, copy, draft], 26.5)
    steps = play(watch, lambda shape: next(slow, 2.0) if shape == copy else float(shape.size))
    twice = [draft, draft, copy, copy, PLAIN, PLAIN]
    assert steps == [PLAIN, copy, draft, *twice, PLAIN, copy]
    assert watch.measured.rounds == [[1, 1, 1], [9, 2, 2], [4, 4]]
    assert watch.measured.seconds == [1, 2, 4] and watch.measured.steady


def test_steps_that_may_be_traced_are_not_timed() -> None:
    draft, seen = DraftShape(1, 3), Counter[DraftShape]()

    def took(shape: DraftShape) -> float:
        seen[shape] += 1
        return 100.0 if seen[shape] <= TRIALS + 1 else 1.0

    watch = _Stopwatch([PLAIN, draft], 0.0, compiled=True)
    play(watch, took)
    assert watch.measured.rounds == [[1, 1], [1, 1]]


def test_what_a_slow_machine_measures_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would be measured again at every start; but it takes no more rounds than that."""
    monkeypatch.setattr(calibrate, "STEADY", 0.3)
    watch = _Stopwatch(THREE, 0.001)
    assert len(play(watch, lambda shape: float(shape.size))) == 6
    assert watch.measured.steady


def test_a_very_slow_machine_tries_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "STEADY", 0.3)
    copy, draft, tree = DraftShape(0, 0, None, 2), DraftShape(1, 3), DraftShape(3, 3, 8)
    longer, wider = DraftShape(0, 0, None, 9), DraftShape(4, 4)
    shapes = [PLAIN, wider, longer, tree, copy, draft]
    watch = _Stopwatch(shapes, 1.0, most=5.0)
    assert play(watch, lambda shape: 4.0 + shape.size) == [
        PLAIN,
        copy,
        draft,
        wider,
        wider,
        draft,
        copy,
        PLAIN,
    ]
    assert watch.measured.cut and watch.measured.steady  # so it is kept
    found = watch.measured.seconds
    assert found == [5, 21, math.inf, math.inf, 7, 8]
    assert calibrate.guessed(shapes, found) == [5, 21, 14, 12, 7, 8]
    watch = _Stopwatch(shapes, 1.0, most=5.0)  # some are tried, however long it takes
    assert play(watch, lambda shape: 9.0 * shape.size) == [PLAIN, copy, tree, tree, copy, PLAIN]
    watch = _Stopwatch(shapes, 0.01, most=5.0)
    assert {*play(watch, lambda shape: 0.01 * shape.size)} == {*shapes} and not watch.measured.cut


def test_what_takes_long_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = speculative().prepare()
    calibrate.calibrate(runner, THREE)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(trial, "UNTOLD", 0.001)
    calibrate.calibrate(runner, THREE)
    assert capsys.readouterr().err == "Measuring what a step takes (once for this machine and model) ...\n"
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(folder / "new"))  # where nothing is known
    speculative().prepare()
    told = capsys.readouterr().err
    assert told == "Trying out whether its drafts are right (once for this machine and model) ...\n"


def test_a_very_slow_machine_guesses_what_others_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "SLOW", 0.0)
    monkeypatch.setattr(calibrate, "PATIENCE", 0)
    shapes = [PLAIN, *(DraftShape(1, length) for length in range(1, 6))]
    calibration = calibrate.calibrate(speculative().prepare(), shapes)
    assert all(0 < x < math.inf for x in calibration.times.seconds)
    assert calibration.times.per_row == [0.0] * 6 and calibration.rounds == 2


def test_a_drift_within_the_rounds_cancels() -> None:
    now, shapes = 1.0, [PLAIN, DraftShape(1, 3), DraftShape(3, 3, 8)]

    def took(shape: DraftShape) -> float:
        nonlocal now
        now *= 1.02
        return now * (1 + shape.size)

    watch = _Stopwatch(shapes, 20.0)
    play(watch, took)
    plain, *others = watch.measured.seconds
    assert [other / plain for other in others] == pytest.approx([2.5, 4.5], rel=0.02)


def test_a_drift_of_the_machine_cancels() -> None:
    slower = [1.0, 2.0, 4.0, 4.0, 3.0]
    measured = Measured([[0.01 * s for s in slower], [0.015 * s for s in slower]])
    assert measured.seconds[1] / measured.seconds[0] == pytest.approx(1.5)


def test_a_busy_machine_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "STEADY", 0.3)
    assert Measured([[1, 1.1, 1], [2, 2, 2.1]]).steady
    assert Measured([[1, 1.1, 1], [2, 9, 2.1]]).steady  # a single outlier
    assert Measured([[1, 1, 1], [2, 0.1, 2.1]]).steady
    assert not Measured([[1, 1, 1], [2, 9, 4]]).steady
    assert Measured([[1.0] * 8, [2, 9, 2, 2, 2, 2, 2, 2.1]]).steady
    assert not Measured([[1.0] * 4, [2, 9, 2, 5]]).steady  # half is not enough
    assert not Measured([[1], [2]]).steady
    assert Measured([[1, 1], [2, 2.1]]).steady
    assert not Measured([[1, 1], [2, 2.4]]).steady  # two must agree more closely than three
    assert Measured([[1, 1, 1], [2, 2.4, 2]]).steady


def test_kept_and_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = speculative()
    first = step_times(model.prepare(), THREE)
    (file,) = folder.iterdir()
    known = json.loads(file.read_text())["conditions"]
    assert (
        known["chip"]
        and known["versions"]["mlx"]
        and known["weights"] == {"mlx.core.float32": known["weights"]["mlx.core.float32"]}
    )
    monkeypatch.setattr(calibrate, "measure", lambda *_: pytest.fail("measured again"))
    assert step_times(model.prepare(), THREE) == first


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"seconds": [1, 2, 3]}',
        '{"seconds": [1, 2], "per_row": [0, 0]}',
        '{"seconds": [1, 2, -3], "per_row": [0, 0, 0]}',
        '{"seconds": [null, 2, 3], "per_row": [0, 0, 0]}',
        '{"seconds": [1, 2, 3], "per_row": [0, -1, 0]}',
        '{"seconds": [1, 2, 3], "per_row": [0, 0, NaN]}',
        '{"seconds": 3, "per_row": 3}',
    ],
)
def test_a_damaged_file_is_measured_anew(folder: Path, text: str) -> None:
    model = speculative()
    step_times(model.prepare(), THREE)
    (file,) = folder.iterdir()
    file.write_text(text)
    times = step_times(model.prepare(), THREE)
    assert len(times.seconds) == 3
    assert json.loads(file.read_text())["seconds"] == times.seconds
    assert list(folder.iterdir()) == [file]  # nothing is left over
    file.write_bytes(b"\xff\xfe")
    assert len(step_times(model.prepare(), THREE).seconds) == 3


def test_every_condition_has_a_file_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step_times(speculative().prepare(), THREE)
    step_times(speculative().prepare(), THREE)  # the same model
    assert len(list(folder.iterdir())) == 1
    step_times(speculative(drafter=False).prepare(), THREE[:2])
    step_times(speculative(seed=2).prepare(), THREE)
    quantized = make_model(hidden_size=64, intermediate_size=64)
    wide = SpeculativeModel(make_model(hidden_size=64, intermediate_size=64), None)
    nn.quantize(quantized, 32, 4)
    step_times(wide.prepare(), THREE[:2])
    step_times(SpeculativeModel(quantized, None).prepare(), THREE[:2])
    monkeypatch.setattr(kept, "load_blas", lambda: "another.so")
    step_times(speculative().prepare(), THREE)
    assert len(list(folder.iterdir())) == 6


@pytest.mark.parametrize("doubt", ["rounds differ", "busy"])
def test_doubtful_times_are_used_for_an_hour(
    doubt: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if doubt == "busy":
        monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    else:
        monkeypatch.setattr(calibrate, "STEADY", -1.0)
    found = step_times(speculative().prepare(), THREE)
    assert len(found.seconds) == 3
    assert step_times(speculative().prepare(), THREE) == found
    (file,) = folder.iterdir()
    before = time.time() - 3700
    os.utime(file, (before, before))
    assert step_times(speculative().prepare(), THREE) != found


def test_works_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "file"))
    assert len(step_times(speculative().prepare(), THREE).seconds) == 3


def test_leaves_random_numbers_alone() -> None:
    model = speculative()
    mx.random.seed(5)
    wanted = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(5)
    measure(model.prepare(), THREE)
    assert mx.random.uniform(shape=(4,)).tolist() == wanted


def test_policy_of_a_model() -> None:
    policy = make_policy(speculative().prepare).of(1)
    assert isinstance(policy, Policy)
    assert list(policy.cost) == candidates(speculative().prepare())
    assert all(shape.width == 0 for shape in make_policy(speculative(drafter=False).prepare).of(1).cost)  # type: ignore[attr-defined]
    assert make_policy(speculative(drafter=False).prepare, lookup=0) == Fixed(PLAIN)


def test_on_metal_sixteen_rows_are_for_quantized_weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    metal = replace(backend.CPU, shapes=backend.METAL.shapes, in_floats=backend.METAL.in_floats)
    monkeypatch.setattr(backend, "current", lambda: metal)
    model = speculative()
    assert max(shape.size for shape in candidates(model.prepare())) == 15
    fits = lambda _, layer: isinstance(layer, nn.Linear) and layer.weight.shape[1] % 32 == 0  # noqa: E731
    nn.quantize(model.model, 32, 4, class_predicate=fits)
    quantized = {shape.size for shape in candidates(model.prepare())}
    assert {16, 32} <= quantized and 15 not in quantized


def test_a_policy_does_not_keep_its_model() -> None:
    model = speculative()
    policy, alive = model.make_policy(), weakref.ref(model)
    policy.choose(5, [1])
    del model
    assert alive() is None


def tune(monkeypatch: pytest.MonkeyPatch, *flags: str, **kwargs: Any) -> int:
    model = speculative(**kwargs)
    monkeypatch.setattr(tune_command, "load", lambda *_, **__: (model, None))
    args = build_parser().parse_args(["tune", *flags])
    return int(args.run(args))


def test_tune_says_what_was_measured_and_chosen(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(monkeypatch, "--tokens", "0") == 0
    text = capsys.readouterr().out
    assert "Chosen: " in text and "plain steps" in text
    (file,) = folder.iterdir()
    assert f"Kept in {file}." in text
    assert tune(monkeypatch, "--tokens", "0", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["shapes"][0]["plain_steps"] == 1 and record["shapes"][0]["max_nodes"] == 1
    assert record["chosen"] in record["shapes"]
    assert record["rounds"] == 3 and record["steady"]


def test_tune_says_so_where_the_machine_is_busy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "STEADY", -1.0)
    assert tune(monkeypatch, "--tokens", "0", "--seconds", "0.1") == 0
    text = capsys.readouterr().out
    assert "Run this again when it is idle." in text and "Kept" not in text


def test_tune_has_reasons_for_plain_and_for_drafting() -> None:
    rows = [
        {
            "beam_width": 0,
            "beam_length": 0,
            "lookup": 0,
            "max_nodes": 1,
            "tokens_per_step": 1,
            "plain_steps": 1,
            "speedup": 1,
        },
        {
            "beam_width": 2,
            "beam_length": 3,
            "lookup": 4,
            "max_nodes": 8,
            "tokens_per_step": 1.8,
            "plain_steps": 2,
            "speedup": 0.9,
        },
    ]
    parked = tune_command.reason({"shapes": rows, "chosen": rows[0]})
    assert (
        "plain decoding" in parked
        and "2 x 3 drafted + 4 copied, 8 nodes" in parked
        and "1.80 tokens" in parked
    )
    assert tune_command.reason({"shapes": rows, "chosen": rows[1]}).startswith("2 x 3 drafted")


def test_tune_names_what_is_used_and_not_a_trial() -> None:
    shapes = list(backend.CPU.shapes)
    times = StepTimes([0.071, 0.087, 0.102, 0.086, 0.093, 0.110, 0.140], [0.0] * 7)
    policy = policy_for(shapes, times)
    chosen = tune_command.choice(shapes, times, policy)["chosen"]
    assert chosen["speedup"] == max(policy.rate(shape) for shape in shapes)
    assert policy_for(shapes, times).choose(SHORT) != policy.current  # a trial comes first


@pytest.mark.parametrize("flags", [("--seconds", "0"), ("--tokens", "-1"), ("--lookup", "-1")])
def test_tune_refuses(monkeypatch: pytest.MonkeyPatch, flags: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="not usable"):
        tune(monkeypatch, *flags)


def test_tune_has_nothing_to_choose_without_drafter_and_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="plainly"):
        tune(monkeypatch, "--lookup", "0", drafter=False)


@pytest.mark.parametrize("first", [False, True])
def test_hopeless_shapes_are_not_timed(first: bool) -> None:
    chain, wide, wider = DraftShape(1, 2), DraftShape(4, 4, 16, 5), DraftShape(4, 4)
    seen = Counter[DraftShape]()

    def took(shape: DraftShape) -> float:  # of each row as much as of a step: a chain of D can emit D + 1
        seen[shape] += 1
        return shape.size + (100.0 if first and seen[shape] == 1 else 0.0)  # done once: no reason

    watch = _Stopwatch([PLAIN, wide, chain, wider], 1e9, doubt=1.25)
    chosen = play(watch, took)
    assert chosen.count(wide) == 2 and wider not in chosen  # tried twice, and nothing larger
    assert watch.measured.rounds[0] and watch.measured.rounds[2]
    assert watch.measured.seconds[1] == watch.measured.seconds[3] == math.inf


def test_hopeless_shapes_are_kept_as_such(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(calibrate, "DOUBT", 1e-9)
    times = step_times(speculative().prepare(), THREE)
    assert times.seconds[1:] == [math.inf, math.inf] and times.per_row[1:] == [0, 0]
    assert json.loads(next(folder.iterdir()).read_text())["seconds"][1:] == [None, None]
    assert step_times(speculative().prepare(), THREE) == times
    assert list(policy_for(THREE, times).cost) == [PLAIN]


def test_longer_texts_cost_more() -> None:
    chain, wide = DraftShape(1, 4), DraftShape(4, 4)
    times = between([PLAIN, chain, wide], [1.0, 1.5, 2.0], {PLAIN: 1.1, wide: 4.5})
    policy = policy_for([PLAIN, chain, wide], times)
    policy.choose(SHORT)
    assert [policy.cost[shape] for shape in (chain, wide)] == pytest.approx([1.5, 2.0])
    policy.choose(LONG)
    assert policy.cost[wide] == pytest.approx(4.5 / 1.1)
    assert policy.cost[chain] == pytest.approx((1.5 + 0.1 + 2.4 * 4 / 16) / 1.1)  # by its nodes
    assert policy.choose(20 * LONG) == PLAIN


def test_rounding_gives_no_negative_times() -> None:
    """Seen: -2.1e-22 seconds per row for the largest shape, which seemed to grow with nothing."""
    shapes = [PLAIN, DraftShape(0, 0, None, 3), DraftShape(2, 2, 4, 3), DraftShape(4, 4, 16, 5)]
    chance, short = random.Random(0), [1.0, 1.1, 1.2, 1.3]
    for more in (chance.uniform(0, 0.05) for _ in range(1000)):
        times = between(shapes, short, {PLAIN: 1.0 + more, shapes[-1]: 1.3})
        assert times.per_row[0] == pytest.approx(more / (LONG - SHORT)) and min(times.per_row) >= 0
        assert times.per_row[-1] == pytest.approx(0, abs=1e-18)
        policy_for(shapes, times)


@pytest.mark.parametrize("failure", [ZeroDivisionError, RuntimeError, KeyError, OSError])
def test_whatever_goes_wrong_decodes_plainly(
    monkeypatch: pytest.MonkeyPatch, failure: type[Exception]
) -> None:
    def fail(*_: Any) -> None:
        raise failure("[metal] out of order")  # not a parameter, whose traceback would keep the model

    monkeypatch.setattr(calibrate, "measure", fail)
    with pytest.warns(UserWarning, match=r"step times cannot be measured .*: decoding plainly\."):
        assert make_policy(speculative().prepare) == Fixed(PLAIN)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_a_broken_clock_decodes_plainly(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(_Stopwatch, "observe", broken(_Stopwatch.observe, seconds))
    monkeypatch.setattr(calibrate, "PATIENCE", -1)
    with pytest.warns(UserWarning, match="decoding plainly"):
        assert make_policy(speculative().prepare) == Fixed(PLAIN)


def broken(observe: Callable[..., None], seconds: float) -> Callable[..., None]:
    return lambda self, shape, ranks, took, away=0.0: observe(self, shape, ranks, seconds, away)


def test_an_interrupt_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_policy(speculative().prepare)


def folder_there(file: Path) -> None:
    file.mkdir()


def pipe_there(file: Path) -> None:
    os.mkfifo(file)  # reading it would wait for ever


def huge_there(file: Path) -> None:
    with file.open("wb") as writable:
        writable.truncate(1 << 40)


def deep_there(file: Path) -> None:
    file.write_text("[" * 100_000)


def large_number_there(file: Path) -> None:
    file.write_text('{"seconds": [1' + "0" * 400 + ', 1, 1], "per_row": [0, 0, 0]}')


@pytest.mark.parametrize("put", [folder_there, pipe_there, huge_there, deep_there, large_number_there])
def test_anything_may_be_in_the_place_of_the_file(folder: Path, put: Callable[[Path], None]) -> None:
    step_times(speculative().prepare(), THREE)
    (file,) = folder.iterdir()
    file.unlink()
    put(file)
    assert len(step_times(speculative().prepare(), THREE).seconds) == 3


@pytest.mark.parametrize("days", [-8, 8])
def test_old_times_are_measured_anew(folder: Path, days: int) -> None:
    first = step_times(speculative().prepare(), THREE)
    (file,) = folder.iterdir()
    changed = file.stat().st_mtime - days * 24 * 3600
    os.utime(file, (changed, changed))
    second = step_times(speculative().prepare(), THREE)
    assert second != first and json.loads(file.read_text())["seconds"] == second.seconds
    assert step_times(speculative().prepare(), THREE) == second


def test_works_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_REDRAFTER_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: exec('raise RuntimeError("no home")'))
    assert len(step_times(speculative().prepare(), THREE).seconds) == 3


@pytest.mark.parametrize("closed", [True, False])
def test_works_with_standard_error_closed(monkeypatch: pytest.MonkeyPatch, closed: bool) -> None:
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr("sys.stderr", stream if closed else None)
    assert len(step_times(speculative().prepare(), THREE).seconds) == 3


def test_threads_of_the_blas_are_a_condition(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However they are set: OMP_NUM_THREADS, OPENBLAS_NUM_THREADS, fewer processors."""
    for threads in (1, 2, None):
        monkeypatch.setattr(kept, "blas_threads", lambda threads=threads: threads)
        step_times(speculative().prepare(), THREE)
    assert len(list(folder.iterdir())) == 3


def test_absurd_times_are_usable() -> None:
    """On a machine that stalls, the long text may seem to take a hundred times as long, or less."""
    for long in ({PLAIN: 100.0, THREE[2]: 100.0}, {PLAIN: 0.1, THREE[2]: 0.1}, {PLAIN: 1.0}):
        times = between(THREE, [1.0, 1.1, 1.2], long)
        assert policy_for(THREE, times).choose(SHORT) in THREE


def test_a_made_up_text_fills_the_buffers() -> None:
    state = after_text(speculative().prepare(), 700)
    assert state.rows.item() == 700 and state.capacity >= 701
    assert (state.history[0, :700] >= 0).all().item()


def test_a_slow_reader_is_no_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes while the caller has a step's tokens is told apart from what the next step takes."""
    clock, times, reads = SimpleNamespace(now=0.0), list[tuple[float, float]](), loop.Batch._read

    class Watching(Fixed):
        def observe(
            self, shape: DraftShape, ranks: Mapping[int, Sequence[int]], seconds: float, away: float
        ) -> None:
            times.append((seconds, away))

    def read(*args: Any) -> Any:
        clock.now += 1.0
        return reads(*args)

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(loop.Batch, "_read", read)
    model = speculative()
    engine = model.engine(Watching(PLAIN), hand_over=lambda *_: setattr(clock, "now", clock.now + 0.5))
    engine.resume(after_text(model.prepare(), SHORT), SHORT)
    for _ in range(11):
        engine.step()
        clock.now += 5.0
    assert times[0] == (1.5, 1.5)  # the first step may be like no other: nothing is sure
    assert len(times) == 11 and set(times[1:]) == {(6.5, 5.0)}
