"""``mlx-redrafter benchmark`` as a user meets it, on tiny models."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from bundles import make_drafter, make_folder
from decoding import before_the_last, everything
from mlx_lm.generate import generate_step
from models import RandomDrafter, ScriptedDrafter, make_model

from mlx_redrafter import load
from mlx_redrafter.benchmark import (
    concurrency,
    energy,
    lengths,
    machine,
    measure,
    phases,
    plots,
    report,
    sources,
    sweep,
    tables,
)
from mlx_redrafter.benchmark.contenders import mlx_lm_contender
from mlx_redrafter.conversations import Prompt
from mlx_redrafter.decoding.state import DraftShape
from mlx_redrafter.decoding.step import pick, step
from mlx_redrafter.engine.engine import Engine, Request
from mlx_redrafter.engine.loop import Fixed
from mlx_redrafter.engine.runner import Runner
from mlx_redrafter.loading.tokenizer import load_tokenizer
from mlx_redrafter.models.target import Target
from mlx_redrafter.options import DecodingOptions

ROOT = Path(__file__).parent.parent
TEXTS = ("the quick brown fox", "one two three four", "jumps over the lazy dog", "serve tea")
QUICK = ("-m", "8", "--beam-width", "2", "--beam-length", "2", "--profile", "0", "--warm-up", "2")
GROUP = {
    "prompts", "speedup", "tokens_per_step", "acceptance", "copied_tokens", "shapes", "device_waits",
    "identical", "divergence", "tps", "baseline_tps", "prompt_tps", "baseline_prompt_tps",
    "time_to_first_token", "baseline_time_to_first_token", "peak_memory_gb", "baseline_peak_memory_gb",
    "energy_per_token", "baseline_energy_per_token",
}  # fmt: skip
REPEAT = {
    "turn", "trial", "contender", "prompt_tokens", "tokens", "time_to_first_token", "seconds", "tps", "steps",
    "tokens_per_step", "acceptance", "peak_memory_gb", "energy_joules", "identical",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model that says anything, a drafter for it, and prompts; not to be changed."""
    root = tmp_path_factory.mktemp("made")
    make_drafter(root / "drafter", make_folder(root / "model", kind="random"))
    lines = [{"turns": [text, "and then?"], "category": f"kind {i % 2}"} for i, text in enumerate(TEXTS)]
    (root / "prompts.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return root


@pytest.fixture
def run(run, monkeypatch, tmp_path):
    """Run a command line in a folder of its own, on a machine that is never called busy."""
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mlx_redrafter.benchmark.session._warn_if_busy", lambda machine: None)
    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture
def benchmark(run, made):
    """``benchmark`` with a model, its drafter and prompts, which others may override."""
    usual = ["--model", made / "model", "--drafter", made / "drafter", "--prompts", made / "prompts.jsonl"]
    return lambda *arguments, **options: run("benchmark", *usual, *QUICK, *arguments, **options)


@pytest.fixture
def refused(run):
    def check(*arguments, naming="", **options):
        code, out, err = run("benchmark", *arguments, **options)
        assert (code, out) == (2, ""), (code, out, err)
        assert len(err.splitlines()) == 1, err
        assert str(naming) in err, err
        return err

    return check


def read(path):
    return json.loads(Path(path).read_text("utf-8"), parse_constant=pytest.fail)


# --- The result --------------------------------------------------------------------------------------


def test_the_result_has_what_it_promises(benchmark):
    code, out, err = benchmark("--json", "result.json", "--trials", "2")
    assert code == 0, err
    found = read("result.json")
    assert set(found["overall"]) == GROUP
    assert [set(group) for group in found["categories"].values()] == [GROUP] * 2
    assert list(found["categories"]) == ["kind 0", "kind 1"]
    assert {"chip", "os", "mlx", "mlx-lm", "git"} <= set(found["machine"])
    assert found["settings"]["max_tokens"] == 8
    assert found["settings"]["weights"] == "float32"
    assert (found["finished"], found["asked"]) == (4, 4)
    for prompt, text in zip(found["prompts"], TEXTS, strict=True):
        assert prompt["turns"] == [text, "and then?"]
        assert all(set(repeat) >= REPEAT for repeat in prompt["repeats"])
        assert len(prompt["repeats"]) == 2 * 2 * 2  # turns, trials, contenders
        assert [len(answer["tokens"]) for answer in prompt["answers"]] == [8, 8]
    assert not list(Path().glob(".mlx-redrafter-*"))  # nothing half written is left
    assert all(word in out for word in ("speed-up", "kind 0", "overall", "tokens per step", "not available"))
    assert "Measuring" in err


def test_the_summary_is_that_of_the_repeats(benchmark):
    benchmark("--json", "result.json")
    found = read("result.json")
    repeats = [repeat for prompt in found["prompts"] for repeat in prompt["repeats"]]
    for key, name in (("baseline_tps", "mlx-lm"), ("tps", "mlx-redrafter")):
        mine = [repeat for repeat in repeats if repeat["contender"] == name]
        wanted = sum(x["tokens"] - 1 for x in mine) / sum(x["seconds"] for x in mine)
        assert found["overall"][key] == pytest.approx(wanted, rel=1e-3)
    low, high = (found["overall"]["speedup"][key] for key in ("low", "high"))
    ratios = sorted(prompt["speedup"] for prompt in found["prompts"])
    assert found["overall"]["speedup"]["median"] == pytest.approx((ratios[1] + ratios[2]) / 2, rel=1e-3)
    assert ratios[0] <= low <= high <= ratios[-1]
    steps = sum(x["steps"] for x in mine)
    assert found["overall"]["tokens_per_step"] == pytest.approx(7 * len(mine) / steps, rel=1e-3)


def test_outputs_are_the_baselines(benchmark, made):
    benchmark("--json", "result.json", "--first-turns")
    found = read("result.json")
    assert found["overall"]["identical"] is True
    assert found["overall"]["divergence"]["tokens_compared"] == 8 * 4
    model, tokenizer = load(made / "model", drafter=None)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": TEXTS[0]}], add_generation_prompt=True)
    plain = [
        response.token for response in mlx_lm_contender(model, tokenizer, DecodingOptions()).answer(ids, 8)
    ]
    assert found["prompts"][0]["answers"][0]["tokens"] == plain


def test_sampled_outputs_are_not_compared(benchmark):
    code, out, _ = benchmark("--json", "result.json", "--temp", "0.8", "--top-p", "0.9", "--limit", "1")
    found = read("result.json")
    assert code == 0
    assert found["overall"]["identical"] is None
    assert {repeat["identical"] for prompt in found["prompts"] for repeat in prompt["repeats"]} == {None}
    assert "were not compared" in out


def test_a_seed_makes_sampled_answers_repeatable(made):
    model, tokenizer = load(made / "model", drafter=None)
    contender = mlx_lm_contender(model, tokenizer, DecodingOptions(temp=2.0, seed=5))
    first, second = ([response.token for response in contender.answer([1, 2, 3], 20)] for _ in range(2))
    assert first == second


def test_an_output_that_differs_is_reported(benchmark, monkeypatch):
    real = measure.time_answer

    def other(contender, *arguments):
        found = real(contender, *arguments)
        if contender.name == "mlx-redrafter":
            found.tokens[3] = (found.tokens[3] + 1) % 100
        return found

    monkeypatch.setattr(measure, "time_answer", other)
    code, out, _ = benchmark("--json", "result.json", "--limit", "1", "--first-turns")
    found = read("result.json")
    assert code == 0
    assert found["overall"]["identical"] is False
    assert found["overall"]["divergence"]["logit_gaps"][0] > 0  # the baseline took the likeliest token
    [repeat] = [x for x in found["prompts"][0]["repeats"] if not x["identical"]]
    assert repeat["divergence"]["place"] == 3
    assert "1 of 1 outputs differ" in out
    assert "please report it" in out  # it is float32


def test_a_draft_model_is_a_third_contender(benchmark, made):
    code, out, _ = benchmark("--json", "r.json", "--limit", "1", "--draft-model", made / "model")
    found = read("r.json")
    assert code == 0
    assert set(found["draft_model"]["overall"]) == GROUP
    assert found["draft_model"]["overall"]["tokens_per_step"] > 1.5  # it is the model itself
    assert found["draft_model"]["overall"]["identical"] is True
    assert [x["contender"] for x in found["prompts"][0]["repeats"][:3]] == [
        "mlx-lm", "mlx-redrafter", "mlx-lm with draft model"
    ]  # fmt: skip
    assert "mlx-lm with draft model" in out


def test_decoding_flags_mean_what_they_mean_to_generate(benchmark):
    benchmark("--json", "a.json", "--limit", "1", "--turns", "1")
    tokens = read("a.json")["prompts"][0]["answers"][0]["tokens"]
    benchmark("--json", "b.json", "--limit", "1", "--turns", "1", "--ignore-chat-template")
    benchmark("--json", "c.json", "--limit", "1", "--turns", "1", "--system-prompt", "tea")
    benchmark("--json", "d.json", "--limit", "1", "--turns", "1", "--dtype", "float16", "-m", "4")
    longer = [
        read(name)["prompts"][0]["repeats"][0]["prompt_tokens"] for name in ("a.json", "b.json", "c.json")
    ]
    assert longer[1] < longer[0] < longer[2]
    half = read("d.json")
    assert half["settings"]["weights"] == "float16"
    assert len(half["prompts"][0]["answers"][0]["tokens"]) == 4 < len(tokens)


def test_without_a_drafter(benchmark):
    code, _, err = benchmark("--json", "r.json", "--limit", "1", "--drafter", "none", "--profile", "1")
    assert code == 0, err
    assert read("r.json")["overall"]["identical"] is True
    assert read("r.json")["phases"]["shape"]["max_nodes"] == 1  # plain steps only


def test_the_automatic_choice(run, made):
    usual = ["--model", made / "model", "--drafter", made / "drafter", "--prompts", made / "prompts.jsonl"]
    code, _, err = run("benchmark", *usual, "-m", "12", "--limit", "1", "--turns", "1", "--json", "r.json")
    assert code == 0, err
    found = read("r.json")
    assert found["settings"]["shape"] == "automatic"
    assert sum(shape["steps"] for shape in found["overall"]["shapes"]) > 0
    assert found["overall"]["device_waits"] >= 0


# --- Other outputs -----------------------------------------------------------------------------------


def test_json_and_markdown_may_be_printed(benchmark):
    code, out, _ = benchmark("--json", "--limit", "1")
    assert code == 0
    assert json.loads(out)["finished"] == 1
    code, out, _ = benchmark("--markdown", "--limit", "1")
    assert out.count("|---") > 5
    assert "─" not in out


def test_numbers_stand_on_one_line():
    text = report.dumps({"a": [1, 2.345678, -3e-9], "b": {"c": ["x"], "d": []}, "e": None})
    assert '"a": [1, 2.3457, -3e-09]' in text
    assert json.loads(text) == {"a": [1, 2.3457, -3e-9], "b": {"c": ["x"], "d": []}, "e": None}


def test_markdown_of_a_table():
    table = tables.Table("T", ["", "a|b"], [["x", "1"], ["overall", "2"]], ["One.", "Two."])
    lines = [
        "T",
        "",
        "|  | a\\|b |",
        "|---|---:|",
        "| x | 1 |",
        "| **overall** | **2** |",
        "",
        "One. Two.",
        "",
    ]
    assert tables.markdown([table]) == "\n".join(lines)


def test_plots_and_markdown_are_written(benchmark):
    code, _, err = benchmark("--limit", "2", "--plots", "pictures", "--markdown", "table.md")
    assert code == 0
    assert Path("pictures/speedup.png").read_bytes().startswith(b"\x89PNG")
    assert "| **overall** |" in Path("table.md").read_text()
    assert "Wrote pictures" in err


def test_the_sweep_and_the_cost_curve(benchmark, monkeypatch):
    monkeypatch.setattr(sweep, "SIZES", (1, 2, 4))
    monkeypatch.setattr(sweep, "ROUNDS", 3)
    grid = ("--sweep-widths", "1", "2", "--sweep-lengths", "2", "--sweep-nodes", "3", "--sweep-limit", "2")
    code, out, err = benchmark(
        "--json", "r.json", "--limit", "2", "--sweep", *grid, "--cost-curve", "--lookup", "0"
    )
    assert code == 0, err
    found = read("r.json")
    rows = found["sweep"]["rows"]
    swept = {(row["beam_width"], row["beam_length"], row["max_nodes"]) for row in rows}
    assert {(1, 2, 3), (2, 2, 3), (2, 2, 5), (0, 0, 1)} <= swept  # the last is plain decoding in our loop
    assert found["sweep"]["prompts"] == 2
    best = max(rows, key=lambda row: row["speedup"]["median"])
    assert {key: best[key] for key in found["sweep"]["best"]} == found["sweep"]["best"]
    assert found["sweep"]["automatic"]["speedup"]["median"] > 0
    assert [row["tokens"] for row in found["cost_curve"]["rows"]] == [1, 2, 4]
    assert found["cost_curve"]["rows"][0]["relative"] == 1
    for name in ("sweep.png", "cost-curve.png"):  # in the usual folder
        assert Path("benchmark-plots", name).read_bytes().startswith(b"\x89PNG")
    assert "best" in out
    assert "automatic, as it goes" in out


def test_the_grid_of_a_sweep():
    shapes = sweep.Grid((1, 3), (2,), (4,), lookup=0).shapes()
    assert shapes == [DraftShape(1, 2, 3), DraftShape(3, 2, 4), DraftShape(3, 2, 7)]
    with pytest.raises(ValueError, match="width 0 is not usable"):
        sweep.Grid((0,))


def test_a_sweeps_ratios_are_to_the_plain_answers_around_it():
    shape = DraftShape(1, 1, 2)

    def taking(seconds):
        return measure.Run(list(range(11)), "", 1, 0.1, seconds, steps=5, shapes={shape: 5})

    found = [sweep.Swept([taking(2.0), taking(4.0)], {shape: taking(1.5), None: taking(1.0)})]
    summed = sweep.summarise(sweep.Grid((1,), (1,), (), 0), found)
    assert [row["speedup"]["median"] for row in summed["rows"]] == [pytest.approx(2.0)]
    assert summed["automatic"]["speedup"]["median"] == pytest.approx(3.0)
    assert (summed["automatic"]["beam_width"], summed["best"]["max_nodes"]) == (1, 2)
    table = sweep.sweep_table({"sweep": summed})
    assert table.rows[0][0] == "best, automatic choice"


def test_plain_answers_are_timed_around_the_shapes(monkeypatch):
    order = []

    def time_answer(contender, ids, *_):
        order.append((ids, contender.name))
        return measure.Run([1, 2], "", 1, 0.1, 1.0)

    monkeypatch.setattr(sweep, "time_answer", time_answer)
    plain = measure.Contender("plain", None)
    shapes, prompts = [None, DraftShape(1, 1), DraftShape(2, 1)], [[1], [2]]
    ticks = []
    found = list(
        sweep.sweep(plain, lambda shape: measure.Contender(shape, None), shapes, prompts, 2, None,
                    lambda: ticks.append(0))
    )  # fmt: skip
    wanted = [[1, name] for name in ("plain", *shapes, "plain")]
    wanted += [[2, name] for name in ("plain", *shapes[::-1], "plain")]
    assert [[ids[0], name] for ids, name in order] == wanted
    assert [len(swept.plain) for swept in found] == [2, 2]
    assert len(ticks) == 6


def test_what_was_not_measured_is_left_out_of_pictures(tmp_path):
    nothing = {"median": None, "low": None, "high": None}
    some = {"median": 1.5, "low": 1.2, "high": 1.6}
    row = {"beam_width": 1, "beam_length": 1, "max_nodes": 2, "lookup": 0, "speedup": nothing}
    found = {
        "overall": {"speedup": some}, "categories": {"a": {"speedup": nothing}},
        "machine": {"chip": "c"}, "settings": {"model": "m", "weights": "w"},
        "sweep": {"widths": [1], "lengths": [1], "budgets": [None], "lookup": 0, "rows": [row], "best": None,
                  "automatic": None},
    }  # fmt: skip
    assert [path.name for path in plots.draw(found, tmp_path / "p")] == ["speedup.png", "sweep.png"]


# --- Phases ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [(2, 3, None, 0), (1, 2, 4, 3), (0, 0, None, 3), (1, 3, None, 0), (0, 0)])
def test_timed_steps_say_what_others_say(values):
    base, prompt = make_model("llama3-rope"), [5, 9, 33, 2, 17, 60, 3]
    wanted = [token for token, _ in generate_step(mx.array(prompt), base, max_tokens=40)]
    shape, times, said = DraftShape(*values), phases.Times(), []
    target = Target(base)
    drafter = ScriptedDrafter(target, prompt + wanted)
    engine = Engine(Runner(target, drafter), Fixed(shape), hand_over=phases._Stopwatch(times))
    engine.submit(Request(prompt, 40))
    while engine.is_busy:
        said += [token for emitted in engine.step() for token in emitted.tokens]
    assert said == wanted
    steps = len(times.phases) + len(times.steps)
    assert abs(len(times.phases) - len(times.steps)) <= 1
    assert steps + phases.WARM_UP <= 40 / (1 + min(shape.width, 1) * min(shape.length, 2)) + 2


def test_phases_are_timed_one_after_another(monkeypatch):
    target, times = Target(make_model()), phases.Times()
    clock = SimpleNamespace(perf_counter=iter([0.0, 2.0, 6.0, 7.0, 10.0, 13.0]).__next__)
    monkeypatch.setattr(phases, "time", clock)
    monkeypatch.setattr(phases, "WARM_UP", 0)
    watch = phases._Stopwatch(times)
    state = before_the_last(target, [1, 2, 3])
    for _ in range(2):
        state, output = step(target, RandomDrafter(target), pick, DraftShape(2, 2), state, everything(state))
        watch(state, output)
    assert times.phases == [{"draft": 2.0, "verify": 4.0, "accept": 1.0}]
    assert times.steps == [3.0]


def test_the_profile_is_reported(benchmark):
    code, out, _ = benchmark("--json", "r.json", "--limit", "1", "--profile", "1", "-m", "24")
    found = read("r.json")["phases"]
    assert code == 0
    assert list(found["seconds"]) == ["draft", "verify", "accept"]
    assert min(found["seconds"].values()) > 0
    assert found["steps"] > 2
    assert "accept" in out
    assert "the device waits for the host" in out


def test_phases_are_compared_with_whole_steps():
    times = phases.Times([{"draft": 1.0, "verify": 2.0, "accept": 3.0}] * 2, [8.0, 4.0])
    found = phases.summarise(times, {})
    assert (found["step_seconds"], found["explained"]) == (6.0, 1.0)
    assert phases.summarise(phases.Times(), {}) is None


# --- Prompts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "turns", "given"),
    [
        ({"turns": ["a", "b"]}, 2, 1),
        ({"prompt": "a"}, 1, 1),
        ({"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant", "user")]}, 1, 4),
    ],
)
def test_every_kind_of_prompt(benchmark, line, turns, given):
    line = json.dumps(line).encode()
    code, _, err = benchmark("--prompts", "-", "--json", "r.json", stdin=line)
    assert code == 0, err
    found = read("r.json")
    assert len(found["prompts"][0]["answers"]) == turns
    assert found["categories"] == {}
    assert found["settings"]["prompts"] == "-"
    Path("prompts.jsonl").write_bytes(line)
    [prompt] = sources.load_prompts("prompts.jsonl")
    assert len(measure.turns_of(prompt)[0]) == given


