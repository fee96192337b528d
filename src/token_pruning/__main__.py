"""``python -m token_pruning``."""

import sys

from token_pruning.lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
