"""``python -m mlx_redrafter``."""

import sys

from .cli import main

sys.exit(main())
