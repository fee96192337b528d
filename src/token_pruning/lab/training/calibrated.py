"""A checkpoint pruned to a budget without training, from folder to folder."""

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from token_pruning.budget.calibration import Calibration, calibrate
from token_pruning.budget.fitting import Fit
from token_pruning.budget.vocabulary import EXAMPLES as VOCABULARY_EXAMPLES
from token_pruning.budget.vocabulary import vocabulary_gate
from token_pruning.checkpoint import read_checkpoint
from token_pruning.lab.data import TaskData, load_unlabelled
from token_pruning.lab.files import write_json
from token_pruning.lab.metrics import compute_metrics
from token_pruning.lab.training.evaluate import make_evaluator
from token_pruning.lab.training.features import labelled_features, tokenize
from token_pruning.lab.training.load import load_classifier, load_float32, load_tokenizer
from token_pruning.lab.training.options import CalibrateOptions
from token_pruning.lab.training.plan import DataSource, refuse_same_folder, training_examples
from token_pruning.lab.training.run_dir import RunDir

REPORT = "calibration.json"


def calibrate_checkpoint(options: CalibrateOptions, load_data: DataSource) -> Path:
    """Calibrate a dense checkpoint, evaluate it where there is something to evaluate on, and save it.

    Args:
        options: what to do.
        load_data: gives the task, whose training examples are used; not called where ``options.input`` has texts.

    Returns:
        The output folder: a checkpoint with ``calibration.json``, what was compared.

    Raises:
        TokenPruningError: for every mistake of the user.
    """
    base = options.base
    checkpoint = read_checkpoint(base.restore)
    run_dir = RunDir(Path(base.output_dir or checkpoint.path / "calibrated"))
    refuse_same_folder(run_dir, checkpoint, "--restore")
    resume = run_dir.check(options.identity(), overwrite=base.overwrite_output_dir)
    tokenizer = load_tokenizer(checkpoint)
    data: TaskData | None = None
    if options.input is not None:
        model: Any = load_float32(checkpoint)
        texts = load_unlabelled(options.input)
        features = tokenize(tokenizer, texts, model, base.max_length)
    else:
        data = load_data(checkpoint)
        model = load_classifier(checkpoint, data.task)
        features = labelled_features(tokenizer, training_examples(data), data.task, model, base.max_length)
    random.Random(base.seed).shuffle(features)

    result = calibrate(
        model,
        features[: options.examples],
        base.target_flops,
        max_drop=options.max_drop,
        metric=None if data is None else _metric(data),
        summary_tokens=options.summary_tokens,
        prune_layers=options.prune_layers,
        vocabulary=vocabulary_gate(model, features[:VOCABULARY_EXAMPLES]) if options.vocabulary else None,
        seed=base.seed,
    )
    (texts.note if data is None else data).say()
    print(format_calibration(result))
    run_dir.start(options.identity(), resume=resume)
    if data is not None:
        make_evaluator(tokenizer, data, model, base, run_dir.path)(model)
    write_json(run_dir.path / REPORT, _report(result))
    run_dir.save_model(model, tokenizer)
    run_dir.finish(options.identity())
    print(f"saved to {run_dir.path}")
    return run_dir.path


def _metric(data: TaskData) -> Any:
    def metric(logits: Tensor, labels: Tensor) -> float:
        return compute_metrics(data.task, np.asarray(logits), np.asarray(labels))[data.task.best_metric]

    return metric


def format_calibration(result: Calibration) -> str:
    """What was chosen, and the best of what was compared, as a few lines of text."""
    chosen = result.chosen
    entering = []
    if chosen.vocabulary_threshold is not None:
        threshold = f"vocabulary threshold {chosen.vocabulary_threshold:.4f}"
        entering = [f"  {chosen.entering:.1%} of the tokens enter the first layer: {threshold}"]
    lines = [
        f"schedule {chosen.schedule.name}: relative FLOPs {chosen.relative_flops:.3f} "
        f"({chosen.relative_flops_held_out:.3f} on held-out examples), divergence {chosen.divergence:.4f}",
        *entering,
        "  kept per layer: " + " ".join(f"{kept:.2f}" for kept in chosen.kept),
        "  thresholds: " + " ".join(f"{threshold:.4f}" for threshold in chosen.thresholds),
    ]
    if result.metric_dense is not None and result.metric_pruned is not None and result.drop_bound is not None:
        lines.append(
            f"  held-out metric {result.metric_pruned:.2f}, dense {result.metric_dense:.2f}; loss at most "
            f"{result.drop_bound:.2f} points (one standard error)"
        )
    others = [f"{_named(fit)} {fit.divergence:.4f}" for fit in result.candidates if fit is not chosen][:5]
    rest = f"; next: {', '.join(others)}" if others else ""
    return "\n".join([*lines, f"  compared {len(result.candidates)}{rest}"])


def _named(fit: Fit) -> str:
    return fit.schedule.name if fit.vocabulary_threshold is None else f"{fit.schedule.name} (vocabulary)"


def _report(result: Calibration) -> dict[str, Any]:
    found = asdict(result)
    found["pruner"] = {key: value for key, value in result.pruner.config().items() if value is not None}
    return found
