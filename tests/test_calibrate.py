"""Step times: measured, kept, read again, and told."""

import json
import math
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from models import VOCABULARY, make_model

from mlx_redrafter import calibrate, tune_command
from mlx_redrafter.calibrate import (
    LONG,
    SHORT,
    Measured,
    _Stopwatch,
    behind_text,
    between,
    candidates,
    make_policy,
    measure,
    policy_for,
    promising,
    step_times,
)
from mlx_redrafter.cli import build_parser
from mlx_redrafter.decoding.cache import View
from mlx_redrafter.decoding.loop import Fixed
from mlx_redrafter.decoding.policy import Policy
from mlx_redrafter.decoding.sampling import Sampling
from mlx_redrafter.decoding.step import DraftShape, Output, State
from mlx_redrafter.drafter import Drafter, DrafterConfig
from mlx_redrafter.model import SpeculativeModel

PLAIN = DraftShape(0, 0)
THREE = [PLAIN, DraftShape(0, 0, None, 3), DraftShape(1, 2)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of each test's own, and short calibrations."""
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrate, "MOST_ROUNDS", 3)
    monkeypatch.setattr(calibrate, "STEADY", math.inf)  # whatever else runs meanwhile
    monkeypatch.setattr(calibrate, "DOUBT", math.inf)
    return tmp_path / "step-times"


def speculative(drafter: bool = True, **changes: Any) -> SpeculativeModel:
    config = DrafterConfig(32, VOCABULARY, 48, 1, rnn=True)
    mx.random.seed(1)
    return SpeculativeModel(make_model(**changes), Drafter(config).train(False) if drafter else None)


def test_times_every_shape_in_every_round() -> None:
    model = speculative()
    measured = measure(model, THREE)
    assert len(measured.seconds) == 3
    assert [len(times) for times in measured.rounds] == [3, 3, 3]
    assert all(0 < t < 10 for times in measured.rounds for t in times)
    assert len(measured.seconds) == 3
    assert measure(model, THREE, seconds=0.0).rounds[2]  # in no time: one round


def test_the_second_of_two_steps_is_timed_and_turns_alternate() -> None:
    watch = _Stopwatch(THREE, 100.0, measured=Measured([[] for _ in THREE]))
    chosen = [watch.choose()]
    took = {(shape, second): random.random() for shape in THREE for second in (0, 1)}
    while not watch.finished:
        chosen.append(watch.choose())  # one step ahead, as the loop does
        step = len(chosen) - 2
        watch.observe(chosen[step], [], took[chosen[step], step % 2])
    backwards = [shape for shape in reversed(THREE) for _ in range(2)]
    forwards = [shape for shape in THREE for _ in range(2)]
    assert chosen[:-1] == backwards + forwards + backwards
    for shape, times in zip(THREE, watch.measured.rounds, strict=True):
        assert times == pytest.approx([took[shape, 1]] * 3)


def test_a_drift_of_the_machine_cancels() -> None:
    slower = [1.0, 2.0, 4.0, 4.0, 3.0]
    measured = Measured([[0.01 * s for s in slower], [0.015 * s for s in slower]])
    assert measured.seconds[1] / measured.seconds[0] == pytest.approx(1.5)


def test_a_busy_machine_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "STEADY", 0.3)
    assert Measured([[1, 1.1, 1], [2, 2, 2.1]]).steady
    assert not Measured([[1, 1.1, 1], [2, 9, 2.1]]).steady
    assert Measured([[1.0] * 8, [2, 9, 2, 2, 2, 2, 2, 2.1]]).steady  # a single outlier of many
    assert not Measured([[1], [2]]).steady


def test_kept_and_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = speculative()
    first = step_times(model, THREE)
    (file,) = folder.iterdir()
    known = json.loads(file.read_text())["conditions"]
    assert (
        known["chip"]
        and known["versions"]["mlx"]
        and known["weights"] == {"mlx.core.float32": known["weights"]["mlx.core.float32"]}
    )
    monkeypatch.setattr(calibrate, "measure", lambda *_: pytest.fail("measured again"))
    assert step_times(model, THREE) == first


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
    step_times(model, THREE)
    (file,) = folder.iterdir()
    file.write_text(text)
    times = step_times(model, THREE)
    assert len(times.seconds) == 3
    assert json.loads(file.read_text())["seconds"] == times.seconds
    assert list(folder.iterdir()) == [file]  # nothing is left over
    file.write_bytes(b"\xff\xfe")
    assert len(step_times(model, THREE).seconds) == 3


