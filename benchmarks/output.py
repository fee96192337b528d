"""What becomes of a benchmark's figures."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write(result: Any, text: str, output: Path) -> None:
    """``OUTPUT.json`` with everything and ``OUTPUT.md`` for a reader; folders are made."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(text, encoding="utf-8")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Of several passes."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
