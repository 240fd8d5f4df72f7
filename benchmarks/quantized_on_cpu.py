"""``mlx-redrafter benchmark`` with SmolLM2's 4-bit weights kept on a CPU, where they would be dequantized.

    uv run --extra benchmark benchmarks/quantized_on_cpu.py --prompts prompts.jsonl --json result.json

A step then takes as long as its tokens one by one, so speculation must switch itself off.
"""

import sys

from lossless import load

from mlx_redrafter.benchmark import session
from mlx_redrafter.commands.main import main
from mlx_redrafter.loading.find import DEFAULT_MODEL

if __name__ == "__main__":
    session.load_model = lambda args, *_: load(args.model or DEFAULT_MODEL, "quantized-float32")
    sys.exit(main(["benchmark", *sys.argv[1:]]))
