"""``python -m muxio``."""

import sys

from muxio.cli import main

sys.exit(main())
