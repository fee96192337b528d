"""What says best which tokens may leave: every signal at the same FLOPs, on embeddings, retrieval and reranking.

    python benchmarks/signals.py --data DATA --model FOLDER --output results/signals/signals

``calibrate`` compares its rules by divergence, without labels. Here the best rule of each signal, by that divergence,
is scored on the task itself: who decides (vocabulary gate, probe, attention received), by what (attention or
influence), and after one layer or several. FOLDER holds the reranker of ``reranking.py train``. Nothing is trained. The
correction of embeddings, which would help all alike, is left out but in the last row: what ``calibrate`` takes.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comparison
import cross_encoder
import embeddings
import numpy as np
import reranking
from comparison import Rows
from numpy.typing import NDArray
from tasks import read_reranking, read_retrieval, read_similarity

import token_pruning as tp
from token_pruning.budget.comparison import likely_divergence
from token_pruning.budget.fitting import Fit

TASKS = ("sts", "paragraphs", "reranking")
Outcome = Callable[[Any], NDArray[np.float64]]


def signal(fit: Fit) -> tuple[str, bool]:
    """Who decides and by what, and whether after several layers."""
    parts = [part for part in fit.rule.split(", ") if part.startswith(("gate", "probe", "attention"))]
    decides = parts[-1].removesuffix(fit.schedule.name).strip()
    return decides, sum(weight > 0 for weight in fit.schedule.weights) > 1


def best_of_each(found: tp.Calibration) -> list[Fit]:
    """Each signal's rule with the least divergence on the same examples, with its most exact thresholds."""
    exact: dict[str, Fit] = {}
    compared: dict[str, Fit] = {}
    for fit in found.candidates:  # those fitted to all held-out examples come first
        if not fit.rule.endswith("corrected"):
            exact.setdefault(fit.rule, fit)
            compared[fit.rule] = fit
    best: dict[tuple[str, bool], Fit] = {}
    for fit in sorted(compared.values(), key=likely_divergence):
        best.setdefault(signal(fit), exact[fit.rule])
    return list(best.values())


def measure(model: Any, task: Any, outcome: Outcome, title: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A table: one task."""
    dense = outcome(model)
    rows = Rows(task, dense, [name for name in ("all", "late") if name in task.groups])
    rows.add("dense", 1.0, dense)
    for target in arguments.costs:
        found = tp.calibrate(model, task.calibration, target_flops=target)
        tp.unprune(model)
        for fit in [*best_of_each(found), found.chosen]:
            tp.prune(model, fit.pruner)
            fast = tp.compile(model, dtype="float32", threads=arguments.threads)
            with tp.record(fast) as trace:
                scored = outcome(fast)
            tp.unprune(model)
            what = f"{target:g}, taken: {fit.rule}" if fit is found.chosen else f"{target:g}, {fit.rule}"
            rows.add(what, tp.count_flops(fast, trace).relative, scored, divergence=fit.divergence)
    about = f"Calibrated on {len(task.calibration):,} other texts or pairs. float32."
    return comparison.table(title, about, f"{task.measure} × 100", rows.rows, arguments)


def signals(arguments: argparse.Namespace) -> None:
    for name in arguments.tasks:
        task: Any
        if name == "reranking":
            task, model = read_reranking(arguments.data, arguments.questions), cross_encoder.load(arguments.model)
            found = measure(
                model,
                task,
                lambda model, task=task: task.outcome(reranking.predictor(model)(task.pairs)),  # type: ignore[misc]
                "MiniLM-L6 cross-encoder, SQuAD",
                arguments,
            )
        else:
            task = read_similarity(arguments.data, 500) if name == "sts" else read_retrieval(arguments.data)
            encoder = embeddings.load("all-MiniLM-L6-v2")
            asked = list(task.questions)
            questions = embeddings.encoder(encoder)(asked) if asked else np.empty((0, 0), np.float32)
            found = measure(
                encoder,
                task,
                lambda model, task=task, questions=questions: task.outcome(  # type: ignore[misc]
                    embeddings.encoder(model)(task.texts), questions
                ),
                f"all-MiniLM-L6-v2, {task.name}",
                arguments,
            )
        comparison.publish(found, arguments, comparison.quality_lines)
        arguments.add = True  # this command's own tables stay


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with glue/STS-B and squad2/half-dev-v2.0.json")
    parser.add_argument("--model", type=Path, help="the trained reranker, for reranking")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--costs", type=float, nargs="+", default=[0.45], help="relative FLOPs")
    parser.add_argument("--questions", type=int, default=400, help="of the reranker")
    comparison.add_arguments(parser)
    parser.set_defaults(command="signals")
    arguments = parser.parse_args()
    if "reranking" in arguments.tasks and arguments.model is None:
        parser.error("--tasks reranking needs --model")
    return arguments


if __name__ == "__main__":
    comparison.carry_out(parse_arguments(), {"signals": signals})
