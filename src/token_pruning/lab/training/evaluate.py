"""Evaluating a model on a task's validation splits, during training and on its own."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from token_pruning.checkpoint import read_checkpoint
from token_pruning.errors import ConfigError
from token_pruning.lab.data import TaskData
from token_pruning.lab.evaluation import Evaluation, evaluate, format_evaluation, write_evaluation
from token_pruning.lab.files import try_folder
from token_pruning.lab.metrics import compute_metrics
from token_pruning.lab.training.features import collator, labelled_features
from token_pruning.lab.training.load import load_classifier, load_tokenizer, other_architecture
from token_pruning.lab.training.options import TrainOptions, flag
from token_pruning.lab.training.plan import DataSource, pruner_of, with_keys
from token_pruning.runtime.prune import set_budget


class EvaluateSplits(Protocol):
    """Evaluates a model on every validation split, says what it found, and gives it by split."""

    def __call__(self, model: Any, say: Callable[[str], None] = ..., step: int | None = None) -> dict[str, Evaluation]:
        """``step`` is None at the end of training."""


def make_evaluator(
    tokenizer: Any, data: TaskData, model: Any, options: TrainOptions, folder: Path | None, budget: float | None = None
) -> EvaluateSplits:
    """What evaluates a model on every split, prints what it finds and writes ``eval_results.json``.

    Where ``folder`` is None it keeps silent: another process reports. A ``budget`` is one that the model was set to.
    """
    features = {
        name: labelled_features(tokenizer, examples, data.task, model, options.max_length)
        for name, examples in data.validation.items()
    }

    def evaluate_splits(
        model: Any, say: Callable[[str], None] = print, step: int | None = None
    ) -> dict[str, Evaluation]:
        splits = {
            name: evaluate(
                model,
                split,
                collator(tokenizer, options.bf16),
                partial(compute_metrics, data.task),
                batch_size=options.batch_size,
                max_seq_length=options.max_length,
                bf16=options.bf16,
                progress=folder is not None,
            )
            for name, split in features.items()
        }
        if folder is not None:
            for name, evaluation in splits.items():
                say(format_evaluation(name if step is None else f"step {step}, {name}", evaluation))
            about = {"task": data.task.name, **_about(model, options, step)}
            if budget is not None:
                about["budget"] = budget
            write_evaluation(folder / "eval_results.json", splits, about)
        return splits

    return evaluate_splits


def _about(model: Any, options: TrainOptions, step: int | None) -> dict[str, Any]:
    """What was evaluated, and how."""
    dense = options.masking_mode == "none"
    return {
        "checkpoint": options.restore,
        "masking_mode": options.masking_mode,
        "prune_mode": None if dense else getattr(model.config, "prune_mode", None),
        "step": step,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "dtype": "bfloat16 autocast" if options.bf16 else str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
    }


def evaluate_checkpoint(
    options: TrainOptions, load_data: DataSource, budget: float | None = None
) -> dict[str, Evaluation]:
    """Evaluate a checkpoint, dense (``masking_mode`` none) or with its tokens removed.

    One that was calibrated for several budgets is set to ``budget``, if that is given. ``eval_results.json`` is written
    to ``output_dir``, or else to ``eval`` inside the checkpoint.

    Raises:
        TokenPruningError: for every mistake of the user.
    """
    checkpoint = with_keys(read_checkpoint(options.restore), options.pruning)
    if (other := other_architecture(checkpoint)) is not None:  # a new head's answers would be random
        raise ConfigError(
            f"{options.restore} is {other}; only sequence-classification and regression models can be evaluated"
        )
    if options.masking_mode == "none" and budget is not None:
        raise ConfigError("--budget applies to pruning, not to masking mode 'none'")
    for name in ("thresholds", "final_token_threshold", "vocabulary_threshold"):
        if budget is not None and (value := (options.pruning or {}).get(name)) is not None:
            raise ConfigError(f"{flag(name)} is {value}; --budget sets the thresholds: leave one of them out")
    folder = Path(options.output_dir) if options.output_dir else checkpoint.path / "eval"
    try_folder("--output-dir" if options.output_dir else "the default --output-dir", folder)
    pruner = None if options.masking_mode == "none" else pruner_of(checkpoint, options)
    data = load_data(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    model = load_classifier(checkpoint, data.task)
    if torch.cuda.is_available():
        model.to("cuda")
    if pruner is not None:
        checkpoint.prune(model, pruner)
        if budget is not None:
            set_budget(model, budget)
    data.say()
    return make_evaluator(tokenizer, data, model, options, folder, budget)(model)
