"""Ctrl-C while a command still imports, which takes seconds, is one line. Imported first; of no use to a library."""

import sys
from pathlib import Path
from types import TracebackType


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


_program = sys.argv[0] if getattr(sys, "argv", None) else ""
if _program == "-m" or Path(_program).stem == "token-pruning":  # -m: of this package, for others it is over by now
    sys.excepthook = _one_line
