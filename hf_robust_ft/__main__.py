"""``python -m hf_robust_ft``: the same as the command ``hf-robust-ft``."""

import sys

from .cli import main

sys.exit(main())
