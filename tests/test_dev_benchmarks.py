"""The developer's benchmarks run and write what they say, on a tiny random model."""

import gc
import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlx_redrafter.decoding.state import DraftShape
from mlx_redrafter.engine import stopwatch as calibrate

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))


def run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict[str, Any]:
    """The result file of a benchmark of the tiny model."""
    output = tmp_path / "result.json"
    gc.collect()  # what other tests left behind counts as memory
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrate, "MOST_ROUNDS", 3)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--model", "tiny", "--output", str(output), *flags])
    try:
        importlib.import_module(name).main()
    except SystemExit as error:
        assert not error.code
    record: dict[str, Any] = json.loads(output.read_text())
    assert record["machine"]["chip"] and record["settings"]["model"] == "tiny"
    return record


def test_micro(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--rows", "40", "--repeats", "2", "--shapes", "2,2,6,3")
    found = run("micro", tmp_path, monkeypatch, *flags)["results"]
    names = {row["function"] for row in found}
    assert {"draft", "lookup.find", "verify", "accept", "commit", "step", "step, host only"} <= names
    assert any(name.startswith("top_k 2") for name in names) and any("top-p" in name for name in names)
    assert all(row["ms"] > 0 for row in found)


def test_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soak = importlib.import_module("soak")
    monkeypatch.setattr(soak, "FRESH", 50)
    monkeypatch.setattr(soak, "SLOWER", 100.0)  # whatever else runs meanwhile
    found = run("soak", tmp_path, monkeypatch, "--tokens", "300", "--window", "100")
    assert [window["tokens"] >= 100 * (i + 1) for i, window in enumerate(found["windows"])] == [True] * 3
    assert found["passed"] and found["memory_ratio"] < 1.05


def test_soak_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("soak_server"), "GROWTH", 100.0)  # it has just begun
    flags = ("--clients", "4", "--seconds", "3", "--asks", "8", "--words", "20", "--port", "0")
    found = run("soak_server", tmp_path, monkeypatch, *flags)
    assert found["passed"] and found["requests"] > 4 and found["tokens"]["completion"] > found["requests"]
    assert set(found["latency_seconds"]) == {"whole", "streamed", "first"} and found["resident_mb"]["end"] > 1


def test_long_context_shows_copies_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--rows", "64", "2000", "--seconds", "0.1", "--steps", "4")
    found = run("long_context", tmp_path, monkeypatch, *flags)["results"]
    assert [row["rows"] for row in found] == [64, 2000]
    plain = found[1]["shapes"][0]
    assert plain["shape"] == vars(DraftShape(0, 0)) and plain["plain_steps"] == 1
    assert 1 < plain["peak_of_weights_and_cache"] < 1.3


def test_busy_starts_and_ends_a_busy_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = importlib.import_module("busy")
    started: list[Any] = []

    def start(*args: Any) -> Any:
        started.append(subprocess.Popen(*args))
        return started[-1]

    monkeypatch.setattr(busy, "LEAST", 0.0)  # whatever else runs meanwhile
    monkeypatch.setattr(busy, "subprocess", SimpleNamespace(Popen=start))
    found = run("busy", tmp_path, monkeypatch, "--quick", "--processes", "2")
    assert found["passed"] and found["settings"]["max_tokens"] == 32
    assert [set(row) for row in found["results"]] == [{"quiet", "busy"}] * 2
    for row in found["results"]:
        for told in row.values():
            assert told["same"] and 0 <= told["speculative"] <= told["steps"] <= 31
            assert told["ratio"] == pytest.approx(told["our_tps"] / told["plain_tps"])
    assert len(started) == 4 and all(process.returncode is not None for process in started)


def test_check_compares_devices_and_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = importlib.import_module("check")
    monkeypatch.setattr(check, "SMALL", ({"hidden": 64},))
    found = run(
        "check",
        tmp_path,
        monkeypatch,
        "--texts",
        "2",
        "--tokens",
        "30",
        "--synthetic",
        "tiny",
        "--seconds",
        "0.1",
    )
    assert found["passed"] and len(found["correctness"]) == 2
    assert [row["weights"] for row in found["synthetic"]] == ["bfloat16", "4-bit"]
    assert all(row["cpu"]["differ"] == 0 for row in found["correctness"])
    assert len(found["correctness"][0]["shapes"]) > len(found["correctness"][1]["shapes"]) >= 1


def test_synthetic_models_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic = importlib.import_module("synthetic")
    monkeypatch.setattr(synthetic, "memory", lambda: 8e9)
    (row,) = synthetic.run(["8B"], ["bfloat16"], 1.0)
    assert row["left_out"].startswith("16.1 GB")
    assert "left out" in synthetic.table(row)


def test_check_finds_the_first_difference_and_how_near_it_was() -> None:
    check = importlib.import_module("check")
    logits = [mx.array([0.0, 1.0, 0.75])] * 3
    same = check.differences([([1, 2, 1], logits)], [([1, 2, 1], logits)])
    assert same == {"texts": 1, "differ": 0, "gaps": []}
    assert check.differences([([1, 1, 1], logits)], [([1, 2, 0], logits)])["gaps"] == [0.25]


def test_check_refuses_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "cuda" if importlib.import_module("check").backend.current().name != "cuda" else "cpu"
    monkeypatch.setattr(sys, "argv", ["check.py", "--expect", other])
    with pytest.raises(SystemExit, match="not " + other):
        importlib.import_module("check").main()


def test_training_prompts_are_none_that_drafters_are_measured_with() -> None:
    recipe = ROOT / "recipes/smollm2-135m-instruct/prompts.py"
    training = runpy.run_path(str(recipe))["conversations"](20000)
    held_out = (ROOT / "benchmarks/held_out.jsonl").read_text().splitlines()
    measured = [turn for line in held_out for turn in json.loads(line)["turns"]]
    assert measured and {len(turns) for turns in training} == {4}
    assert not set().union(*map(pieces, measured)) & set().union(*(pieces(t) for x in training for t in x))


def pieces(text: str, words: int = 9) -> set[tuple[str, ...]]:
    """All runs of so many words."""
    found = text.lower().split()
    return set(zip(*(found[i:] for i in range(words)), strict=False))