def test_unusable_prompts_are_told_and_left_out(benchmark):
    Path("prompts.jsonl").write_text('{"prompt": "a"}\n{"turns": []}\n{"question": "b"}\n')
    with pytest.warns(
        UserWarning, match="prompts.jsonl: left out 1 unusable row; the first, line 2: turns is"
    ):
        code, _, err = benchmark("--prompts", "prompts.jsonl", "--json", "r.json")
    assert code == 0, err
    assert [prompt["turns"] for prompt in read("r.json")["prompts"]] == [["a"], ["b"]]


def test_evenly_spaced_prompts(benchmark):
    assert sources.sample(list(range(10)), 4) == [0, 2, 5, 7]
    assert sources.sample([1, 2], 4) == [1, 2]
    benchmark("--json", "r.json", "--limit", "2")
    assert [prompt["turns"][0] for prompt in read("r.json")["prompts"]] == [TEXTS[0], TEXTS[2]]


def test_mt_bench_comes_from_the_hub(run, made, benchmark, monkeypatch):
    asked = []

    def hub(*where, repo_type, local_files_only=False):
        asked.append((*where, repo_type))
        if local_files_only:
            raise FileNotFoundError
        return str(made / "prompts.jsonl")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    code, _, err = benchmark("--prompts", "mt-bench", "--limit", "1", "--json", "r.json")
    assert code == 0, err
    assert asked == [("lmsys/mt-bench", "data/mt_bench/question.jsonl", "space")] * 2  # kept? then got
    assert read("r.json")["settings"]["prompts"] == "mt-bench"


