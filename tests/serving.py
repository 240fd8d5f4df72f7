"""Servers of tiny models, and models that say what a test wants."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
from bundles import EOS, make_folder
from transformers import AutoTokenizer

from mlx_redrafter.options import ModelOptions
from mlx_redrafter.server.app import Access
from mlx_redrafter.server.catalog import ServingOptions
from mlx_redrafter.server.run import Server, Settings, listen, make_server
from mlx_redrafter.server.worker import Reading, Said, Worker

# Nothing is encrypted here: reading the certificates of all authorities takes longer than most requests.
get, post, request = (partial(each, verify=False) for each in (httpx.get, httpx.post, httpx.request))

# As Qwen's: tools are told of first, calls are marked. mlx-lm knows by `tool_call.name` how to read calls.
TOOLS_TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}{% set tool_call = call.function %}"
    "<tool_call>{{ tool_call.name }} {{ tool_call.arguments | tojson }}</tool_call>{% endfor %}</s>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Served:
    """A running server.

    Attributes:
        url: of its root.
        server: uvicorn's, with the service.
    """

    def __init__(self, url: str, server: Server) -> None:
        self.url, self.server = url, server

    @property
    def loaded(self):
        """The default model."""
        catalog = self.server.service.catalog
        return catalog.loaded[catalog.default_name]


@contextlib.contextmanager
def serving(model: Path, drafter: str = "none", access: Access | None = None, **settings) -> Iterator[Served]:
    """Serve a model on a free port, in a thread."""
    serving_options = {name: settings.pop(name) for name in list(settings) if name in OPTIONS}
    given = Settings(
        ModelOptions(str(model), drafter=drafter),
        ServingOptions(**{"chunk": 32, **serving_options}),
        access or Access(),
        **settings,
    )
    listening, ready, made = listen("127.0.0.1", 0), threading.Event(), []

    async def run() -> None:
        server = await make_server(given)
        made.append(server)
        ready.set()
        await server.serve([listening])

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert ready.wait(60)
    try:
        yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", made[0])
    finally:
        made[0].should_exit = True
        thread.join(60)
        assert not thread.is_alive()


OPTIONS = vars(ServingOptions()).keys()


def make_tools_folder(folder: Path, **config) -> Path:
    """A model whose chat template knows tools and reasoning; it says anything, so let ``Scripted`` speak."""
    make_folder(folder, kind="random", **{"max_position_embeddings": 4096, **config})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TOOLS_TEMPLATE
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(folder)
    return folder


class Scripted:
    """Takes the place of a server's decoding: every text says what it is told, a few tokens a step."""

    def __init__(self, served: Served, says: str | list[str], a_step: int = 3) -> None:
        self.tokenizer, self._step, self._worker = (
            served.loaded.tokenizer,
            a_step,
            served.server.service.worker,
        )
        self.says = [says] if isinstance(says, str) else list(says)
        self.jobs = []

    def __enter__(self) -> "Scripted":
        self._worker.submit = self._submit
        return self

    def __exit__(self, *_: object) -> None:
        del self._worker.submit

    def _submit(self, served, job) -> None:
        self.jobs.append(job)
        text = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), *self.tokenizer.encode(EOS)][
            : job.max_tokens
        ]
        job.deliver(Reading(0, len(job.prompt)))
        for start in range(0, len(ids), self._step):
            part = ids[start : start + self._step]
            finish = None
            if start + self._step >= len(ids):
                finish = "stop" if ids[-1] in self.tokenizer.eos_token_ids else "length"
            logprobs = [[(token, -0.5), (token, -0.5), (0, -2.0)] for token in part] if job.logprobs else []
            job.deliver(Said(part, len(part) - 1, self._step, logprobs, finish))


assert hasattr(Worker, "submit")
