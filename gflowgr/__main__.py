"""`python -m gflowgr` is the command `gflowgr`."""

from __future__ import annotations

import sys

from gflowgr.cli import main

if __name__ == "__main__":
    sys.exit(main())
