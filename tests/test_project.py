"""The projection: what it computes, and that the policy would pick what it finds best."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from mlx_redrafter.decoding.state import DraftShape

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
curves = importlib.import_module("curves")
project = importlib.import_module("project")

FOUND = [
    project.Measured(DraftShape(1, 4), (0.41, 0.16, 0.07, 0.03)),
    project.Measured(DraftShape(4, 5), (0.62, 0.29, 0.13, 0.07, 0.03)),
]
EIGHT = project.MODELS[1]


def test_speedup_is_tokens_per_step_over_its_time() -> None:
    row = project.scenario(FOUND, "M3 Max", 4, "m3-max-4bit", EIGHT)
    depth = EIGHT.drafter_bytes(4) / EIGHT.bytes_per_token(4)
    cost = curves.curve("m3-max-4bit")
    by_shape = {(s["width"], s["length"]): s["speedup"] for s in row["shapes"]}
    assert by_shape[1, 4] == pytest.approx(1.67 / (cost(5) + 4 * depth), abs=1e-3)
    assert by_shape[4, 5] == pytest.approx(2.14 / (cost(21) + depth * (1 + 4 * cost(4))), abs=1e-3)
    short = project.with_shorter(FOUND)
    fast, slow = (project.scenario(short, "M3 Max", 4, "m3-max-4bit", EIGHT, x)["speedup"] for x in (0, 200))
    assert 1 < slow < fast


def test_a_drafter_reads_what_its_tensors_have() -> None:
    h, v = 2048, 16384
    weights = 2 * h * h + h * h + 2 * h * h + h * v  # cell, state's half of the projection, blocks, head
    biases = h + h + 2 * h
    small = project.MODELS[0]
    assert small.drafter_bytes(16) == 2 * (weights + biases)
    assert small.drafter_bytes(4) == weights * 4.5 / 8 + 2 * biases


def test_shorter_lengths_follow_from_full_beams_only() -> None:
    pruned = project.Measured(DraftShape(3, 3, 8), (0.6, 0.2, 0.1))
    found = {m.shape: m.acceptance for m in project.with_shorter([*FOUND, pruned])}
    assert found[DraftShape(4, 2)] == (0.62, 0.29)
    assert DraftShape(1, 3) in found and DraftShape(3, 2) not in found


@pytest.mark.parametrize(
    ("chip", "bits", "curve"),
    [(chip, bits, c) for chip, bits, names in project.SCENARIOS for c in names if not chip.startswith("M2")],
)
def test_the_policy_picks_what_is_best_or_nearly(chip: str, bits: int, curve: str) -> None:
    row = project.scenario(project.with_shorter(FOUND), chip, bits, curve, EIGHT)
    assert row["policy_of_best"] >= 0.94, row


def test_all_scenarios_are_told_and_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "SIMULATED", 5)
    report = project.project(FOUND)
    assert {row["model"] for row in report["projections"]} == {"1B", "8B", "27B"}
    assert {row["chip"][:2] for row in report["projections"]} == {"M1", "M2", "M3", "M4", "M5"}
    assert "PROJECTION" in report["label"] and "PROJECTION" in project.table(report["projections"])
    assert "#3863" in project.sources(report["projections"])
    json.dumps(report)


def test_reads_greedy_results_of_the_first_file(tmp_path: Path) -> None:
    shape = {"width": 1, "length": 2, "nodes": None}
    rows = [
        {"file": "a", "shape": shape, "temperature": 0.0, "acceptance": [0.5, 0.25]},
        {"file": "a", "shape": shape, "temperature": 0.7, "acceptance": [0.1, 0.05]},
        {"file": "b", "shape": shape, "temperature": 0.0, "acceptance": [0.2, 0.1]},
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"results": rows}))
    (measured,) = project.read(path)
    assert measured == project.Measured(DraftShape(1, 2), (0.5, 0.25))
    assert measured.tokens_per_step == 1.75
    settings = {"beam_width": 2, "beam_length": 3, "max_nodes": 8, "lookup": 4}
    swept = {"rows": [{**settings, "acceptance": [0.6]}, settings]}
    overall = {"acceptance": [0.7]}
    path.write_text(json.dumps({"overall": overall, "settings": settings, "sweep": swept}))
    shape = DraftShape(2, 3, 8, 4)
    assert project.read(path) == [project.Measured(shape, (0.6,)), project.Measured(shape, (0.7,))]
    path.write_text(json.dumps({"overall": overall, "settings": {"beam_width": "auto"}}))
    with pytest.raises(ValueError, match="fixed draft shape"):
        project.read(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="no acceptance"):
        project.read(path)


def test_apples_own_grid_follows_from_one_of_its_columns() -> None:
    for fit in project.fits():
        for shape, error in fit.errors.items():
            if (fit.chip, fit.weights, shape) == ("M2 Ultra", "float16", (1, 1)):
                assert (
                    error < -0.1
                )  # it took longer than 1 x 2: measured while something was still warming up
            else:
                assert abs(error) < 0.1, (fit.chip, fit.weights, shape)
    assert len(project.fits()) == 6