def test_every_condition_has_a_file_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step_times(speculative(), THREE)
    step_times(speculative(), THREE)  # the same model
    assert len(list(folder.iterdir())) == 1
    step_times(speculative(drafter=False), THREE[:2])
    step_times(speculative(seed=2), THREE)
    quantized = make_model(hidden_size=64, intermediate_size=64)
    wide = SpeculativeModel(make_model(hidden_size=64, intermediate_size=64), None)
    nn.quantize(quantized, 32, 4)
    step_times(wide, THREE[:2])
    step_times(SpeculativeModel(quantized, None), THREE[:2])
    monkeypatch.setattr(calibrate, "load_blas", lambda: "another.so")
    step_times(speculative(), THREE)
    assert len(list(folder.iterdir())) == 6


def test_unsteady_times_are_used_but_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "STEADY", -1.0)
    assert len(step_times(speculative(), THREE).seconds) == 3
    assert not folder.exists()


def test_works_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "file"))
    assert len(step_times(speculative(), THREE).seconds) == 3


def test_leaves_random_numbers_alone() -> None:
    model = speculative()
    mx.random.seed(5)
    wanted = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(5)
    measure(model, THREE)
    assert mx.random.uniform(shape=(4,)).tolist() == wanted


def test_policy_of_a_model() -> None:
    policy = make_policy(speculative())
    assert isinstance(policy, Policy)
    assert list(policy.cost) == candidates(speculative())
    assert all(shape.width == 0 for shape in make_policy(speculative(drafter=False)).cost)  # type: ignore[attr-defined]
    assert make_policy(speculative(drafter=False), lookup=0) == Fixed(PLAIN)


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


@pytest.mark.parametrize("flags", [("--seconds", "0"), ("--tokens", "-1"), ("--lookup", "-1")])
def test_tune_refuses(monkeypatch: pytest.MonkeyPatch, flags: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="not usable"):
        tune(monkeypatch, *flags)


def test_tune_has_nothing_to_choose_without_drafter_and_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="plainly"):
        tune(monkeypatch, "--lookup", "0", drafter=False)


def test_hopeless_shapes_are_not_timed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(calibrate, "DOUBT", 1.25)
    monkeypatch.setattr(calibrate, "SECONDS", 1e9)
    clock = 0.0
    model = speculative()
    run = model.runner(Sampling())

    def slow(shape: DraftShape, state: State, shown: View) -> tuple[State, Output]:
        nonlocal clock
        clock += 2.0 * shape.size  # each row costs as much as a step: a chain of D can emit D + 1
        return run(shape, state, shown)

    monkeypatch.setattr(model, "runner", lambda sampling: slow)
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: clock)
    wide = DraftShape(4, 4, 16, 5)  # 16 rows for 6 tokens at most
    assert promising(model, [PLAIN, wide, DraftShape(1, 2), DraftShape(4, 4)], 20) == [
        PLAIN,
        DraftShape(1, 2),
    ]
    times = step_times(model, [PLAIN, wide])
    assert times.seconds[1] == math.inf
    assert json.loads(next(folder.iterdir()).read_text())["seconds"][1] is None
    assert step_times(model, [PLAIN, wide]) == times
    assert list(policy_for([PLAIN, wide], times).cost) == [PLAIN]


def test_longer_texts_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = Measured([[1.0] * 3, [1.5] * 3]), Measured([[1.1] * 3, [3.3] * 3])
    times = between(short, long)
    policy = policy_for([PLAIN, DraftShape(1, 4)], times)
    policy.choose(SHORT)
    assert policy.cost[DraftShape(1, 4)] == pytest.approx(1.5)
    policy.choose(LONG)
    assert policy.cost[DraftShape(1, 4)] == pytest.approx(3.0)
    assert policy.choose(20 * LONG) == PLAIN


def test_a_made_up_text_fills_the_buffers() -> None:
    state = behind_text(speculative(), 700)
    assert state.length.item() == 700 and state.cache.capacity >= 701
    assert (state.history[0, :700] >= 0).all().item()
