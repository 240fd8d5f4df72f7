"""Generate text: the same as ``mlx-redrafter generate``."""

import sys

from mlx_redrafter.commands.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "generate")
    sys.exit(main())
