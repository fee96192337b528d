"""``python -m token_pruning``."""

import sys

from token_pruning.cli import main

if __name__ == "__main__":
    sys.exit(main())
