"""Evaluation: the task's metrics, FLOPs three ways, tokens kept, and seconds."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from token_pruning.families import shape_of
from token_pruning.lab.files import write_json
from token_pruning.runtime.flops import flops_from_lengths
from token_pruning.runtime.prune import attachment_of, is_pruned, record
from token_pruning.runtime.trace import ComputedLengths

Features = Sequence[Mapping[str, Any]]
Collate = Callable[[list[Any]], Mapping[str, torch.Tensor]]


@dataclass
class Evaluation:
    """What one evaluation found.

    Attributes:
        metrics: the task's metrics, as fractions.
        gflops_per_example: ``padded`` to the maximum length, ``dense`` on valid tokens, ``pruned``; 10⁹ operations.
        relative_flops: pruned ÷ dense.
        tokens_entering: mean number of valid tokens.
        tokens_in_first_layer: mean number of them that the vocabulary threshold lets into the first layer.
        tokens_kept_per_layer: mean number of tokens that enter each layer's feed-forward, summaries not counted.
        summaries_per_layer: mean number of summary tokens among what enters each layer's feed-forward; None without.
        thresholds: one per layer, or None for methods without.
        examples: how many.
        seconds: spent in forward passes.
    """

    metrics: dict[str, float]
    gflops_per_example: dict[str, float]
    relative_flops: float
    tokens_entering: float
    tokens_in_first_layer: float
    tokens_kept_per_layer: list[float]
    summaries_per_layer: list[float] | None
    thresholds: list[float] | None
    examples: int
    seconds: float


def evaluate(
    model: nn.Module,
    features: Features,
    collate: Collate,
    compute_metrics: Callable[[np.ndarray, np.ndarray], dict[str, float]],
    *,
    batch_size: int,
    max_seq_length: int = 128,
    bf16: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Run a model, pruned or not, over a data set.

    Examples are taken in order of length, so that a dense model wastes little on padding.

    Args:
        model: a Hugging Face model with a sequence-classification or regression head.
        features: tokenized examples with ``input_ids`` and ``labels``.
        collate: makes a padded batch of tensors from a list of features.
        compute_metrics: from logits ``[examples, labels]`` and labels ``[examples]`` to metrics.
        batch_size: examples per forward pass.
        max_seq_length: what sequences are padded to for the padded FLOPs of an unpruned model, in tokens.
        bf16: bfloat16 autocast.
        progress: show a progress bar.
    """
    found = predict(model, features, collate, batch_size=batch_size, bf16=bf16, progress=progress)
    labels = np.array([feature["labels"] for feature in features])
    thresholds = None
    if is_pruned(model):
        token_pruner = attachment_of(model).token_pruner
        max_seq_length = token_pruner.pruner.max_seq_length
        if token_pruner.thresholds is not None:
            thresholds = token_pruner.thresholds.tolist()
    flops = flops_from_lengths(shape_of(model.config), found.computed, max_seq_length)
    return Evaluation(
        metrics=compute_metrics(found.logits, labels),
        gflops_per_example=flops.gflops(),
        relative_flops=flops.relative,
        tokens_entering=found.computed.dense[0].float().mean().item(),
        tokens_in_first_layer=found.computed.keys[0].float().mean().item(),
        tokens_kept_per_layer=(found.ffn_lengths - found.summary_lengths).float().mean(1).tolist(),
        summaries_per_layer=found.summary_lengths.float().mean(1).tolist() if found.summary_lengths.any() else None,
        thresholds=thresholds,
        examples=len(features),
        seconds=found.seconds,
    )


class Predictions(NamedTuple):
    """What :func:`predict` found.

    Attributes:
        logits: ``[examples, labels]`` float32, in the features' order.
        computed: rows computed, ``[layers, examples]`` int64 each, in the order of :func:`length_order`.
        ffn_lengths: of :class:`token_pruning.Trace`, in the same order; ``summary_lengths`` alike.
        summary_lengths: see ``ffn_lengths``.
        seconds: spent in forward passes.
    """

    logits: np.ndarray
    computed: ComputedLengths
    ffn_lengths: torch.Tensor
    summary_lengths: torch.Tensor
    seconds: float


