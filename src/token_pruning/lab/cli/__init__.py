"""The command line: ``token-pruning COMMAND``, and the paper's ``run.py``."""

from token_pruning.lab.cli.main import main, paper_main

__all__ = ["main", "paper_main"]
