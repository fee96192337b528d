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
from token_pruning.budget.vocabulary import vocabulary_scores
from token_pruning.checkpoint import load_model, read_checkpoint
from token_pruning.checks import positive_integer
from token_pruning.errors import ConfigError
from token_pruning.lab.data import TaskData, load_unlabelled
from token_pruning.lab.files import write_json
from token_pruning.lab.metrics import compute_metrics
from token_pruning.lab.training.evaluate import make_evaluator
from token_pruning.lab.training.features import labelled_features, tokenize
from token_pruning.lab.training.load import load_classifier, load_tokenizer
from token_pruning.lab.training.options import TrainOptions
from token_pruning.lab.training.plan import DataSource
from token_pruning.lab.training.run_dir import RunDir
from token_pruning.pruners.summary import SummaryTokens

REPORT = "calibration.json"
EXAMPLES = 400


def calibrate_checkpoint(
    options: TrainOptions,
    load_data: DataSource | None,
    texts: Path | None = None,
    *,
    max_drop: float | None = None,
    examples: int = EXAMPLES,
    summary_tokens: SummaryTokens = "none",
    prune_layers: list[int] | None = None,
    vocabulary: bool = True,
) -> Path:
    """Calibrate a dense checkpoint, evaluate it where there is something to evaluate on, and save it.

    Args:
        options: the checkpoint, the budget and where to write; ``masking_mode`` hard.
        load_data: gives the task, whose training examples are used.
        texts: instead: a file of texts without labels; any head will do.
        max_drop: instead of the budget; see :func:`token_pruning.calibrate`.
        examples: how many are taken, at random.
        summary_tokens: see :class:`token_pruning.Pruner`.
        prune_layers: see :class:`token_pruning.Pruner`.
        vocabulary: also try to keep tokens out of the first layer, by scores from as many examples as there are.

    Returns:
        The output folder: a checkpoint with ``calibration.json``, what was compared.

    Raises:
        TokenPruningError: for every mistake of the user.
    """
    positive_integer("--examples", examples)
    if (options.target_flops is None) == (max_drop is None):
        raise ConfigError("give either --target-flops or --max-drop")
    checkpoint = read_checkpoint(options.restore)
    run_dir = RunDir(Path(options.output_dir or checkpoint.path / "calibrated"))
    if run_dir.path.resolve() == checkpoint.path.resolve():
        raise ConfigError(f"output directory {run_dir.path} is the --restore folder; give another --output-dir")
    identity = {
        **options.identity(), "max_drop": max_drop, "examples": examples, "summary_tokens": summary_tokens,
        "prune_layers": prune_layers, "vocabulary": vocabulary, "texts": None if texts is None else str(texts),
    }  # fmt: skip
    resume = run_dir.check(identity, overwrite=options.overwrite_output_dir)
    tokenizer = load_tokenizer(checkpoint)
    data: TaskData | None = None
    if texts is not None:
        if max_drop is not None:
            raise ConfigError(f"--max-drop needs labelled examples; {texts} has none")
        model: Any = load_model(checkpoint)
        features = tokenize(tokenizer, load_unlabelled(texts), model, options.max_length)
    else:
        assert load_data is not None
        data = load_data(checkpoint)
        if data.train is None:
            raise ConfigError(f"task {data.task.name} has no training examples; give --train-file")
        model = load_classifier(checkpoint, data.task)
        features = labelled_features(tokenizer, data.train, data.task, model, options.max_length)
    random.Random(options.seed).shuffle(features)

    result = calibrate(
        model,
        features[:examples],
        options.target_flops,
        max_drop=max_drop,
        metric=None if data is None else _metric(data),
        summary_tokens=summary_tokens,
        prune_layers=prune_layers,
        vocabulary_scores=vocabulary_scores(model, features[:VOCABULARY_EXAMPLES]) if vocabulary else None,
        seed=options.seed,
    )
    print(format_calibration(result))
    run_dir.start(identity, resume=resume)
    if data is not None:
        make_evaluator(tokenizer, data, model, options, run_dir.path)(model)
    write_json(run_dir.path / REPORT, _report(result))
    run_dir.save_model(model, tokenizer)
    run_dir.finish(identity)
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
