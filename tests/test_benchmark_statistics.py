"""Statistics on synthetic timings whose answers are known."""

import itertools
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_redrafter.benchmark import measure, statistics
from mlx_redrafter.benchmark.compare import agree
from mlx_redrafter.benchmark.measure import Asked, Contender, Divergence, Plan, Repeat, Run
from mlx_redrafter.benchmark.statistics import Interval, interval, ratio, summary
from mlx_redrafter.conversations import Prompt
from mlx_redrafter.decoding.state import DraftShape

NAMES = ("plain", "ours")


def run(seconds, tokens=11, **rest):
    return Run(list(range(tokens)), "", prompt_tokens=20, first=0.5, seconds=seconds, **rest)


def asked(*trials, number=0, category=""):
    """A prompt of one turn: for each trial, seconds for ten tokens of both contenders."""
    repeats = [
        Repeat(0, trial, name, run(seconds))
        for trial, pair in enumerate(trials)
        for name, seconds in zip(NAMES, pair, strict=True)
    ]
    return Asked(number, Prompt(["?"], category), repeats)


def summed(prompts, exact=True):
    return summary(prompts, "ours", "plain", exact)


# --- Intervals ---------------------------------------------------------------------------------------


def test_equal_values_have_an_interval_of_no_width():
    assert interval([1.5] * 7) == Interval(1.5, 1.5, 1.5)
    assert interval([2.0]) == Interval(2.0, 2.0, 2.0)
    assert interval([]) == Interval(None, None, None)


def test_the_interval_of_three_values():
    # Both middle draws are the least (or largest) value with probability 7/27: far more than 2.5 %.
    assert interval([3.0, 1.0, 2.0]) == Interval(2.0, 1.0, 3.0)


def test_the_interval_of_many_values():
    found = interval(np.arange(101.0).tolist())  # the median's standard error is about 50 / sqrt(101) = 5
    assert found.median == 50
    assert found.low == pytest.approx(40, abs=2)
    assert found.high == pytest.approx(60, abs=2)


