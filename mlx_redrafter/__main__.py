"""``python -m mlx_redrafter``."""

import sys

from .commands.main import main

sys.exit(main())
