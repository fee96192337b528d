"""What becomes of a benchmark's figures."""

import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write(result: Any, text: str, output: Path) -> None:
    """``OUTPUT.json`` with everything and ``OUTPUT.md`` for a reader; folders are made."""
    output.parent.mkdir(parents=True, exist_ok=True)
    beside(output, ".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    beside(output, ".md").write_text(text, encoding="utf-8")


def beside(output: Path, suffix: str) -> Path:
    """The name with a suffix; ``Path.with_suffix`` would take the end off a name like ``distilled-0.35``."""
    return output.with_name(output.name + suffix)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Of several passes."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def command(hidden: Mapping[str, Path | None]) -> str:
    """The command line that is running, with names in place of this machine's folders."""
    names = {str(path): name for name, path in hidden.items() if path is not None}
    script = Path(sys.argv[0])
    words = [f"{script.parent.name}/{script.name}", *(names.get(word, word) for word in sys.argv[1:])]
    return f"python {shlex.join(words)}"
