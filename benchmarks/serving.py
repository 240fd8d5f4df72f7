"""Our server beside mlx-lm's: the same requests in turns, by several clients; a long prompt's second turn.

    uv run --extra server benchmarks/serving.py --model FOLDER --prompts mt_bench.jsonl --output result.json

The model must be one that both compute in the same type, such as float32 weights on a CPU: ours would
cast others there.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

OURS = [sys.executable, "-m", "mlx_redrafter", "serve"]
BLAS = "from mlx_redrafter.blas import load_blas; load_blas(); from mlx_lm.server import main; main()"
PLAIN = [sys.executable, "-c", BLAS]  # with the same BLAS
TOKENS = 64  # of an answer


class Server:
    """A server in a process of its own."""

    def __init__(self, command: list[str], model: str, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([*command, "--model", model, "--port", str(port)], **quiet)
        while not self._answers():
            if self.process.poll() is not None:
                raise ValueError(f"{' '.join(command)} has ended: start it by hand to see why.")
            time.sleep(0.5)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).is_success
        except httpx.HTTPError:
            return False

    def ask(self, text: str) -> tuple[str, int]:
        """An answer, and how many tokens it has."""
        body = {"model": "default_model", "messages": [{"role": "user", "content": text}]}
        body |= {"max_tokens": TOKENS, "temperature": 0}
        found = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=600).json()
        return found["choices"][0]["message"]["content"], found["usage"]["completion_tokens"]

    def load(self, texts: list[str], clients: int) -> tuple[float, list[str]]:
        """Tokens per second of all clients together, and the answers."""
        begun = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            found = list(pool.map(self.ask, texts))
        seconds = time.perf_counter() - begun
        return sum(count for _, count in found) / seconds, [text for text, _ in found]

    def first_token(self, messages: list[dict[str, str]]) -> tuple[float, str, int]:
        """Seconds to the first token, the answer, and the prompt's tokens."""
        body: Any = {"model": "default_model", "messages": messages, "max_tokens": 16, "stream": True}
        body |= {"stream_options": {"include_usage": True}, "temperature": 0}
        begun, first, said, tokens = time.perf_counter(), 0.0, "", 0
        url = f"{self.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=600) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                said += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                first = first or (time.perf_counter() - begun if said else 0.0)
                tokens = (chunk.get("usage") or {}).get("prompt_tokens", tokens)
        return first, said, tokens


def main() -> None:
    """Run both servers, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with `turns`")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=16, help="prompts, taken evenly from the file")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = [json.loads(line)["turns"][0] for line in args.prompts.read_text("utf-8").splitlines()]
    texts = rows[:: max(len(rows) // args.limit, 1)][: args.limit]
    servers = {"ours": Server(OURS, args.model, 8201), "mlx_lm.server": Server(PLAIN, args.model, 8202)}
    result: dict[str, Any] = {"prompts": len(texts), "tokens": TOKENS, "rounds": []}
    try:
        for clients in (1, 4, 16):
            for server in servers.values():  # step times are measured when first needed
                server.load(texts[:clients], clients)
            for number in range(args.rounds):
                asked = [f"{text}\n({number})" for text in texts]  # so that no whole prompt is known
                order = list(servers)[:: 1 if number % 2 else -1]
                found = {name: servers[name].load(asked, clients) for name in order}
                (ours, said), (plain, expected) = (found[name] for name in servers)
                same = sum(a == b for a, b in zip(said, expected, strict=True))
                row = {"clients": clients, "ours": ours, "plain": plain, "ratio": ours / plain, "same": same}
                result["rounds"].append(row)
                print(row, flush=True)
        messages = [{"role": "user", "content": " ".join(texts) * 4}]
        first, said, tokens = servers["ours"].first_token(messages)
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "Go on."}]
        second, _, _ = servers["ours"].first_token(messages)
        result["long_prompt"] = {"tokens": tokens, "first": first, "second": second, "share": second / first}
        print(result["long_prompt"])
    finally:
        for server in servers.values():
            server.process.kill()
    args.output.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