def test_spec_bench_has_six_tasks_and_is_kept(monkeypatch, tmp_path):
    names = ["writing", "math", "translation", "summarization", "qa", "math_reasoning", "rag"]
    lines = [
        json.dumps({"question_id": 1, "category": name, "turns": ["é"], "reference": []}) for name in names
    ]
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO("\n".join(lines).encode()))
    found = [prompt.category for prompt in sources.load_prompts("spec-bench")]
    assert len(set(found)) == 6
    assert found[0] == found[1] == "multi-turn conversation"
    monkeypatch.setattr("urllib.request.urlopen", pytest.fail)
    assert sources.load_prompts("spec-bench")[0] == Prompt(["é"], "multi-turn conversation")


@pytest.mark.parametrize("name", ["mt-bench", "spec-bench"])
def test_without_a_network_there_is_a_remedy(refused, made, monkeypatch, name):
    def fail(*_, **__):
        raise OSError("no route to host\nat all")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    monkeypatch.setattr("urllib.request.urlopen", fail)
    monkeypatch.setattr("mlx_redrafter.loading.base.load_model", pytest.fail)  # nothing may be loaded before
    refused("--model", made / "model", "--prompts", name, naming="--prompts FILE")
    assert not list(Path().rglob("*.jsonl"))


# --- Interrupts --------------------------------------------------------------------------------------


