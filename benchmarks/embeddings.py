"""Sentence embeddings, pruned, through sentence-transformers: quality, and seconds of ``encode``.

    python benchmarks/embeddings.py quality --data DATA --output results/embeddings/quality
    python benchmarks/embeddings.py speed --data DATA --threads 1 --output results/embeddings/speed

Quality: STS-B's sentences, questions → paragraphs of SQuAD, and questions → long documents (see tasks.py). Truncation
is to the length that costs as many FLOPs. Thresholds and everything else are fitted on other texts, without labels; a
distilled model was then trained, over more of them, to give the dense vectors; a shallow one is the dense model's first
layers, trained alike. Questions are always encoded by the dense model. Intervals are of 2,000 bootstrap samples of
pairs or questions, the same for the dense and the other model.

Speed: all rows take turns in one process (A B C A B C) on the same texts, tokenizing and pooling included. Medians, and
medians of the passes' ratios. Every row but sentence-transformers as installed has the batch size that was its fastest.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import comparison
import numpy as np
import timing
import torch
from comparison import COSTS, Rows, cut_to
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from tasks import (
    DISTILLATION_TEXTS,
    STS_CALIBRATION,
    Encode,
    Retrieval,
    Similarity,
    read_long,
    read_retrieval,
    read_similarity,
)

import token_pruning as tp
from token_pruning.lab.data import find_minilm, find_mpnet

MODELS: dict[str, Callable[[], Any]] = {"all-MiniLM-L6-v2": find_minilm, "all-mpnet-base-v2": find_mpnet}
TASKS = ("sts", "paragraphs", "long")
METHODS = ("dense", "truncated", "pruned")
TRAINED, SHALLOW = "distilled", "shallow"  # these take minutes a row: only where they are asked for
WINDOW = 256
BATCH_SIZE = 8


def load(name: str) -> SentenceTransformer:
    return SentenceTransformer(str(MODELS[name]()), device="cpu", local_files_only=True)


def encoder(model: SentenceTransformer, batch_size: int = BATCH_SIZE) -> Encode:
    def encode(texts: list[str]) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = model.encode(
            texts, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False
        )
        return vectors

    return encode


def token_counts(model: SentenceTransformer, texts: Sequence[str], longest: int | None) -> list[int]:
    """Tokens per text, those added at both ends included, cut to ``longest``."""
    found = model.tokenizer(list(texts), truncation=longest is not None, max_length=longest, verbose=False)["input_ids"]
    return [len(ids) for ids in found]


def truncating(model: SentenceTransformer, length: int) -> Encode:
    """Encodes the first ``length`` tokens of each text."""

    def encode(texts: list[str]) -> NDArray[np.float32]:
        with cut_to(model, length):
            return encoder(model)(texts)

    return encode


def in_windows(model: SentenceTransformer, size: int) -> Encode:
    """Encodes each text as windows of ``size`` tokens: the mean over all tokens' last states."""

    @torch.inference_mode()
    def encode(texts: list[str]) -> NDArray[np.float32]:
        tokenizer, vectors = model.tokenizer, []
        for text in texts:
            first, *ids, last = tokenizer(text, verbose=False)["input_ids"]
            parts = [ids[start : start + size - 2] for start in range(0, len(ids), size - 2)]
            windows = [[first, *part, last] for part in parts]
            features = dict(tokenizer.pad({"input_ids": windows}, return_tensors="pt"))
            means = model[1](model[0](features))["sentence_embedding"]
            vectors.append((means * torch.tensor([[len(ids)] for ids in windows])).sum(0))
        return torch.nn.functional.normalize(torch.stack(vectors), dim=1).numpy()

    return encode


def window_counts(counts: Sequence[int], size: int) -> list[int]:
    """Tokens of every window, from whole texts' tokens."""
    room = size - 2
    return [min(room, count - 2 - start) + 2 for count in counts for start in range(0, count - 2, room)]


# Quality


