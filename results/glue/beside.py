"""Methods beside each other from the same dense models: METHOD.md and METHOD.json, out of the runs of runs.py.

python results/glue/beside.py METHOD [RUNS]     (METHOD is elastic or context; without RUNS from METHOD.json)
"""

import json
import sys
from pathlib import Path
from typing import Any

from table import BUDGETS, HERE, TASKS, points

ALL_BUDGETS = ("0.70", *BUDGETS)
COLUMNS = {
    "elastic": {"budget": "trained for it alone", "elastic": "one checkpoint for all"},
    "context": {
        "searched": "nothing trained",
        "budget": "trained, summary tokens",
        "context": "trained, context",
        "continued": "calibrated, then trained",
    },
}


def gather(runs: Path, methods: list[str]) -> list[dict[str, Any]]:
    """Per task and seed, points and relative FLOPs of every run."""
    found = []
    for task in TASKS:
        for folder in sorted((runs / task).glob("seed*")):
            cells = {}
            for name in ["dense", *(f"{method}-{budget}" for budget in ALL_BUDGETS for method in methods)]:
                file = folder / name / "eval_results.json"
                if file.exists():
                    result = json.loads(file.read_text(encoding="utf-8"))
                    cells[name] = [points(task, result), result["relative_flops"]]
            if cells.keys() - {"dense"}:
                found.append({"task": task, "seed": folder.name.removeprefix("seed"), "runs": cells})
    return found


def table(found: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Points lost, and in brackets relative FLOPs."""
    lines = [f"| task | seed | dense | budget | {' | '.join(columns.values())} |", "|---" * (4 + len(columns)) + "|"]
    for each in found:
        dense = each["runs"]["dense"][0]
        for budget in ALL_BUDGETS:
            runs = [each["runs"].get(f"{method}-{budget}") for method in columns]
            if any(runs):
                cells = [f"{dense - run[0]:+.1f} ({run[1]:.3f})".replace("-", "−") if run else "–" for run in runs]
                lines.append(f"| {each['task']} | {each['seed']} | {dense:.1f} | {budget} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    method, *runs = sys.argv[1:]
    data = HERE / f"{method}.json"
    if runs:
        data.write_text(json.dumps(gather(Path(runs[0]), list(COLUMNS[method])), indent=1) + "\n", encoding="utf-8")
    everything = json.loads(data.read_text(encoding="utf-8"))
    (HERE / f"{method}.md").write_text(table(everything, COLUMNS[method]), encoding="utf-8")