@pytest.fixture
def interrupted_at(monkeypatch):
    """Ctrl-C after so many answers."""

    def set_up(answers):
        real, count = measure.time_answer, iter(range(answers))

        def time_answer(*arguments):
            if next(count, None) is None:
                raise KeyboardInterrupt
            return real(*arguments)

        for module in (measure, sweep):
            monkeypatch.setattr(module, "time_answer", time_answer)

    return set_up


def test_an_interrupt_keeps_the_finished_prompts(benchmark, interrupted_at):
    interrupted_at(9)  # two prompts of two turns by two contenders, and one answer
    code, out, err = benchmark("--json", "r.json", "--markdown", "t.md")
    found = read("r.json")
    assert code == 130
    assert (found["finished"], found["asked"], len(found["prompts"])) == (2, 4, 2)
    assert found["overall"]["prompts"] == 2
    assert "2 of 4 prompts finished" in err
    assert "2 of 4 prompts finished" in out
    assert Path("t.md").exists()


def test_an_interrupt_before_anything_is_finished(benchmark, interrupted_at):
    interrupted_at(3)
    code, out, err = benchmark("--json", "r.json")
    assert (code, out) == (130, "")
    assert "0 of 4 prompts finished, nothing to keep" in err
    assert not Path("r.json").exists()


