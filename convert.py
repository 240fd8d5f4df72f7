"""Convert models and drafters: the same as ``mlx-redrafter convert``."""

import sys

from mlx_redrafter.commands.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    sys.exit(main())
