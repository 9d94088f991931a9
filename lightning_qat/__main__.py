"""``python -m lightning_qat``."""

from __future__ import annotations

import sys

from lightning_qat.cli.command_line import main

if __name__ == "__main__":
    sys.exit(main())
