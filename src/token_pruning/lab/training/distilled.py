"""A model of sentence-transformers pruned to a budget and trained to give what it gave, from folder to folder."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import float32

from token_pruning.budget.distillation import Course, Distilled
from token_pruning.checkpoint.loading import local_folder
from token_pruning.errors import ConfigError
from token_pruning.lab.data import load_unlabelled
from token_pruning.lab.files import write_json
from token_pruning.lab.training.calibrated import calibration_report, format_calibration, inputs_of
from token_pruning.lab.training.options import DistillOptions
from token_pruning.lab.training.plan import refuse_same_folder, weight_bytes
from token_pruning.lab.training.run_dir import RUN_FILE, RunDir, held
from token_pruning.lab.training.train import check_resumable
from token_pruning.lab.training.trainer import KEPT_CHECKPOINTS, ConsoleCallback, WholeCheckpoints
from token_pruning.pruners import FixedThreshold
from token_pruning.runtime.adapters import Adapter, adapter_for
from token_pruning.runtime.prune import set_budget, token_pruner_of

REPORT = "distillation.json"
OPTIONS = (
    *("restore", "teacher", "target_flops", "output_dir", "overwrite_output_dir"),
    *("lr", "epochs", "batch_size", "bf16", "seed", "save_steps", "save_all"),
)
"""The options of training that mean something here."""

_SAVES, _LINES = 0.25, 0.05  # every so large a part of the steps a checkpoint, or a line


def distill_folder(options: DistillOptions) -> Path:
    """Calibrate a model, unless it is, train it, and save it; or go on where a run was killed.

    Args:
        options: what to do.

    Returns:
        The output folder: a model with ``distillation.json``.

    Raises:
        TokenPruningError: for every mistake of the user.
    """
    base = options.base
    folder = local_folder(base.restore)
    adapter = adapter_for(folder)
    if adapter is None:
        raise ConfigError(
            f"--texts is for models of sentence-transformers; {folder} is none: train it on a task, or a file of labels"
        )
    run_dir = RunDir(Path(base.output_dir or folder / "distilled"))
    refuse_same_folder(run_dir, folder, "--restore")
    with held(run_dir.path, room=weight_bytes(folder)):
        resume = run_dir.check(options.identity(), overwrite=base.overwrite_output_dir)
        try:
            _carry_out(options, folder, adapter, run_dir, resume)
        except KeyboardInterrupt as stop:
            if last := run_dir.last_checkpoint(options.identity()):
                without = " without --overwrite-output-dir" if base.overwrite_output_dir else ""
                stop.add_note(f"the same command{without} continues from {last}")
            raise
    return run_dir.path


def _carry_out(options: DistillOptions, folder: Path, adapter: Adapter, run_dir: RunDir, resume: bool) -> None:
    base = options.base
    checkpoints = run_dir.checkpoints() if resume else []
    teacher = adapter.load_dense(_teacher(folder, base.teacher), dtype=float32, device="cpu")
    if checkpoints:
        check_resumable(checkpoints[-1])
        model: Any = adapter.load(checkpoints[-1], None, execution="packed", dtype=float32, device="cpu")
    elif adapter.names_method(folder):
        model = adapter.load(folder, None, execution="packed", dtype=float32, device="cpu")
    else:
        model = adapter.load_dense(folder, dtype=float32, device="cpu")
    assert options.input is not None
    texts = load_unlabelled(options.input)
    course = Course(
        model,
        inputs_of(model, adapter, texts, options.input),
        None if checkpoints and isinstance(base.target_flops, list) else base.target_flops,
        teacher=teacher,
        examples=options.examples,
        bf16=base.bf16,
        seed=base.seed,
        shows=True,
    )
    texts.note.say()
    if course.calibration is not None:
        print(format_calibration(course.calibration))
    run_dir.start(options.identity(), resume=resume)
    trainer = course.trainer(
        output_dir=str(run_dir.path),
        epochs=base.epochs,
        learning_rate=options.learning_rate,
        batch_size=base.batch_size,
        kind=WholeCheckpoints,
        callbacks=[ConsoleCallback()],
        save_strategy="steps",
        save_steps=base.save_steps or _SAVES,
        logging_steps=_LINES,
    )
    trainer.run_dir = run_dir
    trainer.keep_checkpoints = None if base.save_all else KEPT_CHECKPOINTS
    if checkpoints:
        print(f"continuing from {checkpoints[-1]}")
    result = course.train(trainer, resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    print(
        f"relative FLOPs {result.relative_flops:.3f}, divergence {result.divergence:.4f}, before training "
        f"{result.divergence_before:.4f}, on texts that were not trained on"
    )
    budgets = _budgets(course)
    for each in budgets:
        print(
            f"  budget {each['budget']:.3f}: relative FLOPs {each['relative_flops']:.3f}, divergence "
            f"{each['divergence']:.4f}"
        )
    write_json(run_dir.path / REPORT, _report(result) | ({"budgets": budgets} if budgets else {}))
    run_dir.save_model(model)
    run_dir.finish(options.identity())
    print(f"saved to {run_dir.path}")


def _budgets(course: Course) -> list[dict[str, float]]:
    """What the model costs at each budget of its table, and how far it is from the dense one; [] without a table."""
    pruner = token_pruner_of(course.model).pruner
    assert isinstance(pruner, FixedThreshold)  # a course has no other
    table = [each.relative_flops for each in pruner.budgets or ()]
    found = []
    for budget in reversed(table):  # which leaves the model at the lowest
        set_budget(course.model, budget)
        found.append({"budget": budget, "relative_flops": course.cost(), "divergence": course.differs()})
    return found[::-1]


def _report(result: Distilled) -> dict[str, Any]:
    calibration = result.calibration
    found = {key: value for key, value in asdict(result).items() if key != "calibration"}
    return {**found, "calibration": None if calibration is None else calibration_report(calibration)}


def _teacher(folder: Path, given: str | None) -> Path:
    """The dense model: the folder's own weights, or if these were trained already, those it started from.

    Raises:
        ConfigError: if they are not there any more.
    """
    if given is not None:
        return local_folder(given)
    seen = set()
    while (folder / REPORT).exists():
        seen.add(folder.resolve())
        try:
            run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["options"]
            start = Path(run["teacher"] or run["restore"])
        except (OSError, ValueError, KeyError, TypeError):
            start = folder
        if not start.is_dir() or start.resolve() in seen:
            raise ConfigError(
                f"{folder} is trained already, and the dense model it started from is gone; give --teacher"
            )
        folder = start
    return folder