def test_an_interrupt_in_the_sweep_keeps_what_it_has(benchmark, interrupted_at):
    grid = ("--sweep-widths", "1", "--sweep-lengths", "2", "--sweep-nodes", "--lookup", "0")
    shapes = 1 + len(read_candidates(benchmark, grid))
    interrupted_at(4 + (shapes + 2) + 3)  # the main pass, one prompt of the sweep, and a little
    code, _, err = benchmark("--json", "r.json", "--limit", "2", "--turns", "1", "--sweep", *grid)
    found = read("r.json")
    assert code == 130
    assert found["finished"] == 2
    assert found["sweep"]["prompts"] == 1
    assert "2 of 2 prompts finished" in err


def read_candidates(benchmark, grid):
    """The shapes of a sweep."""
    assert benchmark("--json", "all.json", "--limit", "1", "--turns", "1", "--sweep", *grid)[0] == 0
    return read("all.json")["sweep"]["rows"]


def test_an_error_keeps_the_finished_prompts_too(benchmark, monkeypatch):
    real, count = measure.time_answer, iter(range(9))

    def time_answer(*arguments):
        if next(count, None) is None:
            raise ValueError("the disk is on fire")
        return real(*arguments)

    monkeypatch.setattr(measure, "time_answer", time_answer)
    code, _, err = benchmark("--json", "r.json")
    assert code == 2
    assert "on fire" in err
    assert read("r.json")["finished"] == 2


