"""What all interfaces share: from a checked request to a generation, with its limits and records."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from mlx_lm.tokenizer_utils import TokenizerWrapper
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ..chat import Continuing, Message
from ..engine.grammar import Grammar
from ..stop_texts import check_stop
from .catalog import Catalog, Loaded
from .errors import BadRequest
from .generation import Generation
from .memory import Memory
from .metrics import Metrics
from .output import Reader, Update, writes_json
from .prompts import Prompt, encode_chat
from .schemas import SEEDS, Decoding, JsonSchema, ResponseFormat
from .worker import Helper, Job, Reading, Worker

T = TypeVar("T")
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass
class Wanted:
    """What a request wants of each of its texts, besides how tokens are picked.

    Attributes:
        max_tokens: None: as many as there is room for.
        stop: texts that end it.
        structured: whether reasoning and calls are told apart.
        tools: functions that may be called.
        logprobs: how many of the likeliest tokens' are wanted; None: none.
        format: what the answer must look like.
        must_call: the answer is a call of one of the tools.
    """

    max_tokens: int | None = None
    n: int = 1
    stop: str | Sequence[str] | None = None
    structured: bool = True
    tools: Sequence[dict[str, Any]] = ()
    logprobs: int | None = None
    format: ResponseFormat | None = None
    must_call: bool = False

    @property
    def is_direct(self) -> bool:
        """Whether there is no room for reasoning before the answer."""
        return self.must_call or (self.format is not None and self.format.type != "text")


@dataclass
class Service:
    """The server's parts, and its limits.

    Attributes:
        usual: what a request that does not say otherwise gets: ``Sampling``'s fields.
        max_tokens: of a text, where a request does not say; None: as many as there is room for.
        queue: texts that may be decoded or wait at once; more are told to come back.
    """

    worker: Worker
    catalog: Catalog
    metrics: Metrics = field(default_factory=Metrics)
    usual: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    queue: int = 256
    memory: Memory = field(default_factory=Memory)
    generations: set[Generation] = field(default_factory=set)
    loads: bool = True  # the default model is not there yet
    leaves: bool = False  # the server is shutting down

    def __post_init__(self) -> None:
        self._helper = Helper("text")  # tokenizers are used by one thread at a time
        told = self.metrics.gauge
        told("running_requests", "Requests that are answered or wait", lambda: len(self.generations))
        told("texts", "Texts that are decoded or wait", lambda: self.catalog.texts)

    async def prompt(
        self,
        loaded: Loaded,
        wanted: Wanted,
        messages: list[Message],
        options: Mapping[str, Any] | None = None,
        goes_on: bool = False,
    ) -> Prompt:
        """A conversation as the model reads it; arguments are ``encode_chat``'s.

        Raises:
            BadRequest: the chat template refuses it.
        """
        how = goes_on, wanted.is_direct, loaded.served.has_states
        return await self.encode(encode_chat, loaded.tokenizer, messages, wanted.tools, options, *how)

    async def encode(self, work: Callable[..., T], *args: Any) -> T:
        """What tokenizers take long for, apart from the event loop."""
        return await asyncio.wrap_future(self._helper.do(partial(work, *args)))

    async def generation(
        self, loaded: Loaded, asked: Decoding, wanted: Wanted, prompts: Sequence[Prompt]
    ) -> Generation:
        """The texts that a request wants after each of the prompts, not yet begun.

        Raises:
            BadRequest: a prompt is empty or too long, a value cannot be used, or there are too many texts.
        """
        self._check_queue(len(prompts) * wanted.n)
        sampling = asked.sampling(dict(self.usual), loaded.xtc_special)
        vocabulary = loaded.model.vocabulary or SEEDS
        if bad := [token for token, _ in sampling.logit_bias if token >= vocabulary]:
            text = f"logit_bias: {bad[0]} is no token of the model, which knows {vocabulary}."
            raise BadRequest(text, param="logit_bias")
        try:
            stop = check_stop(() if wanted.stop is None else wanted.stop)
        except ValueError as error:
            raise BadRequest(f"stop: {error}", param="stop") from error
        form, structured = wanted.format, wanted.structured
        if wanted.must_call:
            form, prompts = self._calling(loaded.tokenizer, wanted, prompts)
        elif form is not None and form.type == "text":
            form = None
        elif form is not None:
            structured = False  # all of it is the answer
        grammar = None
        if form is not None:
            grammar = await self.encode(make_grammar, loaded.tokenizer, form)
            self._check_queue(len(prompts) * wanted.n)  # others may have come
        texts = []
        tokenizer = loaded.tokenizer if wanted.structured else Continuing(loaded.tokenizer)
        for prompt in prompts:
            room = self._room(loaded, prompt)
            limit = wanted.max_tokens or self.max_tokens or room
            for number in range(wanted.n):
                seed = None if asked.seed is None else (asked.seed + number) % SEEDS
                make = partial(
                    Job,
                    prompt.ids,
                    min(limit, room),
                    sampling,
                    seed=seed,
                    checkpoints=prompt.checkpoints,
                    grammar=grammar,
                    draft=asked.draft is not False,
                    logprobs=wanted.logprobs,
                )
                begins_in = prompt.begins_in if structured else "normal"
                in_parts = asked.stream is True
                reader = Reader(tokenizer, stop, structured, wanted.tools, begins_in, in_parts)
                texts.append((make, reader))
        return Generation(self.worker, loaded.served, texts)

    def _check_queue(self, texts: int) -> None:
        """Raise ``BadRequest`` if there is no room for so many more texts."""
        running = sum(len(each.readers) for each in self.generations)
        if self.leaves:
            raise BadRequest("the server is shutting down.", 503, "shutting_down")
        if running + texts > self.queue:
            raise BadRequest(f"{running} texts are decoded or wait: come back later.", 429, "queue_full")

    def _calling(
        self, tokenizer: TokenizerWrapper, wanted: Wanted, prompts: Sequence[Prompt]
    ) -> tuple[ResponseFormat | None, list[Prompt]]:
        """The prompts with the beginning of a call, and what the call must look like, where that is known."""
        if not tokenizer.has_tool_calling:
            text = "the model's chat template knows no tools, so no call of one can be required."
            raise BadRequest(text, param="tool_choice")
        start = list(tokenizer.tool_call_start_tokens)
        prompts = [replace(each, ids=[*each.ids, *start], begins_in="tool") for each in prompts]
        return _call_of(wanted.tools) if writes_json(tokenizer) else None, prompts

    def _room(self, loaded: Loaded, prompt: Prompt) -> int:
        """Tokens that may follow a prompt."""
        try:
            if not prompt.ids:
                raise ValueError("the prompt has no tokens: give some text.")
            loaded.model.check_prompts([prompt.ids], name="the prompt")
        except ValueError as error:
            code = "context_length_exceeded" if "context" in str(error) else None
            raise BadRequest(str(error).split(": shorten")[0], code=code, param="messages") from error
        return max(loaded.context - len(prompt.ids), 1)

    @contextlib.contextmanager
    def running(self, request: Request, generation: Generation) -> Iterator[None]:
        """A generation runs in the block; leaving it drops what has not ended."""
        self.generations.add(generation)
        try:
            yield
        finally:
            generation.close()
            self.generations.discard(generation)
            self.metrics.count(generation.usage)
            request.state.usage = generation.usage

    async def whole(self, request: Request, generation: Generation) -> list[Update]:
        """All updates of each text together; what is left is dropped if the client leaves.

        Raises:
            BadRequest: a text could not be decoded.
            ClientDisconnect: the client has left.
        """
        found = [Update() for _ in generation.readers]
        leaving = asyncio.ensure_future(_disconnected(request))
        leaving.add_done_callback(lambda _: generation.stop())
        with self.running(request, generation):
            async for each in generation.updates():
                if isinstance(each, tuple):
                    number, update = each
                    if update.error and leaving.done():
                        raise ClientDisconnect
                    if update.error:
                        raise BadRequest(update.error, update.status)
                    found[number].pieces += update.pieces
                    found[number].logprobs += update.logprobs
                    found[number].finish = update.finish or found[number].finish
                    found[number].stop = update.stop or found[number].stop
        leaving.cancel()
        return found

    def streamed(self, request: Request, generation: Generation, events: AsyncIterator[str]) -> Response:
        """Server-sent events, made from a generation's updates."""
        return _Stream(self, request, generation, events)


