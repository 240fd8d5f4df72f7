"""Many clients at one server: does each get the answer it would get alone, and does memory stay flat?

    uv run --extra server benchmarks/soak_server.py                   # 64 clients for ten minutes
    uv run --extra server benchmarks/soak_server.py --model FOLDER --clients 16 --seconds 60

All endpoints are asked, whole and streamed, at temperature 0 and with seeds, for schemas and patterns, with
short prompts and long ones that begin alike. Some clients leave in the middle, some read slowly. What they
get is held against what one client gets who asks alone; of one that leaves, the beginning of that.
"""

import argparse
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any

import harness
import httpx

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "one", "two", "three")
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
PATHS = ("chat/completions", "completions", "messages", "responses")
FORMATS: list[dict[str, Any]] = [
    {},
    {},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}},
    {"guided_regex": "[ab]{3}-[0-9]{2}"},
]
TIMED = ("whole", "streamed", "first")  # to the end of an answer, and to its first text
KINDS = ("prompt", "cached", "completion", "drafted", "accepted")
LEAVE, SLOW = 0.15, 0.05  # shares of the streams that are left, and read slowly
# What resident memory may be in the last quarter of the time, in multiples of the second's; of both the
# median, since a text of 4,000 tokens that has just come or gone takes 200 MB.
GROWTH = 1.1


@dataclass
class Ask:
    """A request, and what it gets alone."""

    path: str
    body: dict[str, Any]
    alone: str = ""


@dataclass
class Report:
    """What the clients saw."""

    kinds: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(
        default_factory=lambda: {"whole": [], "streamed": [], "first": []}
    )


def asks(count: int, seed: int = 0, long: int = 300) -> list[Ask]:
    """Requests of all kinds; long prompts have ``long`` words, and begin alike."""
    rng, found = random.Random(seed), []
    shared = " ".join(rng.choice(WORDS) for _ in range(long))
    for number in range(count):
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12)))
        if number % 5 == 4:
            text = f"{shared} {text}"
        path = PATHS[number % 4]
        limit = rng.choice((4, 16, 40))
        body: dict[str, Any] = {"model": "default", "temperature": rng.choice((0, 0.8)), "seed": number}
        body |= {"responses": {"max_output_tokens": limit}}.get(path, {"max_tokens": limit})
        body |= {"draft": False} if rng.random() < 0.1 else {}
        messages = [{"role": "user", "content": text}]
        if path == "completions":
            body |= {"prompt": text, **rng.choice(FORMATS)}
        elif path == "responses":
            body |= {"input": text}
        else:
            body |= {"messages": messages}
        if path == "chat/completions":
            body |= rng.choice([*FORMATS, {"n": 2}, {"stop": [" "]}, {"logprobs": True, "top_logprobs": 2}])
        if path == "chat/completions" and rng.random() < 0.2:
            body |= {"tools": [{"type": "function", "function": TOOL}]}
        found.append(Ask(path, body))
    return found


def whole(client: httpx.Client, ask: Ask) -> str:
    """The answer that comes in one piece, without what differs between two that are the same."""
    response = client.post(f"/v1/{ask.path}", json=ask.body)
    response.raise_for_status()
    found = response.json()
    if ask.path == "messages":
        return "".join(block["text"] for block in found["content"]) + f"|{found['stop_reason']}"
    if ask.path == "responses":
        texts = [part["text"] for item in found["output"] for part in item["content"]]
        return "".join(texts) + f"|{found['status']}"
    said = [each["message"]["content"] if "message" in each else each["text"] for each in found["choices"]]
    ends = [each["finish_reason"] for each in found["choices"]]
    return "".join(f"{text}|{end}" for text, end in zip(said, ends, strict=True))


def streamed(
    client: httpx.Client, ask: Ask, leave_after: float = 1e9, pause: float = 0.0
) -> tuple[str, bool, float]:
    """The answer that comes bit by bit, whether that is all of it, and the seconds until its first text.

    Args:
        leave_after: events after which the client is gone.
        pause: seconds between events.
    """
    begun, first, said, ends, read = time.perf_counter(), 0.0, dict[int, str](), dict[int, str](), 0
    with client.stream("POST", f"/v1/{ask.path}", json={**ask.body, "stream": True}) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            time.sleep(pause)
            for place, text, end in bits(ask.path, json.loads(line[6:])):
                said[place] = said.get(place, "") + text
                ends |= {place: end} if end else {}
                first = first or (time.perf_counter() - begun if text else 0.0)
            read += 1
            if read > leave_after:
                return said.get(0, ""), False, first
    return "".join(f"{said.get(place, '')}|{ends[place]}" for place in sorted(ends)), True, first


def bits(path: str, event: dict[str, Any]) -> list[tuple[int, str, str]]:
    """Of an event: which choice it belongs to, what it adds, and how it ends that choice, if it does.

    Raises:
        RuntimeError: it tells of an error.
    """
    if event.get("error") or event.get("type") in ("error", "response.failed"):
        raise RuntimeError(json.dumps(event))
    if path == "messages":
        delta = event.get("delta") or {}
        return [(0, delta.get("text", ""), delta.get("stop_reason") or "")]
    if path == "responses":
        end = (event.get("response") or {}).get("status", "")
        delta = event["delta"] if event["type"] == "response.output_text.delta" else ""
        return [(0, delta, "" if end == "in_progress" else end)]
    return [
        (
            each["index"],
            (each.get("delta") or {}).get("content") or each.get("text") or "",
            each["finish_reason"],
        )
        for each in event["choices"]
    ]