def test_a_full_disk_takes_no_figures_away(benchmark, monkeypatch):
    def full(report, path):
        raise OSError("no space left")

    monkeypatch.setattr(report, "write", full)
    code, out, err = benchmark("--json", "r.json", "--limit", "1", "--turns", "1")
    assert code == 2
    assert "overall" in out
    assert "error: no space left" in err


def test_ctrl_c_from_outside(made, tmp_path):
    command = [sys.executable, "-m", "mlx_redrafter", "benchmark", "--model", made / "model", "--drafter",
               made / "drafter", "--prompts", made / "prompts.jsonl", "--turns", "1", "--trials", "1000000",
               "-m", "8", "--beam-width", "1"]  # fmt: skip
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"MLX_REDRAFTER_CACHE": str(tmp_path)},
    )
    seen = b""
    while b"answer" not in seen:  # the bar is there
        seen += process.stderr.read1(1000)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert b"0 of 4 prompts finished" in err
    assert b"Traceback" not in err


# --- Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "naming"),
    [
        (("--limit", "0"), "--limit 0"),
        (("--turns", "-1"), "--turns -1"),
        (("--trials", "0"), "--trials 0"),
        (("--warm-up", "0"), "--warm-up 0"),
        (("--profile", "-1"), "--profile -1"),
        (("--sweep-limit", "0"), "--sweep-limit 0"),
        (("--sweep-widths", "0"), "width 0"),
        (("--max-tokens", "1"), "--max-tokens 1"),
        (("--temp", "-1"), "temperature -1"),
        (("--beam-length", "0"), "beam length 0"),
        (("--json", "nowhere/r.json"), "nowhere"),
        (("--markdown", "."), "--markdown ."),
        (("--plots", "a-file"), "a-file"),
        (("--prompts", "missing.jsonl"), "missing.jsonl"),
        (
            ("--prompts", "a-file"),
            "a-file holds nothing that can be used (1 unusable row; the first, line 1: not JSON",
        ),
        (("--drafter", "missing"), "missing"),
        (("compare", "a-file"), "compare A B"),
        (("a-file",), "compare A B"),
        (("compare", "a-file", "missing"), "a-file is not JSON"),
        (("compare", "missing", "a-file"), "missing cannot be read"),
        (("compare", "empty.json", "empty.json"), "empty.json is no result"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_loaded(refused, made, monkeypatch, flags, naming):
    Path("a-file").write_text("not JSON")
    Path("empty.json").write_text("{}")
    monkeypatch.setattr("mlx_redrafter.loading.base.load_model", pytest.fail)
    refused("--model", made / "model", "--prompts", made / "prompts.jsonl", *flags, naming=naming)


def test_what_the_model_cannot_do_is_refused_before_measuring(refused, made, monkeypatch):
    monkeypatch.setattr(measure, "time_answer", pytest.fail)
    usual = ["--model", made / "model", "--prompts", made / "prompts.jsonl"]
    refused(*usual, "--drafter", "none", "--sweep", naming="--sweep tries shapes of a drafter")
    Path("long.jsonl").write_text(json.dumps({"prompt": "tea " * 2000}))
    refused(*usual, "--drafter", "none", "--prompts", "long.jsonl", naming="prompt 1 has")


@pytest.mark.parametrize(("package", "flags"), [("rich", ()), ("matplotlib", ("--plots", "p"))])
def test_a_missing_package_is_named(refused, made, monkeypatch, package, flags):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else name)
    refused("--prompts", made / "prompts.jsonl", *flags, naming="mlx-redrafter[benchmark]")


# --- Comparing ---------------------------------------------------------------------------------------


def result(path, median, low, high, **changes):
    group = {"speedup": {"median": median, "low": low, "high": high}, "tps": 50.0}
    found = {
        "overall": group,
        "categories": {"math": group, f"only {path}": group},
        "machine": {"chip": "c", "load": median},
        "settings": {"model": "m", **changes},
    }
    Path(path).write_text(json.dumps(found))
    return path


def test_two_results_are_compared(run):
    a, b = result("a.json", 1.5, 1.4, 1.6, temp=0), result("b.json", 1.8, 1.55, 1.9, temp=1)
    c = result("c.json", 3.0, 2.5, 3.5, temp=0)
    code, out, err = run("benchmark", "compare", a, b)
    assert (code, err) == (0, "")
    assert all(
        word in out for word in ("1.50 (1.40–1.60)", "1.80 (1.55–1.90)", "1.2", "overlap", "temp: 0 (A)")
    )
    assert "apart" not in out
    _, out, _ = run("benchmark", "compare", a, c, "--markdown")
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert len(rows) == 4  # header, rule, math, overall
    assert all("apart" in row for row in rows[2:])
    assert run("benchmark", "compare", c, a, "--markdown")[1].count("apart") == 2
    assert "Only in one of them: only a.json, only c.json." in out
    assert "load" not in out


def test_the_same_result_agrees_with_itself(run):
    name = result("a.json", 1.5, 1.4, 1.6)
    assert "Same settings and machine." in run("benchmark", "compare", name, name)[1]


# --- The machine and its energy ----------------------------------------------------------------------


def test_energy_of_a_mac(monkeypatch):
    windows = []

    class Monitor:
        def begin_window(self, key):
            windows.append(key)

        def end_window(self, key):
            assert windows == [key]
            return SimpleNamespace(cpu_total_mj=1500, gpu_mj=2000, dram_mj=None, ane_mj=0)

    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", SimpleNamespace(AppleEnergyMonitor=Monitor))
    meter, name = energy.find_meter("metal")
    meter.begin()
    assert (meter.end(), name) == (3.5, "zeus-apple-silicon")


def test_energy_of_an_nvidia_gpu(monkeypatch):
    readings = iter([5, 1000, 3500])
    module = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: f"device {index}",
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetTotalEnergyConsumption=lambda device: next(readings),
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    meter, name = energy.find_meter("cuda")
    meter.begin()
    assert (meter.end(), name, meter.device) == (2.5, "nvidia-ml-py", "device 2")


def test_energy_where_there_is_none(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    meter, name = energy.find_meter("cpu")
    meter.begin()
    assert (meter.end(), name) == (None, "not available")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.find_meter("cuda")[1] == "not available (install nvidia-ml-py)"

    def broken():
        raise RuntimeError("no driver")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=broken))
    assert energy.find_meter("cuda")[1] == "not available (RuntimeError: no driver)"


