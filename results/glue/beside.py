"""A method beside ``budget`` from the same dense models: METHOD.md and METHOD.json, out of the runs of runs.py.

python results/glue/runs.py GLUE_FOLDER RUNS --methods dense budget METHOD --dtype float32
python results/glue/beside.py METHOD RUNS     (METHOD is elastic or context)
"""

import json
import sys
from pathlib import Path
from typing import Any

from table import BUDGETS, HERE, TASKS, points

COLUMNS = {
    "elastic": ("trained for it alone", "one checkpoint for all"),
    "context": ("summary tokens", "context"),
}


def result(folder: Path) -> dict[str, Any] | None:
    file = folder / "eval_results.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def gather(runs: Path, method: str) -> list[dict[str, Any]]:
    """Per task and seed, points and relative FLOPs of every run."""
    found = []
    for task in TASKS:
        for folder in sorted((runs / task).glob("seed*")):
            names = ["dense", *(f"{each}-{budget}" for budget in BUDGETS for each in ("budget", method))]
            results = {name: each for name in names if (each := result(folder / name)) is not None}
            if any(name.startswith(method) for name in results):
                cells = {name: [points(task, each), each["relative_flops"]] for name, each in results.items()}
                found.append({"task": task, "seed": folder.name.removeprefix("seed"), "runs": cells})
    return found


def table(found: list[dict[str, Any]], method: str) -> str:
    lines = [f"| task | seed | dense | budget | {' | '.join(COLUMNS[method])} | difference |", "|" + "---|" * 7]
    for each in found:
        for budget in BUDGETS:
            own, other = each["runs"].get(f"budget-{budget}"), each["runs"].get(f"{method}-{budget}")
            if other is None:
                continue
            cells = [f"{run[0]:.1f} ({run[1]:.3f})" if run else "–" for run in (own, other)]
            difference = f"{other[0] - own[0]:+.1f}".replace("-", "−") if own else "–"
            dense = f"{each['runs']['dense'][0]:.1f}"
            lines.append(
                f"| {each['task']} | {each['seed']} | {dense} | {budget} | {' | '.join(cells)} | {difference} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    method = sys.argv[1]
    everything = gather(Path(sys.argv[2]), method)
    (HERE / f"{method}.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    (HERE / f"{method}.md").write_text(table(everything, method), encoding="utf-8")
