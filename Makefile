.PHONY: check test lint format mac-check cuda-check cpu-check

check: lint test  ## everything CI checks

test:
	uv run pytest

lint:
	uv run ruff check .
	uv run ruff format --check .
	uv run mypy

format:
	uv run ruff check --fix .
	uv run ruff format .

# What the owner of such a machine should run once; each writes one file to send us.

mac-check:
	uv run benchmarks/check.py --expect metal --synthetic 1B 8B --output mac-check.json

CUDA = cuda12

cuda-check:  ## or with CUDA=cuda13
	uv run --extra $(CUDA) benchmarks/check.py --expect cuda --synthetic 1B 8B --output cuda-check.json

cpu-check:  ## the rehearsal, with small settings
	uv run benchmarks/check.py --expect cpu --texts 2 --tokens 60 --limit 2 --max-tokens 32 --seconds 2 \
		--synthetic tiny --output cpu-check.json