def measure(name: str, task: Similarity | Retrieval, calibration: Sequence[int], arguments: argparse.Namespace) -> Any:
    """A table: one model on one task."""
    model = load(name).to(arguments.device)
    questions = encoder(model)(list(task.questions)) if task.questions else np.empty((0, 0), np.float32)
    config, counts = model[0].model.config, token_counts(model, task.texts, model.max_seq_length)
    base = comparison.flops_of(config, counts)

    def outcome(encode: Encode) -> NDArray[np.float64]:
        return task.outcome(encode(task.texts), questions)

    dense = outcome(encoder(model))
    rows = Rows(task, dense, [group for group in ("all", "late") if group in task.groups])
    if "dense" in arguments.methods:
        rows.add("dense", 1.0, dense, tokens=float(np.mean(counts)))
    if "truncated" in arguments.methods:
        for length in comparison.truncation_lengths(config, counts, arguments.costs, first_only=False):
            cost = comparison.truncation_cost(config, counts, length, first_only=False)
            tokens = float(np.minimum(counts, length).mean())
            rows.add(f"truncated to {length} tokens", cost, outcome(truncating(model, length)), tokens=tokens)
    for size in calibration if "pruned" in arguments.methods else ():
        for target in arguments.costs:
            what = f"pruned to {target}, calibrated on {min(size, len(task.calibration)):,} texts"
            rows.add(what, **pruned(model, task, base, outcome, calibration=size, target_flops=target))
    if TRAINED in arguments.methods:
        for target, seed in product(arguments.costs, arguments.seeds):
            what = f"distilled to {target} {comparison.training(task, 'texts', seed, arguments)}"
            rows.add(what, **distilled(name, task, base, outcome, target, seed, arguments))
    if SHALLOW in arguments.methods:
        for layers, seed in product(arguments.layers, arguments.seeds):
            kept = f"{name}-{task.name}"
            first = comparison.shallow(lambda: load(name), task, layers, seed, kept, arguments)
            what = f"first {layers} layers, distilled {comparison.training(task, 'texts', seed, arguments)}"
            rows.add(what, **cells(first, task, base, outcome))
    return table(name, task, rows, arguments)


def measure_long(name: str, task: Retrieval, arguments: argparse.Namespace) -> Any:
    """The same for documents that are longer than what the model takes."""
    model = load(name)
    model.max_seq_length = WINDOW
    questions = encoder(model)(task.questions)
    config, counts = model[0].model.config, token_counts(model, task.texts, None)
    most = config.max_position_embeddings - (2 if config.model_type in ("mpnet", "roberta") else 0)
    base = comparison.flops_of(config, np.minimum(counts, WINDOW).tolist())

    def outcome(encode: Encode) -> NDArray[np.float64]:
        return task.outcome(encode(task.texts), questions)

    dense = outcome(truncating(model, WINDOW))
    rows = Rows(task, dense, ["all"])
    if "dense" in arguments.methods:
        rows.add(f"the first {WINDOW} tokens", 1.0, dense, tokens=float(np.minimum(counts, WINDOW).mean()))
        first = np.minimum(counts, most).tolist()
        cost = comparison.flops_of(config, first) / base
        rows.add(f"the first {most} tokens", cost, outcome(truncating(model, most)), tokens=float(np.mean(first)))
        windows = window_counts(counts, WINDOW)
        cost = comparison.flops_of(config, windows) * len(windows) / len(counts) / base
        what = f"all, in windows of {WINDOW} encoded one by one"
        rows.add(what, cost, outcome(in_windows(model, WINDOW)), tokens=sum(windows) / len(counts))
    if "pruned" in arguments.methods:
        for chunks, name_ in ((False, f"{WINDOW} tokens in spans"), (True, f"all, in chunks of {WINDOW}")):
            length = {"max_tokens": WINDOW, **({"chunks": True} if chunks else {})}
            rows.add(f"{name_}, unpruned", **pruned(model, task, base, outcome, **length))
            for target in arguments.long_costs:
                rows.add(
                    f"{name_}, pruned to {target}", **pruned(model, task, base, outcome, target_flops=target, **length)
                )
    return table(name, task, rows, arguments)


def pruned(
    model: SentenceTransformer,
    task: Similarity | Retrieval,
    base: float,
    outcome: Callable[[Encode], NDArray[np.float64]],
    *,
    calibration: int | None = None,
    target_flops: float | None = None,
    **length: Any,
) -> dict[str, Any]:
    """The cells of a pruned model; without ``target_flops`` it only takes what ``length`` says."""
    started, rule = time.perf_counter(), ""
    if target_flops is None:
        tp.prune(model, tp.Unpruned(**length))
    else:
        found = tp.calibrate(model, task.calibration[:calibration], target_flops=target_flops, **length)
        rule = found.chosen.rule
    seconds = time.perf_counter() - started
    try:
        return {**cells(model, task, base, outcome), "calibration_seconds": seconds, "rule": rule}
    finally:
        tp.unprune(model)


def cells(
    model: SentenceTransformer,
    task: Similarity | Retrieval,
    base: float,
    outcome: Callable[[Encode], NDArray[np.float64]],
) -> dict[str, Any]:
    fast = comparison.fastest(model)
    with tp.record(fast) as trace:
        found = outcome(encoder(fast))
    cost = tp.count_flops(model, trace).pruned * len(trace.input_lengths) / len(task.texts) / base
    return {"cost": cost, "outcome": found}