def test_energy_is_told_per_token(benchmark, monkeypatch):
    meter = SimpleNamespace(begin=lambda: None, end=lambda: 14.0)
    monkeypatch.setattr("mlx_redrafter.benchmark.session.find_meter", lambda backend: (meter, "a meter"))
    _, out, _ = benchmark("--json", "r.json", "--limit", "1")
    found = read("r.json")
    assert found["overall"]["energy_per_token"] == found["overall"]["baseline_energy_per_token"] == 2.0
    assert found["settings"]["energy"] == "a meter"
    assert "not available" not in out


def test_the_commit_is_that_of_this_package_only(monkeypatch, tmp_path):
    def git(*arguments):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(machine, "PACKAGE", package)
    commit = ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "x")
    git("init")
    git(*commit)
    assert machine.git_hash() is None  # a file in another project's checkout
    git("add", ".")
    git(*commit)
    commit = machine.git_hash()
    assert len(commit) == 40
    (package / "__init__.py").write_text("changed")
    assert machine.git_hash() == f"{commit}-dirty"


# --- The package, and the README ---------------------------------------------------------------------


def test_generating_imports_nothing_of_this():
    code = (
        "import sys, mlx_redrafter.commands.main as c, mlx_redrafter.commands.generate; c.build_parser(); "
        "print([m for m in sys.modules if m.startswith(('mlx_redrafter.benchmark.', 'matplotlib'))])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout == "[]\n", found


@pytest.fixture
def readme_table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readme_table

    return readme_table


def test_tables_of_the_readme_come_from_results(readme_table, benchmark):
    benchmark("--json", "r.json", "--limit", "1")
    text = "before\n<!-- table of r.json -->\nold\n<!-- end of table -->\nafter"
    new = readme_table.filled(text, Path())
    assert "old" not in new
    assert "| **overall** |" in new
    assert new.startswith("before\n<!--")
    assert new.endswith("-->\nafter")
    assert readme_table.filled(new, Path()) == new


def test_the_readme_says_what_its_results_say(readme_table):
    text = (ROOT / "README.md").read_text("utf-8")
    assert readme_table.filled(text) == text


# --- Several texts at once ---------------------------------------------------------------------------


def test_texts_at_once_are_compared_with_mlx_lms(benchmark):
    pytest.importorskip("mlx_lm.generate_utils")  # older mlx-lm has another class
    flags = ("--concurrency", "1", "2", "--arrive-every", "0", "0.01", "--limit", "4")
    code, out, _ = benchmark("--json", "r.json", *flags)
    assert code == 0
    found = read("r.json")["concurrency"]
    assert [(row["texts"], row["arrive_every"], row["crowds"]) for row in found] == [
        (1, 0, 4), (1, 0.01, 4), (2, 0, 2), (2, 0.01, 2)
    ]  # fmt: skip
    for row in found:
        assert row["identical"]
        assert row["speedup"]["median"] > 0 and row["tps"] > 0 and row["baseline_tps"] > 0
        for who in ("", "baseline_"):
            assert 0 < row[f"{who}ttft"]["median"] <= row[f"{who}ttft"]["p95"]
            assert 0 <= row[f"{who}latency"]["median"] <= row[f"{who}latency"]["p95"]
    assert "BatchGenerator" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--concurrency", "0"), "--concurrency"),
        (("--concurrency", "99"), "--concurrency 99 needs as many prompts"),
        (("--concurrency", "1", "--arrive-every", "-1"), "--arrive-every"),
        (("--concurrency", "1", "--temp", "1"), "--concurrency needs greedy"),
    ],
)
def test_crowds_that_cannot_be_are_refused(benchmark, flags, message):
    code, _, err = benchmark("--limit", "2", *flags)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1


