"""The page that says which folder of results/cpu comes from which machine."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HEAD = """# The engine on CPUs

One folder per kind of machine, named by processor and instruction sets. `make bench` measures the machine it runs on in
about twenty minutes, goes on where it stopped, and rewrites this page; it writes over no other machine's figures.
llama.cpp takes part where `pip install '.[llama]'` has built it; on other families than BERT and RoBERTa it does not.
*Pruned engine*: its speed relative to the best dense engine of others in the same run, on the worst workload and on the
best.

| folder | processor | cores | version | runs | pruned engine, float32 | bfloat16 | int8 |
|---|---|---|---|---|---|---|---|
"""


def write_index(folder: Path) -> None:
    """Write README.md from the ``engines.json`` of every folder inside."""
    found = [(path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*/engines.json")]
    lines = [_line(path, result) for path, result in sorted(found, key=lambda pair: pair[0].name)]
    (folder / "README.md").write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


def _line(path: Path, result: Mapping[str, Any]) -> str:
    about, runs = result["about"], result["runs"]
    page = "README.md" if (path / "README.md").exists() else "engines.md"
    versions = sorted({run.get("versions", about["versions"])["token-pruning"] for run in runs})
    cells = [
        f"[{path.name}]({path.name}/{page})",
        about["cpu"],
        str(about["processors"]),
        ", ".join(versions),
        str(len(runs)),
        *(_range(runs, dtype) for dtype in ("float32", "bfloat16", "int8")),
    ]
    return f"| {' | '.join(cells)} |"


def _range(runs: list[Mapping[str, Any]], dtype: str) -> str:
    rows = (run["engines"].get("engine, pruned", {}) for run in runs if run["dtype"] == dtype)
    ratios = [row["to_best_dense"]["median"] for row in rows if "to_best_dense" in row]
    return f"{min(ratios):.2f}× – {max(ratios):.2f}×" if ratios else ""
