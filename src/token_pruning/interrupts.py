"""Ctrl-C while a command still imports, which takes seconds, is one line. Imported first; of no use to a library."""

import sys
from pathlib import Path
from types import TracebackType


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


_program = Path(sys.argv[0]).stem if getattr(sys, "argv", None) else ""
if _program == "token-pruning" or "-m token_pruning" in " ".join(getattr(sys, "orig_argv", [])[:4]):
    sys.excepthook = _one_line
