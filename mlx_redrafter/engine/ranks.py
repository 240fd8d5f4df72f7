"""Several machines decode together, started by ``mlx.launch``; each has a part of the model (``split.py``).

Rank 0 runs the command and decides. What it asks of its engines it tells the others, which have engines of
their own and ask the same of them, so that all build the same steps. The sums of partial results differ in
their last bits from rank to rank: a near tie would fall differently on each. So nothing is decided twice:
a step's drafts and picks are rank 0's (``share``), and so is its draft shape.
"""

import contextlib
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.generate import generation_stream, maybe_set_recommended_wired_limit

from ..decoding.layers import Quantization
from ..decoding.sampling import Sampling
from ..decoding.state import DraftShape, Output, State
from ..decoding.step import Pick
from ..decoding.tree import Tree, make_tree
from ..loading.cache import versions
from . import backend
from .channel import Channel, Message, connect
from .engine import Engine, Request, engine_here
from .loop import Chooser, Emitted, Text, Unfinished, begin_step
from .prefixes import Prefixes
from .runner import Runner

T = TypeVar("T")
DEBUG = "MLX_REDRAFTER_DEBUG"  # environment variable: show tracebacks
SAME = "install the same versions everywhere"
MOST = 512  # bytes that are spread before there are connections
LOADING = 3  # times that all agree while a model is loaded
ALONE = 20.0  # seconds in which others have found out, too, why a model cannot be loaded
PLAIN_ORDERS = ("plain", "next", "leave")  # orders that use mlx-lm's stream, others use the default one
# Options of mlx-lm's decoding that decide what it computes.
PLAIN_OPTIONS = (
    *("max_tokens", "prefill_step_size", "max_kv_size"),
    *("kv_bits", "kv_group_size", "quantized_kv_start"),
)