class _Stream(StreamingResponse):
    def __init__(
        self, service: Service, request: Request, generation: Generation, events: AsyncIterator[str]
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._running = partial(service.running, request, generation)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Here, since a client that leaves stops nobody in the middle of `events`.
        with self._running():
            await super().__call__(scope, receive, send)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def make_grammar(tokenizer: TokenizerWrapper, form: ResponseFormat) -> Grammar:
    """What an answer of this form may be.

    Raises:
        BadRequest: the schema, pattern or grammar cannot be used.
    """
    try:
        if form.type == "json_object":
            return Grammar.json(tokenizer)
        if form.json_schema is not None:
            return Grammar.json(tokenizer, form.json_schema.schema_)
        if form.pattern is not None:
            return Grammar.regex(tokenizer, form.pattern)
        if form.choices is not None:
            return Grammar.choice(tokenizer, form.choices)
        return Grammar.lark(tokenizer, form.grammar or "")
    except ValueError as error:
        raise BadRequest(f"response_format: {error}", param="response_format") from error


def _call_of(tools: Sequence[dict[str, Any]]) -> ResponseFormat:
    """What a call of one of the tools looks like, where calls are written as JSON."""
    functions = [tool["function"] for tool in tools]
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": each["name"]},
                "arguments": each.get("parameters") or NO_PARAMETERS,
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for each in functions
    ]
    return ResponseFormat(type="json_schema", json_schema=JsonSchema(schema={"anyOf": calls}))


def keep_alive(reading: Reading | None) -> str:
    """A comment that only says that the server is there, and how far a prompt has been read."""
    return ": keep-alive\n\n" if reading is None else f": keep-alive {reading.done}/{reading.total}\n\n"