def test_what_is_told_of_a_crowd():
    served = concurrency.Served([[1, 2], [3]], [0.0, 1.0], [[0.5, 2.5], [2.0]])
    assert served.speed == 3 / 2.5
    assert served.waits == [0.5, 1.0]
    assert served.latencies == [2.0]


# --- Longer and longer texts -------------------------------------------------------------------------


def test_speed_up_by_length(benchmark):
    flags = ("--lengths", "40", "90", "--limit", "3", "--plots", "pictures", "--markdown", "r.md")
    code, out, err = benchmark("--json", "r.json", *flags)
    assert code == 0, err
    found = read("r.json")["lengths"]
    assert [(row["length"], row["prompts"]) for row in found] == [(40, 3), (90, 3)]
    for row in found:
        assert row["identical"]
        assert row["length"] - 6 <= row["prompt_tokens"] <= row["length"]
        for name in ("tps", "baseline_tps", "first_token", "peak_memory"):
            assert row[name] > 0
        assert row["speedup"]["low"] <= row["speedup"]["median"] <= row["speedup"]["high"]
    assert "Speed-up by length of the text" in out
    assert "| tokens before |" in Path("r.md").read_text()
    assert Path("pictures/lengths.png").read_bytes()[:4] == b"\x89PNG"


def test_text_before_prompts_comes_from_a_file_and_differs_by_prompt(made):
    tokenizer = load_tokenizer(made / "model", name="made")
    words = "the quick brown fox jumps over the lazy dog"
    encode = lambda messages: tokenizer.encode(messages[-1]["content"])  # noqa: E731
    padding = lengths.Padding(words, tokenizer, encode)
    messages = [{"role": "user", "content": "serve tea"}]
    bare = encode(messages)
    assert padding.before(messages, len(bare) - 1, 0) is None
    assert padding.before(messages, len(bare), 0) == bare
    texts = [padding.before(messages, 60, number) for number in range(3)]
    assert texts[0] != texts[1] != texts[2]
    for ids in texts:
        assert ids[-len(bare) :] == bare and 50 <= len(ids) <= 60


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lengths", "0"), "--lengths"),
        (("--lengths", "2"), "--lengths 2 is shorter than every prompt"),
        (("--lengths", "9000"), "more than the model's context"),
        (("--lengths", "40", "--temp", "1"), "--lengths needs greedy"),
        (("--padding", "x"), "--padding is the text of --lengths"),
        (("--lengths", "40", "--padding", "missing.txt"), "--padding missing.txt cannot be read"),
    ],
)
def test_lengths_that_cannot_be_are_refused(benchmark, flags, message):
    code, _, err = benchmark("--limit", "2", *flags)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