class Ranks:
    """The machines that decode together, as one of them sees them.

    Attributes:
        rank, size: the own number, and how many there are.
        machines: what they are, as JSON.
        models: models and their tokenizers that are loaded on all of them, by number.
    """

    def __init__(self, group: mx.distributed.Group, channel: Channel) -> None:
        self.group, self.channel = group, channel
        self.rank, self.size = group.rank(), group.size()
        self.models: dict[int, tuple[Any, Any]] = {}
        self._to_agree = 0  # how often all have still to agree until a model is loaded
        self.agree("version of", versions(), SAME)
        self.agree("kind of device,", {"MLX's device": backend.current().name}, "start all on the same kind")
        self.machines = channel.gather([backend.chip(), os.cpu_count()])
        self._count = 0  # models, engines and plain texts so far
        self._prefixes: dict[int, Prefixes] = {}  # by their models' numbers
        self._is_plain = False  # whether the last order was mlx-lm's
        self._engines: dict[int, Engine] = {}
        self._plain: dict[int, Iterator[Any]] = {}

    @property
    def place(self) -> str:
        """Which of how many machines this is."""
        return f"{self.rank} of {self.size}"

    def share(self, numbers: mx.array) -> mx.array:
        """Rank 0's whole numbers, on every rank, without waiting.

        The others' count too, as nothing: all ranks must have the same graph, or unlike sums would meet.
        """
        return mx.distributed.all_sum(numbers * int(self.rank == 0), group=self.group)

    def share_tree(self, tree: Tree, depth: int) -> Tree:
        """Rank 0's tree, on every rank: its tokens, parents and ranks, as one array [3, B, N]."""
        parts = (tree.tokens, tree.parents, tree.ranks)
        tokens, parents, ranks = self.share(mx.stack([part.astype(mx.int32) for part in parts]))
        if tree.is_chain:
            return replace(tree, tokens=tokens, ranks=ranks)
        return make_tree(tokens, parents, depth, ranks)

    def sharing(self, pick: Pick, asked: Sequence[Text] = ()) -> Pick:
        """A ``Pick`` that picks rank 0's tokens; texts ``asked`` by it that fail there, fail everywhere."""

        def picks(
            tree: Tree, state: State, logits: mx.array, noise: mx.array | None
        ) -> tuple[mx.array, mx.array]:
            logits, tokens = pick(tree, state, logits, noise)
            if asked and self.rank == 0:
                self.channel.tell("failed", [text.number for text in asked if text.error])
            elif asked:
                _, failed = self.wait_for("failed")
                for text in asked:
                    text.error = ValueError("it failed on rank 0") if text.number in failed else None
            return logits, self.share(tokens)

        return picks

    def agree(
        self,
        what: str,
        own: Mapping[str, Any],
        remedy: str,
        problem: str = "",
        patience: float | None = None,
    ) -> None:
        """Raise ``ValueError`` on every rank if one of them has a problem, or other values than rank 0.

        ``TimeoutError`` if the others do not come to this point in so many seconds.
        """
        self._to_agree -= 1
        told = self.channel.gather([problem, dict(own)], patience)
        text = _first(text for text, _ in told)
        (_, first), *others = told
        for rank, (_, found) in enumerate(others if not text else (), 1):
            for name, value in found.items():
                if value != first.get(name):
                    text = (
                        f"rank {rank} has another {what} {name} ({value}) than rank 0 "
                        f"({first.get(name)}): {remedy}."
                    )
        if text:
            self._to_agree = 0
            raise ValueError(text)

    def first_problem(self, problem: str) -> str:
        """The first one that there is on any rank, given the own one; "" where all is well."""
        return _first(self.channel.gather(problem))

    # --- Loading, which all do at the same time ------------------------------------------------------------

    def tell_load(self, options: Any, drafter: Any) -> None:
        """A model is loaded next: the others shall load it too."""
        self.tell("load", asdict(options), drafter and str(drafter))

    def load(self, load: Callable[[], T]) -> T:
        """What ``load`` gives, which loads a model on all ranks at once; all go on if it cannot be loaded.

        Raises:
            ValueError: it cannot be loaded on one of them, and so on none.
        """
        self._to_agree, known = LOADING, dict(self.models)
        try:
            return load()
        except (ValueError, OSError) as error:
            self.models = known
            if self._to_agree > 0:
                try:
                    self.agree("", {}, "", str(error) or type(error).__name__, ALONE)
                except TimeoutError:  # they wait for this one to compute
                    self.end(error)
            raise
        except Exception as error:
            self.end(error)

    def split(self, model: Any, folder: Path, name: str, dtype: str) -> None:
        """Read this rank's part of the model, as floats of the type that ``load`` is told, if of one."""
        from ..loading.base import as_floats
        from ..loading.split import fingerprint, split

        self.agree("copy of", {name: fingerprint(folder)}, "copy the model's folder to all machines")
        as_floats(model, backend.current().dtype if dtype == "auto" else dtype)  # nothing is computed
        split(model, self.group, name, folder)
        self.agree("", {}, "")  # all have read their parts

    def take(self, model: Any, tokenizer: Any) -> None:
        """This is what was loaded; find out at the same time whether it can verify drafts."""
        known = model.drafter.config.to_dict() if model.drafter else None
        self.agree("drafter:", {"config": known}, "copy its folder to all machines")
        self._count += 1
        self.models[self._count], model.ranks = (model, tokenizer), self
        model.prepare()

    def release(self, model: Any) -> None:
        """Let go of a model, whose engines are closed, everywhere."""
        number = self._number(lambda each: each is model)
        self.tell("forget", number)
        self._on_forget(number)

    def _number(self, suits: Callable[[Any], bool]) -> int:
        return next(number for number, (model, _) in self.models.items() if suits(model))

    def agree_on(self, runner: Runner | None, refusal: str) -> tuple[Runner | None, str]:
        """What rank 0 found out of the model: on another, the last bits may have decided otherwise."""
        target = runner.target if runner else None
        told, trees, batches = self.channel.decide(
            [refusal, target and target.trees, target and target.batches]
        )
        if told:
            return None, told
        if runner is None or target is None:
            raise ValueError(refusal)
        target.trees, target.batches = trees, batches
        self.lead(runner)
        return runner, ""

    def lead(self, runner: Runner) -> None:
        """Let rank 0's drafts, picks and engines be what counts."""
        runner.target.leader = self
        runner.pick = self.sharing(runner.pick)

    # --- What rank 0 does, and tells ---------------------------------------------------------------------

    def tell(self, order: str, *given: Any) -> None:
        """Have the others do something, which this one does next."""
        self._turn(order)
        self.channel.tell(order, *given)

    def engine(self, runner: Runner, policy: Chooser, chunk: int, **options: Any) -> Engine:
        """An engine that has the other ranks' do the same, or is one of theirs."""
        if runner.target.is_part:
            options |= {"hand_over": _tree_first, "most": self._most}
            if options.get("prefixes") is not None:
                options["prefixes"].same = self._same
        if self.rank:
            options["max_memory"] = self._least(options["max_memory"], options["prefixes"])
            return Engine(runner, policy, chunk, **options)
        self._count += 1
        model = self._number(lambda each: each.prepare().target is runner.target)
        prefixes: Prefixes | None = options.get("prefixes")
        kept = None if prefixes is None else prefixes.limit
        self.tell("engine", self._count, model, chunk, options.get("texts", 16), kept)
        options["max_memory"] = self._least(options["max_memory"], prefixes)
        return _Led(self, self._count, runner, _Telling(policy, self.channel), chunk, options)

    def _least(self, memory: int, prefixes: Prefixes | None) -> int:
        """The memory for texts on the machine that has the least, and the same for those kept for reuse."""
        told = self.channel.gather([memory, prefixes and prefixes.limit])
        if prefixes is not None:
            prefixes.limit = min(limit for _, limit in told)
        return int(min(free for free, _ in told))

    def _most(self, number: int) -> int:
        return int(max(self.channel.gather(number)))

    def _same(self, number: int) -> bool:
        return len(set(self.channel.gather(number))) == 1

    def stream_generate(
        self, model: Any, tokenizer: Any, prompt: Sequence[int], sampler: Any = None, **options: Any
    ) -> Iterator[Any]:
        """As mlx-lm's function of that name, for the model that all have."""
        for name in ("draft_model", "prompt_cache"):
            if options.pop(name, None) is not None:
                raise ValueError(f"{name} cannot be used on several machines: leave it out.")
        self._count += 1
        number, pick = self._count, sampler or _greedy
        known = {name: options[name] for name in PLAIN_OPTIONS if name in options}
        self.tell("plain", number, self._number(lambda each: each.model is model), list(prompt), known)
        own = stream_generate(model, tokenizer, list(prompt), sampler=self._shared(pick), **options)
        try:
            while True:
                self.tell("next", number)
                if (response := next(own, None)) is None:
                    return
                yield response
        finally:
            self.tell("leave", number)
            own.close()
            settle()

    def _shared(self, pick: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
        return lambda logprobs: self.share(pick(logprobs))

    def end(self, error: Exception) -> NoReturn:
        """End all ranks, for they cannot go on together after this error; one line says why."""
        fail(self.channel, error)

    # --- What the others do ------------------------------------------------------------------------------

    def follow(self, load: Callable[..., tuple[Any, Any]]) -> int:
        """Do what rank 0 tells, until it ends.

        Args:
            load: loads a model as rank 0 does, and is given the same.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 knows what to keep, and ends all
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        warnings.simplefilter("ignore")  # rank 0 tells them
        maybe_set_recommended_wired_limit()
        self._load = load
        while True:
            self._obey(self.channel.receive())

    def wait_for(self, name: str) -> Message:
        """The next message of this name, having done what rank 0 tells before."""
        while (message := self.channel.receive())[0] != name:
            self._obey(message)
        return message

    def _obey(self, message: Message) -> None:
        order, *given = message
        self._turn(order)
        getattr(self, f"_on_{order}")(*given)

    def _turn(self, order: str) -> None:
        """Sums of one stream must not meet another rank's of the other stream: one at a time is in use."""
        if (is_plain := order in PLAIN_ORDERS) != self._is_plain:
            settle()
            self._is_plain = is_plain

    def _on_load(self, *given: Any) -> None:
        with contextlib.suppress(ValueError):  # rank 0 has found the same
            self.load(lambda: self._load(self, *given))

    def _on_forget(self, model: int) -> None:
        del self.models[model]
        self._prefixes.pop(model, None)
        mx.clear_cache()

    def _on_engine(self, number: int, model: int, chunk: int, texts: int, kept: int | None) -> None:
        self._count = number
        if kept is not None and model not in self._prefixes:
            self._prefixes[model] = Prefixes(min(kept, Prefixes().limit))
        prefixes = self._prefixes[model] if kept is not None else None
        runner = self.models[model][0].prepare()
        self._engines[number] = engine_here(runner, _Following(self), chunk, texts=texts, prefixes=prefixes)

    def _on_submit(self, number: int, request: dict[str, Any], asks_host: bool) -> None:
        request["sampling"] = Sampling(**request["sampling"])
        request["stop"] = frozenset(request["stop"])
        request["kv"] = request["kv"] and Quantization(**request["kv"])
        sampler = _greedy if asks_host else None  # so that its steps are built as those of rank 0
        self._engines[number].submit(Request(**request, seed=0, sampler=sampler, progress=self._check_read))

    def _check_read(self, done: int, total: int) -> None:
        if self.wait_for("read")[1] != done:
            raise ValueError(f"rank {self.rank} remembers other texts than rank 0: start all again.")

    def _on_resume(self, number: int, rows: int) -> None:
        from .stopwatch import after_text

        engine = self._engines[number]
        engine.resume(after_text(engine.runner, rows), rows)

    def _on_step(self, number: int) -> None:
        check(self._engines[number].step())

    def _on_cancel(self, number: int, text: int) -> None:
        self._engines[number].cancel(text)

    def _on_close(self, number: int) -> None:
        self._engines.pop(number).close()
        settle()

    def _on_plain(self, number: int, model: int, prompt: list[int], options: dict[str, Any]) -> None:
        self._count, pick = number, self._shared(_greedy)
        found, tokenizer = self.models[model]
        self._plain[number] = stream_generate(found.model, tokenizer, prompt, sampler=pick, **options)

    def _on_next(self, number: int) -> None:
        next(self._plain[number], None)

    def _on_leave(self, number: int) -> None:
        responses: Any = self._plain.pop(number)
        responses.close()
        settle()


class _Led(Engine):
    """Rank 0's engine: what it is asked, all are."""

    def __init__(
        self, ranks: Ranks, number: int, runner: Runner, policy: Chooser, chunk: int, options: dict[str, Any]
    ) -> None:
        super().__init__(runner, policy, chunk, **options)
        self._ranks, self._own = ranks, number

    def submit(self, request: Request) -> int:
        """As an engine's; ``ValueError`` for caches, which one machine alone would have."""
        if request.caches:
            raise ValueError("caches of a request cannot be used on several machines: leave them out.")
        text = super().submit(request)
        told = {
            "prompt": [int(token) for token in request.prompt],
            "max_tokens": request.max_tokens,
            "sampling": asdict(request.sampling),
            "stop": sorted(request.stop),
            "kv": request.kv and asdict(request.kv),
            "pauses": list(request.pauses),
            "checkpoints": list(request.checkpoints),
        }
        asks_host = bool(request.processors or request.sampler or request.grammar)
        self._ranks.tell("submit", self._own, told, asks_host)
        progress = request.progress

        def telling(done: int, total: int) -> None:
            self._ranks.channel.tell("read", done)
            progress(done, total)

        request.progress = telling
        return text

    def resume(self, state: State, rows: int) -> int:
        """As an engine's; the state must be ``stopwatch.after_text``'s."""
        self._ranks.tell("resume", self._own, rows)
        return super().resume(state, rows)

    def step(self) -> list[Emitted]:
        """As an engine's."""
        self._ranks.tell("step", self._own)
        return check(super().step())

    def cancel(self, number: int) -> None:
        """As an engine's."""
        self._ranks.tell("cancel", self._own, number)
        super().cancel(number)

    def close(self) -> None:
        """As an engine's, which is not used any more."""
        super().close()
        self._ranks.tell("close", self._own)
        settle()


class _Telling:
    """Rank 0's policy, which tells its choices."""

    def __init__(self, policy: Chooser, channel: Channel) -> None:
        self._policy, self._channel = policy, channel

    def choose(self, rows: int, texts: Sequence[int]) -> DraftShape:
        shape = self._policy.choose(rows, texts)
        self._channel.tell("shape", *astuple(shape))
        return shape

    def observe(
        self, shape: DraftShape, ranks: Mapping[int, Sequence[int]], seconds: float, away: float
    ) -> None:
        self._policy.observe(shape, ranks, seconds, away)


class _Following:
    """The policy that uses what rank 0 chose, which may have measured step times first."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def choose(self, rows: int, texts: Sequence[int]) -> DraftShape:
        return DraftShape(*self._ranks.wait_for("shape")[1:])

    def observe(
        self, shape: DraftShape, ranks: Mapping[int, Sequence[int]], seconds: float, away: float
    ) -> None:
        """Rank 0 learns."""


def refuse(options: Any) -> None:
    """Raise ``ValueError`` for what is asked for and works on one machine only."""
    for name in (
        *("adapter_path", "draft_model", "prompt_cache_file", "prompt_cache_dir"),
        *("cost_curve", "concurrency"),
    ):
        if getattr(options, name, None):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} works on one machine only: leave it out, or mlx.launch.")


def check(emitted: list[Emitted]) -> list[Emitted]:
    """What a step gave; raises what reading a prompt raised, since other machines may go on with it."""
    for each in emitted:
        if each.error is not None and each.logits is None:  # those that fail later, fail everywhere
            raise each.error
    return emitted


def settle() -> None:
    """Wait for this rank's device: sums that are under way must not meet those of another stream."""
    mx.synchronize()
    mx.synchronize(generation_stream)


def _tree_first(state: State, output: Output | Unfinished) -> None:
    """``begin_step`` where ranks have other layers: what comes from another rank's depends on nothing here.

    So it would be waited for before the tree is shared, and the other rank waits for that.
    """
    if isinstance(output, Output):  # else it is handed over already
        mx.async_eval(output.drafted)
    begin_step(state, output)


def _greedy(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)


def run_together(run: Callable[[Ranks | None], int], load: Callable[..., Any]) -> int:
    """Run a command on rank 0, and have the other ranks follow; the exit code.

    Args:
        run: the command; it is given None where there is only one rank.
        load: what ``Ranks.follow`` is to load models with.

    Raises:
        ValueError: the ranks cannot find each other.
    """
    try:
        group = mx.distributed.init(strict=True)
    except RuntimeError as error:
        raise ValueError(f"the ranks cannot find each other ({error}): check mlx.launch's hosts.") from error
    if group.size() == 1:
        return run(None)
    channel = connect(group.rank(), group.size(), lambda data: _spread(group, data))
    try:
        ranks = Ranks(group, channel)
        code = run(ranks) if ranks.rank == 0 else ranks.follow(load)
        channel.stop(code)
        return code
    except KeyboardInterrupt:
        channel.end(130, "Interrupted.")
    except BrokenPipeError:  # the reader of our output has gone
        channel.end(0, "")
    except Exception as error:
        fail(channel, error)


def fail(channel: Channel, error: Exception) -> NoReturn:
    """End all ranks because of an error on this one."""
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, RuntimeError):  # MLX's, which may have lost another rank
        channel.lost()
    channel.end(2, f"error: {text}")


def _first(told: Iterable[str]) -> str:
    """The first problem of those that the ranks have, "" where they have none, with its rank."""
    rank, text = next(((rank, text) for rank, text in enumerate(told) if text), (0, ""))
    return text if rank == 0 or "rank " in text else f"rank {rank}: {text}"


def _spread(group: mx.distributed.Group, data: bytes) -> bytes:
    """Rank 0's bytes, on every rank."""
    padded = data.ljust(MOST) if group.rank() == 0 else bytes(MOST)
    return bytes(mx.distributed.all_sum(mx.array(list(padded), mx.uint8), group=group).tolist()).strip()  # type: ignore[arg-type]
