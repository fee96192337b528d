"""A reranker, pruned, through sentence-transformers' CrossEncoder: quality, and seconds of ``rank``.

    python benchmarks/reranking.py train --data DATA --model FOLDER
    python benchmarks/reranking.py quality --data DATA --model FOLDER --output results/reranking/quality
    python benchmarks/reranking.py speed --data DATA --model FOLDER --threads 1 --output results/reranking/speed

The model is all-MiniLM-L6-v2, fine-tuned for one epoch on 3,600 question × paragraph pairs of eleven SQuAD articles
(tasks.py, cross_encoder.py). It is measured on questions of the other five, each with its paragraph and nine others of
the same article. Pruning is calibrated on 120 × 8 pairs of the training articles, without labels. A distilled model was
also trained, over other pairs of these articles, to give the dense scores; a shallow one is the dense model's first
layers, trained alike. Truncation is granted what pruning has: in the last layer first tokens only. Intervals are of
2,000 bootstrap samples of questions, the same for the dense and the other model.

Speed is of ``rank`` on one query and fifty passages, several queries a pass. All rows take turns in one process, with
the batch size that was each one's fastest, but for sentence-transformers as installed.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import comparison
import cross_encoder
import numpy as np
import timing
import torch
from comparison import COSTS, Rows, cut_to
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder
from tasks import Predict, Reranking, read_reranking

import token_pruning as tp

METHODS = ("dense", "truncated", "pruned")
TRAINED, SHALLOW = "distilled", "shallow"  # these take minutes a row: only where they are asked for
PASSAGES = 50
JUDGED = 100  # questions that tell whether an engine scores as the dense model does


def predictor(model: CrossEncoder, batch_size: int = 8) -> Predict:
    """Scores before the sigmoid, which rounds the surest ones to the same number."""

    def predict(pairs: list[tuple[str, str]]) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = model.predict(
            pairs, batch_size=batch_size, activation_fn=torch.nn.Identity(), show_progress_bar=False
        )
        return scores

    return predict


def truncating(model: CrossEncoder, length: int) -> Predict:
    """Scores the first ``length`` tokens of each pair; the longer text of the two is cut."""

    def predict(pairs: list[tuple[str, str]]) -> NDArray[np.float32]:
        with cut_to(model, length):
            return predictor(model)(pairs)

    return predict


def token_counts(model: CrossEncoder, pairs: Sequence[tuple[str, str]]) -> list[int]:
    """Tokens per pair, those added included, cut to what the model takes."""
    first, second = map(list, zip(*pairs, strict=True))
    found = model.tokenizer(first, second, truncation="longest_first", max_length=model.max_seq_length)["input_ids"]
    return [len(ids) for ids in found]


def train(arguments: argparse.Namespace) -> None:
    task = read_reranking(arguments.data, questions=0)
    seconds = cross_encoder.train(task.training, arguments.model)
    print(f"{arguments.model}: trained on {len(task.training):,} pairs in {seconds:.0f} seconds")


# Quality


def quality(arguments: argparse.Namespace) -> None:
    task, model = read_reranking(arguments.data, arguments.questions), cross_encoder.load(arguments.model)
    model.to(arguments.device)
    config, counts = model[0].model.config, token_counts(model, task.pairs)

    def outcome(predict: Predict) -> NDArray[np.float64]:
        return task.outcome(predict(task.pairs))

    dense = outcome(predictor(model))
    rows = Rows(task, dense, list(task.groups))
    if "dense" in arguments.methods:
        rows.add("dense", 1.0, dense, tokens=float(np.mean(counts)))
    if "truncated" in arguments.methods:
        for length in comparison.truncation_lengths(config, counts, arguments.costs, first_only=True):
            cost = comparison.truncation_cost(config, counts, length, first_only=True)
            tokens = float(np.minimum(counts, length).mean())
            rows.add(f"truncated to {length} tokens", cost, outcome(truncating(model, length)), tokens=tokens)
    if "pruned" in arguments.methods:
        for target in arguments.costs:
            rows.add(f"pruned to {target}", **pruned(model, task, outcome, target))
    if TRAINED in arguments.methods:
        for target, seed in product(arguments.costs, arguments.seeds):
            what = f"distilled to {target} {comparison.training(task, 'pairs', seed, arguments)}"
            rows.add(what, **distilled(task, outcome, target, seed, arguments))
    if SHALLOW in arguments.methods:
        for layers, seed in product(arguments.layers, arguments.seeds):
            first = comparison.shallow(
                lambda: cross_encoder.load(arguments.model), task, layers, seed, "reranker", arguments
            )
            what = f"first {layers} layers, distilled {comparison.training(task, 'pairs', seed, arguments)}"
            measured = cells(first, outcome)
            rows.add(what, **measured | {"cost": measured["cost"] * layers / config.num_hidden_layers})
    found = comparison.table(
        "MiniLM-L6 cross-encoder, SQuAD",
        f"{len(task.questions)} questions, each with its paragraph and {len(task.passages[0]) - 1} others of the same "
        f"article; for {len(task.late)} the answer is in the paragraph's second half (late). Calibrated on "
        f"{len(task.calibration)} pairs of other articles. float32.",
        f"{task.measure} × 100",
        rows.rows,
        arguments,
    )
    comparison.publish(found, arguments, comparison.quality_lines)


def pruned(
    model: CrossEncoder, task: Reranking, outcome: Callable[[Predict], NDArray[np.float64]], target: float
) -> dict[str, Any]:
    """The cells of a pruned model."""
    started = time.perf_counter()
    rule = tp.calibrate(model, task.calibration, target_flops=target).chosen.rule
    seconds = time.perf_counter() - started
    try:
        return {**cells(model, outcome), "calibration_seconds": seconds, "rule": rule}
    finally:
        tp.unprune(model)


def cells(model: CrossEncoder, outcome: Callable[[Predict], NDArray[np.float64]]) -> dict[str, Any]:
    fast = comparison.fastest(model)
    with tp.record(fast) as trace:
        found = outcome(predictor(fast))
    return {"cost": tp.count_flops(model, trace).relative, "outcome": found}


def distilled(
    task: Reranking,
    outcome: Callable[[Predict], NDArray[np.float64]],
    target: float,
    seed: int,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """The cells of a model that was calibrated on the same pairs as a pruned one, and then trained on others."""
    model, more = comparison.distilled(
        lambda: cross_encoder.load(arguments.model), task, target, seed, "reranker", arguments
    )
    return {**cells(model, outcome), **more}


# Speed


def speed(arguments: argparse.Namespace) -> None:
    task = read_reranking(arguments.data, JUDGED)
    generator = random.Random(0)
    everything = list(dict.fromkeys(text for texts in task.passages for text in texts))
    rankings = [(query, generator.sample(everything, PASSAGES)) for query in task.questions[: arguments.queries]]
    dense = predictor(cross_encoder.load(arguments.model))(task.pairs)

    def run(model: CrossEncoder, batch_size: int) -> Callable[[], Any]:
        def rank_all() -> None:
            for query, passages in rankings:
                model.rank(query, passages, batch_size=batch_size, show_progress_bar=False)

        return rank_all

    def facts(model: CrossEncoder) -> dict[str, Any]:
        scores = predictor(model)(task.pairs)
        score = task.score(task.outcome(scores), task.groups["all"])
        return {"score": score, "agreement": float(np.corrcoef(scores, dense)[0, 1])}

    with tempfile.TemporaryDirectory() as folder:
        bench = timing.Bench(lambda: cross_encoder.load(arguments.model), task.calibration, Path(folder), arguments)
        rows = bench.measure(run, facts)
    counts = token_counts(
        cross_encoder.load(arguments.model), [(query, text) for query, texts in rankings for text in texts]
    )
    found = comparison.table(
        f"rank, one query × {PASSAGES} passages, {comparison.threads_line(arguments.threads)}",
        f"Seconds for {len(rankings)} queries of {PASSAGES} passages each, {np.mean(counts):.1f} tokens a pair; "
        f"{arguments.passes} passes.",
        f"{task.measure} × 100, {len(task.questions)} questions",
        rows,
        arguments,
        agreement="correlation with the dense scores",
    )
    comparison.publish(found, arguments, timing.lines, timing.settings(), whole=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--data", type=Path, required=True, help="folder with squad2/half-dev-v2.0.json")
    shared.add_argument(
        "--model",
        type=Path,
        default=Path(tempfile.gettempdir()) / "token-pruning" / "cross-encoder",
        help="where `train` leaves the model and the others find it (default: %(default)s)",
    )
    commands.add_parser("train", parents=[shared], help="fine-tune the reranker; some twenty minutes on two cores")
    measuring = argparse.ArgumentParser(add_help=False)
    comparison.add_arguments(measuring)
    first = commands.add_parser("quality", parents=[shared, measuring], help="scores beside FLOPs")
    first.add_argument("--questions", type=int, default=400, help="to measure on, at most 1,000")
    first.add_argument("--methods", nargs="+", choices=(*METHODS, TRAINED, SHALLOW), default=list(METHODS))
    comparison.add_training(first)
    first.add_argument("--costs", type=float, nargs="+", default=list(COSTS), help="relative FLOPs")
    second = commands.add_parser("speed", parents=[shared, measuring], help="seconds of rank")
    second.add_argument("--queries", type=int, default=3, help="rankings a pass")
    timing.add_arguments(second)
    return parser.parse_args()


if __name__ == "__main__":
    comparison.carry_out(parse_arguments(), {"train": train, "quality": quality, "speed": speed})