def length_order(features: Features) -> list[int]:
    """The order in which examples are run: the longest first, equal ones as they come."""
    return sorted(range(len(features)), key=lambda i: len(features[i]["input_ids"]), reverse=True)


def predict(
    model: nn.Module,
    features: Features,
    collate: Collate,
    *,
    batch_size: int,
    bf16: bool = False,
    progress: bool = True,
    description: str = "evaluating",
) -> Predictions:
    """Run a model over a data set.

    Arguments are those of :func:`evaluate`; ``description`` stands before the progress bar.
    """
    device = next(model.parameters()).device
    order = length_order(features)
    logits: list[torch.Tensor] = []
    lengths: list[torch.Tensor] = []
    seconds = 0.0
    was_training = model.training
    model.eval()
    pruned = is_pruned(model)
    try:
        with torch.inference_mode(), record(model) if pruned else nullcontext() as trace:
            starts = range(0, len(order), batch_size)
            for start in tqdm(starts, desc=description, leave=False, disable=not progress):
                batch = dict(collate([features[i] for i in order[start : start + batch_size]]))
                batch.pop("labels", None)
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                began = time.perf_counter()
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    output = model(**batch).logits.float().cpu()  # .cpu() waits for the device
                seconds += time.perf_counter() - began
                logits.append(output)
                if not pruned:
                    lengths.append(batch["attention_mask"].sum(1).cpu())
    finally:
        model.train(was_training)
    if trace is None:
        ffn_lengths = torch.cat(lengths).expand(shape_of(model.config).num_layers, -1)
        summary_lengths = torch.zeros_like(ffn_lengths)
        computed = ComputedLengths.without_pruning(ffn_lengths)
    else:
        computed = ComputedLengths(*(lengths.cpu() for lengths in trace.computed_lengths))
        ffn_lengths, summary_lengths = trace.ffn_lengths.cpu(), trace.summary_lengths.cpu()
    back = torch.tensor(order).argsort()
    return Predictions(torch.cat(logits)[back].numpy(), computed, ffn_lengths, summary_lengths, seconds)


def format_evaluation(name: str, evaluation: Evaluation) -> str:
    """The evaluation as a few lines of text."""
    gflops = evaluation.gflops_per_example
    first = ""
    if evaluation.tokens_in_first_layer < evaluation.tokens_entering:
        first = f", {evaluation.tokens_in_first_layer:.1f} the first layer"
    lines = [
        f"{name}: {evaluation.examples} examples in {evaluation.seconds:.2f} s",
        "  " + ", ".join(f"{metric} {value:.4f}" for metric, value in evaluation.metrics.items()),
        f"  GFLOPs per example: {gflops['padded']:.3f} padded, {gflops['dense']:.3f} dense on valid tokens, "
        f"{gflops['pruned']:.3f} pruned; relative FLOPs {evaluation.relative_flops:.3f}",
        f"  tokens: {evaluation.tokens_entering:.1f} enter{first}; kept per layer "
        + " ".join(f"{kept:.1f}" for kept in evaluation.tokens_kept_per_layer),
    ]
    if evaluation.summaries_per_layer is not None:
        lines.append("  summary tokens: " + " ".join(f"{count:.1f}" for count in evaluation.summaries_per_layer))
    if evaluation.thresholds is not None:
        lines.append("  thresholds: " + " ".join(f"{threshold:.5f}" for threshold in evaluation.thresholds))
    return "\n".join(lines)


def write_evaluation(path: Path, splits: Mapping[str, Evaluation], about: Mapping[str, Any]) -> None:
    """Write ``eval_results.json``, whole or not at all.

    The first split's figures stand at the top level; further ones (MNLI mismatched) under ``other_splits``.

    Args:
        path: the file.
        splits: the evaluations by split.
        about: what was evaluated and how.
    """
    (first, evaluation), *others = splits.items()
    result = {**about, "split": first, **asdict(evaluation)}
    if others:
        result["other_splits"] = {name: asdict(other) for name, other in others}
    write_json(path, result)
