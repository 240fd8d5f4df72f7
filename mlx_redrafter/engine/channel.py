"""What machines that decode together tell each other besides arrays: lines of JSON, over TCP.

Each has a connection to the first one (rank 0), which decides. It does not wait for the device, as MLX's own
collectives do, and whoever ends, for whatever reason, ends all.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, NoReturn

Message = list[Any]  # what it is, and what belongs to it
HELLO = 64  # bytes by which another rank is known
PATIENCE = 30.0  # seconds, until all are connected
# Seconds until a machine that does not answer is taken for dead: idle ones, between two questions, questions.
ALIVE = (("TCP_KEEPIDLE", 3), ("TCP_KEEPALIVE", 3), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 4))
UNHEARD = 7000  # milliseconds for which what was sent may stay unanswered, where the system has such a limit


class Channel:
    """The connections of one rank.

    Args:
        rank: the own one.
        links: a connected socket for every other rank; of the others, to rank 0 only.

    Attributes:
        leaving: called before ``end`` ends this process.
    """

    leaving: Callable[[str], None] = staticmethod(lambda text: None)

    def __init__(self, rank: int, links: dict[int, socket.socket]) -> None:
        self.rank = rank
        self._links, self._sending, self._ending = links, Lock(), Lock()
        self._inbox: dict[int, SimpleQueue[Message]] = {other: SimpleQueue() for other in links}
        for other, link in links.items():
            link.settimeout(None)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in ALIVE:
                if hasattr(socket, option):
                    link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNHEARD)
            elif sys.platform == "darwin":
                link.setsockopt(socket.IPPROTO_TCP, 0x80, UNHEARD // 1000)  # TCP_RXT_CONNDROPTIME
            Thread(target=self._listen, args=(other,), name=f"rank {other}", daemon=True).start()

    def tell(self, *message: Any) -> None:
        """Send a message to every rank that there is a connection to."""
        line = json.dumps(message).encode() + b"\n"
        with self._sending:
            for link in self._links.values():
                with contextlib.suppress(OSError):  # who listens to it will know
                    link.sendall(line)

    def receive(self, other: int = 0, patience: float | None = None) -> Message:
        """The next message of rank 0, or of another; ``TimeoutError`` if none comes in so many seconds."""
        try:
            return self._inbox[other].get(timeout=patience)
        except Empty as error:
            raise TimeoutError(f"rank {other} says nothing") from error

    def decide(self, value: Any) -> Any:
        """Rank 0's value, as JSON has it, on every rank."""
        if self.rank:
            return self.receive()[1]
        self.tell("decide", value)
        return json.loads(json.dumps(value))

    def gather(self, value: Any, patience: float | None = None) -> list[Any]:
        """The values of all ranks, on every rank; ``patience`` as of ``receive``."""
        if self.rank:
            self.tell("gather", value)
            return list(self.receive(0, patience)[1])
        others = [self.receive(other, patience)[1] for other in sorted(self._inbox)]
        return list(self.decide([value, *others]))

    def stop(self, code: int, text: str = "") -> None:
        """End all other ranks, and say why; the first reason is the only one that is told."""
        if not self._ending.acquire(blocking=False):
            time.sleep(PATIENCE)  # another thread is ending this process
        if text:
            print(text, file=sys.stderr, flush=True)
        self.tell("end", code, text and self._told(text))

    def end(self, code: int, text: str) -> NoReturn:
        """End this process and all other ranks; any thread may, for others may wait for a device for ever."""
        self.stop(code, text)
        self.leaving(text)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)

    def lost(self) -> None:
        """MLX may have lost another rank: wait for the reason, which comes here then."""
        time.sleep(2)

    def _told(self, text: str) -> str:
        return text if "rank " in text else text.replace("error: ", f"error: rank {self.rank}: ", 1)

    def _listen(self, other: int) -> None:
        """Take in what another rank says; end with it."""
        with contextlib.suppress(OSError, ValueError), self._links[other].makefile("r") as lines:
            for line in lines:
                message = json.loads(line)
                if message[0] == "end":
                    self.end(message[1], message[2])
                self._inbox[other].put(message)
        time.sleep(0.1)  # MLX's ring notices it too, and must not write into our line
        reason = "it was killed, or its machine or the network failed"
        self.end(2, f"error: rank {other} has ended without a word ({reason}): start all again.")


def connect(rank: int, size: int, spread: Callable[[bytes], bytes]) -> Channel:
    """Connect every rank to rank 0.

    Args:
        spread: gives all ranks rank 0's bytes.

    Raises:
        ValueError: rank 0 cannot be reached at the address that the launcher knows.
    """
    links: dict[int, socket.socket] = {}
    host, token = _address(), secrets.token_hex(16)
    if rank == 0:
        try:
            server = socket.create_server((host, 0))
        except OSError as error:
            spread(b"[]")
            raise ValueError(f"rank 0 cannot listen at {host} ({error}): {_REMEDY}") from error
        spread(json.dumps([host, server.getsockname()[1], token]).encode())
        end = time.monotonic() + PATIENCE
        with server:
            while len(links) < size - 1:
                server.settimeout(max(end - time.monotonic(), 0.01))
                try:
                    link, _ = server.accept()
                    link.settimeout(5)
                    hello = link.recv(HELLO, socket.MSG_WAITALL).decode("ascii", "replace")
                    given, _, number = hello.partition(" ")
                except TimeoutError as error:
                    missing = sorted({*range(1, size)} - links.keys())
                    raise ValueError(f"rank {missing[0]} does not reach {host}: {_REMEDY}") from error
                if secrets.compare_digest(given.encode(), token.encode()):
                    links[int(number)] = link
                else:
                    link.close()
        return Channel(rank, links)
    found = json.loads(spread(b""))
    try:
        host, port, token = found
        link = socket.create_connection((host, port), PATIENCE)
        link.sendall(f"{token} {rank}".encode().ljust(HELLO))
    except (OSError, ValueError) as error:
        raise ValueError(f"rank {rank} does not reach rank 0 at {host} ({error}): {_REMEDY}") from error
    return Channel(rank, {0: link})


_REMEDY = "give mlx.launch an address of the first machine that all others reach."


def _address() -> str:
    """Rank 0's address, as ``mlx.launch`` tells it to all ranks."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        hosts = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text("utf-8"))
        return str(hosts[0][0]).rpartition(":")[0]
    coordinator = os.environ.get("MLX_JACCL_COORDINATOR", "").rpartition(":")[0]
    return coordinator or os.environ.get("NCCL_HOST_IP") or "127.0.0.1"
