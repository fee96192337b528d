"""A model pruned to a budget without training, from folder to folder."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, float32

from token_pruning.budget.calibration import Calibration, calibrate
from token_pruning.budget.fitting import Fit
from token_pruning.budget.vocabulary import EXAMPLES as VOCABULARY_EXAMPLES
from token_pruning.budget.vocabulary import vocabulary_gate
from token_pruning.checkpoint import Checkpoint, read_checkpoint
from token_pruning.checkpoint.loading import local_folder
from token_pruning.errors import ConfigError
from token_pruning.lab.data import TaskData, TextExamples, load_unlabelled
from token_pruning.lab.files import write_json
from token_pruning.lab.metrics import compute_metrics
from token_pruning.lab.training.evaluate import make_evaluator
from token_pruning.lab.training.features import labelled_features, tokenize
from token_pruning.lab.training.load import load_classifier, load_float32, load_tokenizer
from token_pruning.lab.training.options import CalibrateOptions
from token_pruning.lab.training.plan import DataSource, refuse_same_folder, training_examples, weight_bytes
from token_pruning.lab.training.run_dir import RunDir, held
from token_pruning.pruners import VocabularyGate
from token_pruning.runtime.adapters import Adapter, adapter_for

REPORT = "calibration.json"


@dataclass(frozen=True)
class _Subject:
    """What is calibrated.

    Attributes:
        model: dense.
        parts: what is saved: the model, and what it does not hold itself.
        texts: what the examples were made of.
        examples: for :func:`token_pruning.calibrate`.
        data: the task, or None for texts without labels.
        gate: the only one that is tried, where nothing but attention received is compared.
        reads: what ``config.json`` says of the last hidden states that are used; None for nothing.
    """

    model: Any
    parts: tuple[Any, ...]
    texts: TextExamples
    examples: Sequence[Any]
    data: TaskData | None = None
    gate: VocabularyGate | None = None
    reads: Any = None


def calibrate_checkpoint(options: CalibrateOptions, load_data: DataSource) -> Path:
    """Calibrate a dense model, evaluate it where there is something to evaluate on, and save it.

    Args:
        options: what to do.
        load_data: gives the task, whose training examples are used; not called where ``options.input`` has texts.

    Returns:
        The output folder: a model with ``calibration.json``, what was compared.

    Raises:
        TokenPruningError: for every mistake of the user.
    """
    folder = local_folder(options.base.restore)
    adapter = adapter_for(folder)
    checkpoint = read_checkpoint(folder) if adapter is None else None
    run_dir = RunDir(Path(options.base.output_dir or folder / "calibrated"))
    refuse_same_folder(run_dir, folder, "--restore")
    with held(run_dir.path, room=weight_bytes(folder)):
        resume = run_dir.check(options.identity(), overwrite=options.base.overwrite_output_dir)
        if checkpoint is not None:
            subject = _of_checkpoint(options, checkpoint, load_data)
        else:
            assert adapter is not None
            subject = _of_library(options, folder, adapter)
        _calibrate(options, subject, run_dir, resume)
    return run_dir.path


def _of_checkpoint(options: CalibrateOptions, checkpoint: Checkpoint, load_data: DataSource) -> _Subject:
    base = options.base
    tokenizer = load_tokenizer(checkpoint)
    length = base.max_length if options.max_tokens is None else None
    data = None
    if options.input is not None:
        model: Any = load_float32(checkpoint)
        texts = _some(load_unlabelled(options.input), options)
        examples = tokenize(tokenizer, texts, model, length)
    else:
        data = load_data(checkpoint)
        model = load_classifier(checkpoint, data.task)
        texts = _some(training_examples(data), options)
        examples = labelled_features(tokenizer, texts, data.task, model, length)
    gate = None
    if options.vocabulary and _only_received(options):
        gate = vocabulary_gate(model, tokenize(tokenizer, texts, model, base.max_length)[:VOCABULARY_EXAMPLES])
    reads = None if data is not None else checkpoint.config.get("reads")
    return _Subject(model, (model, tokenizer), texts, examples, data, gate, reads)


def _of_library(options: CalibrateOptions, folder: Path, adapter: Adapter) -> _Subject:
    if options.input is None:
        raise ConfigError(f"{folder} is calibrated on texts without labels; give --texts, not a task")
    model = adapter.load_dense(folder, dtype=float32, device="cpu")
    texts = _some(load_unlabelled(options.input), options)
    return _Subject(model, (model,), texts, inputs_of(model, adapter, texts, options.input))


def inputs_of(model: Any, adapter: Adapter, texts: TextExamples, source: Path) -> list[Any]:
    """Texts or pairs, whichever another library's model takes.

    Raises:
        ConfigError: if the file has the others.
    """
    if adapter.takes_pairs(model) != (texts.second is not None):
        wanted = "pairs, in two columns" if texts.second is None else "single texts, in one column"
        raise ConfigError(f"--texts {source}: a {type(model).__name__} takes {wanted}")
    return list(texts.first) if texts.second is None else list(zip(texts.first, texts.second, strict=True))


def _some(texts: TextExamples, options: CalibrateOptions) -> TextExamples:
    return texts.sample(max(options.examples, VOCABULARY_EXAMPLES if _only_received(options) else 0), options.base.seed)


def _only_received(options: CalibrateOptions) -> bool:
    """Whether nothing but attention received is compared; a gate must be given then."""
    no_budget = options.base.target_flops is None and options.target_ms is None
    return no_budget or options.summary_tokens != "none" or options.prune_layers is not None


def _calibrate(options: CalibrateOptions, subject: _Subject, run_dir: RunDir, resume: bool) -> None:
    base, model, data = options.base, subject.model, subject.data
    result = calibrate(
        model,
        subject.examples[: options.examples],
        base.target_flops,
        target_ms=options.target_ms,
        batch_size=options.engine_batch_size or 1,
        engine={"threads": options.engine_threads, "dtype": options.engine_dtype or "auto"},
        max_drop=options.max_drop,
        metric=None if data is None else _metric(data),
        summary_tokens=options.summary_tokens,
        prune_layers=options.prune_layers,
        vocabulary=subject.gate if options.vocabulary else False,
        reads=subject.reads,
        max_tokens=options.max_tokens,
        chunks=options.chunks,
        seed=base.seed,
    )
    (subject.texts.note if data is None else data).say()
    print(format_calibration(result))
    run_dir.start(options.identity(), resume=resume)
    if data is not None:
        make_evaluator(subject.parts[1], data, model, base, run_dir.path)(model)
    write_json(run_dir.path / REPORT, calibration_report(result))
    run_dir.save_model(*subject.parts)
    run_dir.finish(options.identity())
    print(f"saved to {run_dir.path}")


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
    error = "" if chosen.divergence_error is None else f" ± {chosen.divergence_error:.4f}"
    lines = [
        f"{chosen.rule}: relative FLOPs {chosen.relative_flops:.3f} "
        f"({chosen.relative_flops_held_out:.3f} on held-out examples), divergence {chosen.divergence:.4f}{error}",
        *entering,
        "  kept per layer: " + " ".join(f"{kept:.2f}" for kept in chosen.kept),
        "  thresholds: " + " ".join(f"{threshold:.4f}" for threshold in chosen.thresholds),
        *(
            f"  budget: relative FLOPs {fit.relative_flops:.3f} ({fit.relative_flops_held_out:.3f} on held-out "
            f"examples), divergence {fit.divergence:.4f}"
            for fit in result.fits
        ),
    ]
    if result.metric_dense is not None and result.metric_pruned is not None and result.drop_bound is not None:
        lines.append(
            f"  held-out metric {result.metric_pruned:.2f}, dense {result.metric_dense:.2f}; loss at most "
            f"{result.drop_bound:.2f} points (one standard error)"
        )
    if result.dense_ms is not None and result.pruned_ms is not None:
        lines.append(f"  a batch takes {result.pruned_ms:.3g} ms in the engine, unpruned {result.dense_ms:.3g}")
    others = [f"{fit.rule} {fit.divergence:.4f}" for fit in result.candidates if fit is not chosen][:5]
    rest = f"; next: {'; '.join(others)}" if others else ""
    return "\n".join([*lines, f"  compared {len(result.candidates)}{rest}"])


def calibration_report(result: Calibration) -> dict[str, Any]:
    """The content of :data:`REPORT`; tensors stand beside the model's weights."""
    found = {f.name: getattr(result, f.name) for f in fields(result)}
    found["pruner"] = {key: value for key, value in result.pruner.config().items() if value is not None}
    entries = {name: [_entry(fit) for fit in found[name]] for name in ("candidates", "fits")}
    return {**found, "chosen": _entry(result.chosen), **entries}


def _entry(fit: Fit) -> dict[str, Any]:
    return {key: value for key, value in asdict(replace(fit, method=None)).items() if key != "method"}