def test_the_interval_holds_the_true_median_about_19_times_in_20(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    samples = np.random.default_rng(0).lognormal(sigma=0.3, size=(200, 40))  # the median is 1
    found = [interval(sample.tolist()) for sample in samples]
    assert 0.9 <= np.mean([x.low <= 1 <= x.high for x in found]) <= 0.99


# --- Ratios and sums ---------------------------------------------------------------------------------


def test_the_ratio_is_the_median_over_trials():
    prompt = asked((2.0, 1.0), (4.0, 2.5), (10.0, 1.0))  # 2, 1.6, 10: the last was disturbed
    assert ratio(prompt, "ours", "plain") == pytest.approx(2.0)


def test_turns_count_by_their_tokens():
    prompt = asked((2.0, 1.0))
    prompt.repeats += [
        Repeat(1, 0, "plain", run(30.0, tokens=101)),
        Repeat(1, 0, "ours", run(21.0, tokens=101)),
    ]
    assert ratio(prompt, "ours", "plain") == pytest.approx((110 / 22) / (110 / 32))


def test_answers_of_one_token_have_no_ratio():
    short = Asked(0, Prompt(["?"]), [Repeat(0, 0, name, run(0.0, tokens=1)) for name in NAMES])
    assert ratio(short, "ours", "plain") is None
    found = summed([short])
    assert found["speedup"] == {"median": None, "low": None, "high": None}
    assert found["tps"] is None
    assert summed([short, asked((3.0, 1.0))])["speedup"]["median"] == pytest.approx(3)


def test_a_group_is_summed_up():
    found = summed([asked((2.0, 1.0)), asked((3.0, 1.0)), asked((4.0, 1.0))])
    assert found["prompts"] == 3
    assert found["speedup"] == pytest.approx({"median": 3, "low": 2, "high": 4})
    assert found["tps"] == pytest.approx(30 / 3)
    assert found["baseline_tps"] == pytest.approx(30 / 9)
    assert found["prompt_tps"] == pytest.approx(60 / 1.5)
    assert found["baseline_time_to_first_token"] == 0.5
    assert found["tokens_per_step"] == 1.0  # nothing was drafted
    assert (found["energy_per_token"], found["device_waits"], found["acceptance"]) == (None, None, [])


def test_steps_weigh_what_is_said_of_them():
    shapes = DraftShape(1, 1), DraftShape(2, 2)
    first = run(1.0, steps=5, accepted=(4.0,), waited=0.1, copied=2, joules=3.0, shapes={shapes[0]: 5})
    second = run(
        3.0, tokens=21, steps=15, accepted=(6.0, 3.0), waited=0.1, shapes={shapes[1]: 14, shapes[0]: 1}
    )
    prompt = Asked(0, Prompt(["?"]), [Repeat(0, 0, "ours", first), Repeat(1, 0, "ours", second)])
    found = summed([prompt])
    assert found["tokens_per_step"] == pytest.approx(30 / 20)
    assert found["acceptance"] == pytest.approx([0.5, 0.15])
    assert found["device_waits"] == pytest.approx(0.2 / 4)
    assert found["energy_per_token"] == pytest.approx(0.3)  # of the answer whose energy is known
    assert found["copied_tokens"] == 2
    assert [(x["beam_width"], x["steps"]) for x in found["shapes"]] == [(2, 14), (1, 6)]


def test_divergences_are_counted_per_token():
    prompt = asked((2.0, 1.0))
    prompt.repeats.append(Repeat(1, 0, "ours", run(1.0), Divergence(8, 0.25)))
    found = summed([prompt])
    assert found["identical"] is False
    assert found["divergence"] == {
        "outputs": 2,
        "diverged": 1,
        "tokens_compared": 11 + 8 + 1,
        "per_1000_tokens": 50.0,
        "logit_gaps": [0.25],
    }
    assert summed([asked((2.0, 1.0))])["identical"] is True
    sampled = summed([prompt], exact=False)
    assert (sampled["identical"], sampled["divergence"]) == (None, None)


# --- Measuring ---------------------------------------------------------------------------------------


class Machine:
    """A clock that contenders move on, and a machine that gets slower."""

    def __init__(self, slower=0.0, noise=0.0):
        self.now, self.slower, self.noise = 0.0, slower, noise
        self.random = np.random.default_rng(1)
        self.asked = []

    def perf_counter(self):
        return self.now

    def contender(self, name, seconds, tokens=range(1, 12), text="yes"):
        """Takes ``seconds`` per token on the machine as it is at first."""

        def answer(ids, max_tokens):
            self.asked.append((name, ids))
            for i, token in enumerate(tokens[:max_tokens]):
                noise = self.random.normal(1, self.noise)
                self.now += seconds * (1 + self.slower * self.now) * noise
                logits = mx.arange(20.0)
                yield SimpleNamespace(
                    token=token, text=text if i == 0 else "", from_draft=False, logprobs=logits
                )

        return Contender(name, answer)


@pytest.fixture
def machine(monkeypatch):
    def make(**how):
        machine = Machine(**how)
        monkeypatch.setattr(measure, "time", machine)
        return machine

    return make


class NoMeter:
    def begin(self):
        pass

    def end(self):
        return None


def ask(plan, prompts, tick=lambda: None):
    return list(measure.measure(plan, prompts, NoMeter(), tick))


def encode(messages):
    return [len(message["content"]) for message in messages]


def test_speed_is_that_of_the_tokens_after_the_first(machine):
    machine = machine()
    plan = Plan([machine.contender("plain", 0.5), machine.contender("ours", 0.25)], encode, 11)
    [found] = ask(plan, [Prompt(["?"])])
    plain, ours = found.runs("plain")[0], found.runs("ours")[0]
    assert (plain.first, plain.seconds, plain.generated) == (0.5, 5.0, 10)
    assert (ours.seconds, ours.text) == (2.5, "yes")
    assert summed([found])["speedup"]["median"] == 2.0


def test_a_drift_of_the_machine_cancels(machine):
    machine = machine(slower=0.01)
    plan = Plan([machine.contender("plain", 1.0), machine.contender("ours", 0.5)], encode, 11)
    found = ask(plan, [Prompt(["?"])] * 8)
    ratios = [ratio(prompt, "ours", "plain") for prompt in found]
    assert machine.now > 200  # it became more than three times as slow
    assert max(abs(r - 2) for r in ratios) > 0.03  # single ones are off, one way or the other
    assert summed(found)["speedup"]["median"] == pytest.approx(2, rel=0.01)


def test_runs_agree_within_their_intervals(machine):
    found = []
    for seed in range(10):
        noisy = machine(noise=0.2)
        noisy.random = np.random.default_rng(seed)
        plan = Plan([noisy.contender("plain", 1.0), noisy.contender("ours", 0.7)], encode, 11)
        found.append(summed(ask(plan, [Prompt(["?"])] * 30)))
    assert len({group["speedup"]["median"] for group in found}) == 10
    assert sum(agree(a, b) for a, b in itertools.combinations(found, 2)) >= 43  # of 45
    assert sum(x["speedup"]["low"] <= 1 / 0.7 <= x["speedup"]["high"] for x in found) >= 8


def test_contenders_take_turns_and_get_the_same_conversation(machine):
    machine = machine()
    names = ("plain", "ours", "other")
    contenders = [machine.contender(name, 1.0, text=name * 2) for name in names]
    ticks = []
    plan = Plan(contenders, encode, 3, trials=2)
    found = ask(plan, [Prompt(["one", "seven"]), Prompt(["three"])], lambda: ticks.append(0))
    assert [name for name, _ in machine.asked] == [*names, *names[::-1]] * 3
    histories = [ids for _, ids in machine.asked[::6]]
    assert histories == [[3], [3, len("plainplain"), 5], [5]]  # the baseline's answer is the history
    assert len(ticks) == len(machine.asked) == sum(len(prompt.repeats) for prompt in found) == 18
    assert plan.runs_per_turn == 6
    assert {(r.turn, r.trial) for r in found[0].repeats} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_the_history_is_the_first_answer(machine):
    machine, texts = machine(), iter("abcd")
    plain = machine.contender("plain", 1.0)

    def answer(ids, max_tokens):
        for response in plain.answer(ids, max_tokens):
            response.text = next(texts) if response.text else ""
            yield response

    contenders = [Contender("plain", answer)]
    seen = []
    ask(
        Plan(contenders, lambda messages: seen.append(list(messages)) or [1], 3, trials=2),
        [Prompt(["x", "y"])],
    )
    assert [message["content"] for message in seen[1]] == ["x", "a", "y"]


def test_turns_may_be_limited(machine):
    machine = machine()
    contenders = [machine.contender("plain", 1.0)]
    prompts = [Prompt(["a", "b", "c"])]
    assert len(ask(Plan(contenders, encode, 3, turns=2), prompts)[0].repeats) == 2
    assert len(ask(Plan(contenders, encode, 3, longest=4), prompts)[0].repeats) == 2  # the third has 5 tokens
    assert len(ask(Plan(contenders, encode, 3, longest=5), prompts)[0].repeats) == 3


def test_messages_are_one_turn(machine):
    machine = machine()
    messages = [{"role": role, "content": "x" * n} for n, role in enumerate(("user", "assistant", "user"), 1)]
    [found] = ask(Plan([machine.contender("plain", 1.0)], encode, 3), [Prompt(["x", "xxx"], "", messages)])
    assert machine.asked == [("plain", [1, 2, 3])]
    assert len(found.repeats) == 1


@pytest.mark.parametrize(
    ("tokens", "divergence"),
    [
        (range(1, 12), None),
        ((1, 2, 3, 9, 5), Divergence(3, 4.0 - 9.0)),
        (range(1, 6), Divergence(5, None)),  # it ends there
    ],
)
def test_outputs_are_compared_while_measuring(machine, tokens, divergence):
    machine = machine()
    contenders = [machine.contender("plain", 1.0), machine.contender("ours", 1.0, tokens)]
    for exact in (True, False):
        [found] = ask(Plan(contenders, encode, 11, exact=exact), [Prompt(["?"])])
        by_name = {repeat.contender: repeat.divergence for repeat in found.repeats}
        assert by_name == {"plain": None, "ours": divergence if exact else None}


def test_warming_up_is_everybodys(machine):
    machine = machine()
    plan = Plan([machine.contender(name, 1.0) for name in NAMES], encode, 11)
    measure.warm_up(plan, [1], 4)
    assert [name for name, _ in machine.asked] == list(NAMES)
    assert machine.now == 8  # seconds: four tokens each


def test_drafts_of_mlx_lm_are_counted():
    flags = [False, True, True, False, True]
    answers = (
        SimpleNamespace(token=i, text="", from_draft=flag, logprobs=None) for i, flag in enumerate(flags)
    )
    found = measure.time_answer(Contender("x", lambda ids, most: answers), [1], 9, NoMeter())
    assert found.steps == 2  # every step ends with a token that was not drafted
    assert found.waited is None
