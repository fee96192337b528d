"""Evaluating checkpoints side by side, and writing what was found."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from token_pruning.checkpoint import Checkpoint, read_checkpoint
from token_pruning.errors import ConfigError
from token_pruning.families import shape_of
from token_pruning.lab.analysis.options import AnalyzeOptions
from token_pruning.lab.analysis.page import markdown, trajectories
from token_pruning.lab.analysis.plots import layer_plot, length_plot, outcome_plot
from token_pruning.lab.data import Task, TaskData
from token_pruning.lab.evaluation import length_order, predict
from token_pruning.lab.files import try_folder, write_files
from token_pruning.lab.metrics import compute_metrics
from token_pruning.lab.quantities import (
    Array,
    correlation,
    kept_fractions,
    quantile_groups,
    spread,
    spread_over_lengths,
)
from token_pruning.lab.report.page import load_template
from token_pruning.lab.training.features import collator
from token_pruning.lab.training.load import load_split, other_architecture
from token_pruning.pruners import FixedThreshold, Pruner, Unpruned
from token_pruning.pruners.budgets import at_budget
from token_pruning.runtime.explanation import explain_tokens
from token_pruning.runtime.flops import flops_from_lengths
from token_pruning.runtime.prune import attachment_of, unprune
from token_pruning.runtime.trace import ComputedLengths

_THIRDS = ("smallest errors", "middle errors", "largest errors")


def analyze(options: AnalyzeOptions, load_data: Callable[[Checkpoint], TaskData], *, command: str) -> Path:
    """Write ``analysis.json``, ``analysis.md``, its plots and ``trajectories.html``: all of them or none.

    Kim et al. (2022) compare methods by the length of their inputs, by layer, and over single texts. Every checkpoint
    is evaluated on the first validation split, pruned as its ``config.json`` says, dense if it names no
    ``prune_mode``; one for several budgets at each that is asked for. Quantiles of length and samples are the first
    checkpoint's where tokenizers differ. With no samples no text is written anywhere.

    Args:
        options: what to do.
        load_data: gives the task's examples, from the checkpoint (whose labels may matter).
        command: stands above the tables.

    Returns:
        The path of ``analysis.md``.

    Raises:
        TokenPruningError: for a bad checkpoint, data set or value.
    """
    load_template("trajectories.html")  # says what is missing before minutes of work
    try_folder("--output-dir", options.output_dir)
    checkpoints = [read_checkpoint(path) for path in options.restore]
    pruners = [_pruners(checkpoint, options.budgets) for checkpoint in checkpoints]
    if options.budgets and all(None in each for each in pruners):
        raise ConfigError(
            f"--budgets is for checkpoints for several budgets; {' and '.join(options.restore)} "
            f"{'is' if len(pruners) == 1 else 'are'} for none or one"
        )
    data = [load_data(checkpoint) for checkpoint in checkpoints]
    _refuse_two_kinds(options, data)
    task, (split, examples) = data[0].task, next(iter(data[0].validation.items()))
    methods: list[dict[str, Any]] = []
    groups: list[Array] = []
    chosen: list[int] = []
    for name, path, checkpoint, budgets, loaded in zip(
        options.checkpoint_names(), options.restore, checkpoints, pruners, data, strict=True
    ):
        model, tokenizer, features = load_split(checkpoint, loaded.task, loaded.validation[split], options.max_length)
        lengths = np.array([len(feature["input_ids"]) for feature in features])
        groups = groups or quantile_groups(lengths, options.quantiles)
        chosen = chosen or spread_over_lengths(lengths, options.samples)
        examples.note.say()
        for budget, pruner in budgets.items():
            checkpoint.prune(model, pruner)  # a dense one too: it is packed and recorded then
            method = {
                "name": name if budget is None else f"{name} at {budget:g}",
                "checkpoint": path,
                "budget": budget,
                "prune_mode": None if isinstance(pruner, Unpruned) else pruner.prune_mode,
                **_measure(model, tokenizer, features, loaded.task, groups, chosen, options),
            }
            unprune(model)
            methods.append(method)
            print(
                f"{method['name']}: {task.best_metric} {method['metrics'][task.best_metric]:.4f}, "
                f"kept {method['kept_fraction']:.3f}, relative FLOPs {method['relative_flops']:.3f}"
            )
    about = {"command": command, "task": task.name, "split": split, "regression": task.is_regression,
             "metric": task.best_metric, "examples": len(examples), "samples": chosen}  # fmt: skip
    return _write(options, about | _how(options), methods)


def _refuse_two_kinds(options: AnalyzeOptions, data: Sequence[TaskData]) -> None:
    first = data[0].task
    for path, other in zip(options.restore, data, strict=True):
        if other.task.is_regression != first.is_regression:
            kinds = ["a regression" if is_regression else "a classification"
                     for is_regression in (other.task.is_regression, first.is_regression)]  # fmt: skip
            raise ConfigError(
                f"--restore {path} is {kinds[0]}, {options.restore[0]} {kinds[1]}; they must be of one kind"
            )


def _measure(
    model: Any,
    tokenizer: Any,
    features: list[dict[str, Any]],
    task: Task,
    groups: Sequence[Array],
    chosen: Sequence[int],
    options: AnalyzeOptions,
) -> dict[str, Any]:
    """Run one checkpoint over the examples: its figures, and the tokens of the chosen ones."""
    if torch.cuda.is_available():
        model.to("cuda")
    collate = collator(tokenizer, options.bf16)
    found = predict(model, features, collate, batch_size=options.batch_size, bf16=options.bf16)
    computed, left = found.computed, found.ffn_lengths - found.summary_lengths
    if isinstance(attachment_of(model).token_pruner.pruner, Unpruned):
        # A dense model computes every token of the last layer too.
        computed = ComputedLengths.without_pruning(left)
    order = length_order(features)
    back = np.argsort(order)
    result = figures(
        task,
        found.logits,
        np.array([feature["labels"] for feature in features]),
        ComputedLengths(*(lengths[:, back] for lengths in computed)),
        left[:, back],
        groups,
        shape_of(model.config),
    )
    shown = _shown(task, model.config.id2label, found.logits, features)
    samples = []
    for i in chosen:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=options.bf16):
            explanation = explain_tokens(model, features[i], tokenizer)
        samples.append(
            {
                "tokens": [asdict(token) for token in explanation.tokens],
                "label": shown["labels"][i],
                "prediction": shown["predictions"][i],
            }
        )
    result["examples"] |= shown
    return {"layers": len(left), "seconds": found.seconds, **result, "samples": samples}


def _how(options: AnalyzeOptions) -> dict[str, Any]:
    return {
        "quantiles": options.quantiles,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "dtype": "bfloat16 autocast" if options.bf16 else "float32",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    }


def _write(options: AnalyzeOptions, about: dict[str, Any], methods: list[dict[str, Any]]) -> Path:
    analysis = {**about, "checkpoints": methods}
    contents: dict[str, str | bytes] = {
        "analysis.json": json.dumps(analysis, ensure_ascii=False) + "\n",
        "length.png": length_plot(methods, about["metric"]),
        "layers.png": layer_plot(methods),
        "outcome.png": outcome_plot(methods),
        "analysis.md": markdown(analysis),
    }
    if about["samples"]:
        contents["trajectories.html"] = trajectories(analysis)
    write_files(options.output_dir, contents)
    print(f"written to {options.output_dir / 'analysis.md'}")
    return options.output_dir / "analysis.md"


def figures(
    task: Task,
    logits: Array,
    labels: Array,
    computed: ComputedLengths,
    left: torch.Tensor,
    groups: Sequence[Array],
    shape: Any,
) -> dict[str, Any]:
    """Everything that is counted of one checkpoint.

    Args:
        task: whose metrics.
        logits: ``[examples, labels]`` float32.
        labels: ``[examples]`` class ids in the order of the outputs, or scores.
        computed: the rows computed in each layer, each ``[layers, examples]`` int64.
        left: tokens after each layer's pruning, the same.
        groups: the examples of each quantile of length.
        shape: the model's sizes, a :class:`token_pruning.families.ModelShape`.

    Returns:
        What ``analysis.json`` holds of it.
    """
    tokens, remaining = computed.dense[0].numpy(), left.numpy()
    kept = kept_fractions(tokens, remaining)

    def relative(which: Array) -> float:
        return flops_from_lengths(shape, ComputedLengths(*(lengths[:, which] for lengths in computed)), 1).relative

    def group(which: Array, name: str) -> dict[str, Any]:
        return {"group": name, "examples": len(which), **spread(kept[which])}

    result: dict[str, Any] = {
        "metrics": compute_metrics(task, logits, labels),
        "kept_fraction": float(kept.mean()),
        "relative_flops": relative(np.arange(len(tokens))),
        "by_length": [
            {
                "shortest": int(tokens[which].min()),
                "longest": int(tokens[which].max()),
                "examples": len(which),
                "metrics": compute_metrics(task, logits[which], labels[which]),
                "kept_fraction": float(kept[which].mean()),
                "relative_flops": relative(which),
            }
            for which in groups
        ],
        "by_layer": [
            {"layer": layer, **spread(row / np.maximum(tokens, 1))} for layer, row in enumerate(remaining, start=1)
        ],
        "examples": {"tokens": tokens.tolist(), "tokens_left": remaining.tolist(), "kept_fraction": kept.tolist()},
    }
    if task.is_regression:
        error = np.abs(logits[:, 0] - labels)
        thirds = quantile_groups(error, 3)
        result["by_outcome"] = [
            {**group(which, name), "mean_absolute_error": float(error[which].mean())}
            for name, which in zip(_THIRDS, thirds, strict=False)
        ]
        result["error_correlation"] = correlation(kept, error)
    else:
        right = logits.argmax(axis=1) == labels
        result["by_outcome"] = [group(np.flatnonzero(right), "right"), group(np.flatnonzero(~right), "wrong")]
    return result


def _shown(
    task: Task, names: Mapping[int, str], logits: Array, features: Sequence[Mapping[str, Any]]
) -> dict[str, list[Any]]:
    """Labels and predictions for a reader: names of classes, or scores."""
    labels = [feature["labels"] for feature in features]
    if task.is_regression:
        return {"labels": labels, "predictions": [round(score, 4) for score in logits[:, 0].tolist()]}
    return {
        "labels": [names[label] for label in labels],
        "predictions": [names[label] for label in logits.argmax(axis=1).tolist()],
    }


def _pruners(checkpoint: Checkpoint, budgets: Sequence[float] | None) -> dict[float | None, Pruner]:
    """By budget, what a checkpoint is pruned by; under None as it was saved."""
    if (other := other_architecture(checkpoint)) is not None:
        raise ConfigError(
            f"--restore {checkpoint.path} is {other}; it must be a sequence-classification or regression model"
        )
    pruner = Unpruned() if checkpoint.config.get("prune_mode") is None else checkpoint.pruner()
    if not budgets or not isinstance(pruner, FixedThreshold) or not pruner.budgets:
        return {None: pruner}
    lowest = pruner.budgets[0].relative_flops
    if min(budgets) < lowest:
        raise ConfigError(f"--budgets gives {min(budgets):g}; the lowest of {checkpoint.path} is {lowest:g}")
    return {budget: pruner.at(at_budget(pruner.budgets, budget)) for budget in budgets}