def distilled(
    name: str,
    task: Similarity | Retrieval,
    base: float,
    outcome: Callable[[Encode], NDArray[np.float64]],
    target: float,
    seed: int,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """The cells of a model that was calibrated on the same texts as a pruned one, and then trained on others."""
    model, more = comparison.distilled(lambda: load(name), task, target, seed, f"{name}-{task.name}", arguments)
    return {**cells(model, task, base, outcome), **more}


def table(name: str, task: Similarity | Retrieval, rows: Rows, arguments: argparse.Namespace) -> dict[str, Any]:
    return comparison.table(
        f"{name}, {task.name}",
        f"{task.about[0].upper()}{task.about[1:]}. Calibrated on up to {len(task.calibration):,} other texts. float32.",
        f"{task.measure} × 100",
        rows.rows,
        arguments,
    )


def quality(arguments: argparse.Namespace) -> None:
    for name in arguments.models:
        for task in arguments.tasks:
            if task == "long":
                found = measure_long(name, read_long(arguments.data), arguments)
            elif task == "sts":
                others = DISTILLATION_TEXTS if {TRAINED, SHALLOW} & set(arguments.methods) else 0
                sentences = read_similarity(arguments.data, max(arguments.calibration), distillation=others)
                found = measure(name, sentences, arguments.calibration, arguments)
            else:
                paragraphs = read_retrieval(arguments.data)
                found = measure(name, paragraphs, [len(paragraphs.calibration)], arguments)
            comparison.publish(found, arguments, comparison.quality_lines)
            arguments.add = True  # this command's own tables stay


# Speed


def speed(arguments: argparse.Namespace) -> None:
    for name in arguments.models:
        for which in arguments.tasks:
            task = read_similarity(arguments.data) if which == "sts" else read_retrieval(arguments.data)
            with tempfile.TemporaryDirectory() as folder:
                found = time_encode(name, task, Path(folder), arguments)
            comparison.publish(found, arguments, timing.lines, timing.settings(), whole=True)
            arguments.add = True


def time_encode(name: str, task: Similarity | Retrieval, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A table: one model on one task's texts."""
    model = load(name)
    questions = encoder(model)(list(task.questions)) if task.questions else np.empty((0, 0), np.float32)
    dense = encoder(model)(task.texts)
    texts = task.texts[:: max(1, len(task.texts) // arguments.sample)][: arguments.sample]

    def run(engine: SentenceTransformer, batch_size: int) -> Callable[[], Any]:
        return lambda: encoder(engine, batch_size)(texts)

    def facts(engine: SentenceTransformer) -> dict[str, Any]:
        vectors = encoder(engine)(task.texts)
        score = task.score(task.outcome(vectors, questions), task.groups["all"])
        return {"score": score, "agreement": float((vectors * dense).sum(1).mean())}

    rows = timing.Bench(lambda: load(name), task.calibration, folder, arguments).measure(run, facts)
    counts = token_counts(model, texts, model.max_seq_length)
    return comparison.table(
        f"{name}, {task.name}, {comparison.threads_line(arguments.threads)}",
        f"Seconds of encode for {len(texts)} texts of {np.mean(counts):.1f} tokens on average; "
        f"{arguments.passes} passes.",
        f"{task.measure} × 100, all {len(task.texts):,} texts",
        rows,
        arguments,
        agreement="mean cosine to the dense vectors",
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--data", type=Path, required=True, help="folder with glue/STS-B and squad2/half-dev-v2.0.json")
    shared.add_argument("--models", nargs="+", choices=MODELS, default=["all-MiniLM-L6-v2"])
    comparison.add_arguments(shared)
    first = commands.add_parser("quality", parents=[shared], help="scores beside FLOPs")
    first.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    first.add_argument("--methods", nargs="+", choices=(*METHODS, TRAINED, SHALLOW), default=list(METHODS))
    comparison.add_training(first)
    first.add_argument("--costs", type=float, nargs="+", default=list(COSTS), help="relative FLOPs")
    first.add_argument("--long-costs", type=float, nargs="+", default=[0.6], help="the same for long documents")
    first.add_argument(
        "--calibration", type=int, nargs="+", default=[STS_CALIBRATION, 500], help="sentences of STS-B to calibrate on"
    )
    second = commands.add_parser("speed", parents=[shared], help="seconds of encode")
    second.add_argument("--tasks", nargs="+", choices=TASKS[:2], default=list(TASKS[:2]))
    second.add_argument("--sample", type=int, default=200, help="texts that are timed, evenly spaced among the task's")
    timing.add_arguments(second)
    return parser.parse_args()


if __name__ == "__main__":
    comparison.carry_out(parse_arguments(), {"quality": quality, "speed": speed})
