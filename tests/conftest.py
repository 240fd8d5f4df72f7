"""Tiny random models and the drafters that tests decode with."""

import contextlib
import io
import os
import signal
import sys
import tempfile

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the tests share the cores: one process each
if "MLX_REDRAFTER_CACHE" not in os.environ:
    folder = tempfile.TemporaryDirectory()  # converted models and step times, for this run of the tests only
    os.environ["MLX_REDRAFTER_CACHE"] = folder.name

# MLX's thread is woken for every operation, and a tiny model's are short: when each wake-up interrupts what
# builds the graph, switching costs more than the operations. Threads and processes inherit this.
if sys.platform == "linux":
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

from mlx_redrafter.commands.main import main

# Ctrl-C is tested, and ignored by what a shell starts in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command line in this process: exit code, standard output, standard error."""

    def call(*arguments, stdin=b""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # of argparse
            code = exit.code
        return code, *capsys.readouterr()

    return call