def client_of(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=900)  # a CPU takes minutes for the prompts of 64 clients


def visit(client: httpx.Client, ask: Ask, rng: random.Random, report: Report) -> None:
    """One request, and what became of it."""
    begun, kind = time.perf_counter(), "whole" if rng.random() < 0.4 else "streamed"
    try:
        if kind == "whole":
            said, is_all = whole(client, ask), True
        else:
            leave = rng.randint(0, 10) if rng.random() < LEAVE else 1e9
            pause = 0.05 if rng.random() < SLOW else 0.0
            said, is_all, first = streamed(client, ask, leave, pause)
            report.seconds["first"].append(first)
            kind = kind if is_all and not pause else "slow" if is_all else "left"
    except (httpx.HTTPError, RuntimeError, KeyError, ValueError) as error:
        report.errors.append(f"{ask.path}: {type(error).__name__}: {error}"[:500])
        return
    report.kinds[kind] += 1
    report.seconds.get(kind, []).append(time.perf_counter() - begun)
    if said != ask.alone if is_all else not ask.alone.startswith(said):
        report.wrong.append(f"{kind} {ask.path} {json.dumps(ask.body)[:300]}: {said!r}, alone {ask.alone!r}")


def soak(url: str, todo: list[Ask], clients: int, seconds: float, seed: int = 0) -> Report:
    """Have so many clients ask for so long."""
    report, end = Report(), time.monotonic() + seconds

    def live(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        with client_of(url) as client:
            while time.monotonic() < end:
                visit(client, rng.choice(todo), rng, report)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(live, range(clients)))
    return report


@contextmanager
def server(model: str, drafter: str, port: int) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its address, and its process's number.

    Args:
        port: 0: any that is free.
    """
    with socket.create_server(("127.0.0.1", port)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_redrafter", "serve", "--model", model, "--drafter", drafter]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process, url = subprocess.Popen([*command, "--port", str(port)], **quiet), f"http://127.0.0.1:{port}"
    try:
        while not answers(url):
            if process.poll() is not None:
                raise ValueError(f"{' '.join(command)} has ended: start it by hand to see why.")
            time.sleep(0.2)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.HTTPError:
        return False


def resident(process: int) -> float:
    """Megabytes of memory that a process has."""
    found = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(process)], capture_output=True, text=True, check=True
    )
    return round(int(found.stdout) / 1024, 1)


def told(url: str, name: str) -> float:
    """A number of the server's metrics."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"mlx_redrafter_{name} "))


def shares(values: list[float]) -> dict[str, float]:
    """The 50th and the 95th percentile, in seconds."""
    ordered = sorted(values) or [0.0]
    return {f"p{share}": round(ordered[len(ordered) * share // 100], 4) for share in (50, 95)}


def tiny(folder: Path) -> tuple[str, str]:
    """A tiny random model and a drafter for it, made by the tests' code."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from bundles import make_drafter, make_folder

    base = make_folder(folder / "model", kind="random", max_position_embeddings=4096)
    return str(base), str(make_drafter(folder / "drafter", base))


def main() -> None:
    parser = harness.parser(__doc__, "soak_server.json", harness.TINY)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--asks", type=int, default=60, help="different requests")
    parser.add_argument("--words", type=int, default=300, help="of long prompts")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny(Path(folder)) if args.model == harness.TINY else (args.model, args.drafter)
        with server(*model, args.port) as (url, process):
            record = run(args, url, process)
    print(json.dumps(record, indent=1, ensure_ascii=False))
    harness.write(args, record)
    sys.exit(not record["passed"])


def run(args: argparse.Namespace, url: str, process: int) -> dict[str, Any]:
    """Ask alone, then together; what became of it."""
    todo, memory = asks(args.asks, long=args.words), [resident(process)]
    with client_of(url) as client:
        for ask in todo:
            ask.alone = whole(client, ask)
    begun = time.monotonic()

    def watch() -> None:
        while time.monotonic() < begun + args.seconds:
            memory.append(resident(process))
            time.sleep(args.seconds / 20)

    watching = Thread(target=watch)
    watching.start()
    report = soak(url, todo, args.clients, args.seconds)
    seconds = time.monotonic() - begun
    watching.join()
    deadline = time.monotonic() + 10
    while (left := told(url, "texts")) and time.monotonic() < deadline:
        time.sleep(0.1)
    memory.append(resident(process))
    quarter = len(memory) // 4
    settled, last = median(memory[quarter : 2 * quarter + 1]), median(memory[-quarter - 1 :])
    return {
        "passed": not (report.errors or report.wrong or left) and last <= GROWTH * settled,
        "requests": sum(report.kinds.values()),
        "kinds": dict(report.kinds),
        "seconds": round(seconds, 1),
        "errors": len(report.errors),
        "first_errors": report.errors[:3],
        "wrong": len(report.wrong),
        "first_wrong": report.wrong[:3],
        "texts_left": left,
        "tokens": {kind: told(url, f'tokens_total{{kind="{kind}"}}') for kind in KINDS},
        "resident_mb": {"start": memory[0], "second_quarter": settled, "end": last, "all": memory},
        "latency_seconds": {kind: shares(values) for kind, values in report.seconds.items()},
    }


if __name__ == "__main__":
    main()
