"""What a training run will do, decided from the options, the checkpoint and the data before any work is done."""

import importlib.util
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from token_pruning.budget.calibration import FEWEST_EXAMPLES
from token_pruning.checkpoint import Checkpoint, read_checkpoint
from token_pruning.checkpoint.settings import naming
from token_pruning.errors import ConfigError
from token_pruning.families import shape_of
from token_pruning.lab.data import Task, TaskData, TextExamples, load_unlabelled
from token_pruning.lab.training.budget import LR_THRESHOLD, TEMPERATURE, with_relative_scores
from token_pruning.lab.training.distillation import Distillation, default_teacher, read_teacher
from token_pruning.lab.training.options import DISTILLATION_TEMPERATURE, DISTILLATION_WEIGHT, TrainOptions
from token_pruning.lab.training.run_dir import RunDir, held
from token_pruning.pruners import FixedThreshold, Pruner, check_keys

DataSource = Callable[[Checkpoint], TaskData]


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """One training run, checked as far as that goes without building the model.

    Attributes:
        options: what was asked for.
        start: the checkpoint with the keys of this run; its weights are on disk.
        start_is_learned: whether thresholds were found in the checkpoint: a budget's schedule then follows them.
        pruner: the method to start with; None for a dense run.
        teacher: the dense model that is learned from, or None.
        distillation: how; None without a teacher.
        data: the task and its examples.
        examples: those to train on.
        budget_texts: texts whose cost is held to the budget; None for held-out training examples.
        run_dir: where everything goes.
        resume: whether an unfinished run is there, to be continued.
        arguments: the Trainer's.
    """

    options: TrainOptions
    start: Checkpoint
    start_is_learned: bool
    pruner: Pruner | None
    teacher: Checkpoint | None
    distillation: Distillation | None
    data: TaskData
    examples: TextExamples
    budget_texts: TextExamples | None
    run_dir: RunDir
    resume: bool
    arguments: TrainingArguments

    @property
    def first_process(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return bool(self.arguments.process_index == 0)

    @property
    def lr_threshold(self) -> float | None:
        """The thresholds' learning rate; None for the weights'."""
        by_controller = self.options.target_flops is not None and self.options.soft
        return LR_THRESHOLD if by_controller and self.options.lr_threshold is None else self.options.lr_threshold


def plan_training(options: TrainOptions, load_data: DataSource, stack: ExitStack | None = None) -> TrainPlan:
    """Decide everything about a run, and refuse what can be refused; nothing is written.

    Args:
        options: what to do.
        load_data: gives the task's examples, from the checkpoint (whose labels may matter).
        stack: if given, keeps the run's folder to this process, from before it is looked at.

    Raises:
        TokenPruningError: for every mistake of the user that shows before the model is built.
    """
    found = read_checkpoint(options.restore)
    start, pruner = _start(found, options)
    run_dir = RunDir(Path(options.output_dir) if options.output_dir else options.default_output_dir(start.config))
    refuse_same_folder(run_dir, found.path, "--restore")
    teacher = _teacher(found, options)
    if teacher is not None:
        refuse_same_folder(run_dir, teacher.path, "--teacher")
    processes = _processes()
    if options.batch_size % processes:  # before there is a folder, which one of them might leave behind
        raise ConfigError(f"--bs is {options.batch_size}; it must be a multiple of the {processes} processes")
    if stack is not None:
        stack.enter_context(held(run_dir.path, room=weight_bytes(found.path)))
    resume = run_dir.check(options.identity(), overwrite=options.overwrite_output_dir)
    data = load_data(start)
    examples = training_examples(data)
    distillation = None if teacher is None else _distillation(teacher, data.task, options)
    if teacher is not None and options.teacher_states is not None:
        _check_states(teacher, start, pruner)
    arguments = _training_arguments(options, run_dir, data.task)
    return TrainPlan(
        options=options,
        start=start,
        start_is_learned=found.thresholds is not None,
        pruner=pruner,
        teacher=teacher,
        distillation=distillation,
        data=data,
        examples=examples,
        budget_texts=_budget_texts(options),
        run_dir=run_dir,
        resume=resume,
        arguments=arguments,
    )


def with_keys(checkpoint: Checkpoint, keys: Mapping[str, Any] | None) -> Checkpoint:
    """The checkpoint as if ``config.json`` had these keys."""
    return replace(checkpoint, config={**checkpoint.config, **(keys or {})})


def pruner_of(checkpoint: Checkpoint, options: TrainOptions) -> Pruner:
    """The method that a checkpoint's keys name, for the masking mode; without a budget.

    Raises:
        ConfigError: for a key that is not allowed, or a method that has no thresholds to learn.
    """
    pruner = checkpoint.pruner(learned=options.soft, temperature=options.temperature)
    if options.soft and not pruner.learned:
        raise ConfigError(
            f"{checkpoint.path / 'config.json'}: prune_mode is {pruner.prune_mode!r}; masking mode "
            f"{options.masking_mode!r} learns thresholds, so it must be absolute_threshold"
        )
    return pruner


def refuse_same_folder(run_dir: RunDir, source: Path, flag: str) -> None:
    """A run may not write over what it reads.

    Raises:
        ConfigError: if its folder is the source's.
    """
    if run_dir.path.resolve() == source.resolve():
        raise ConfigError(f"output directory {run_dir.path} is the {flag} folder; give another --output-dir")


def weight_bytes(folder: Path) -> int:
    """What a model's weights take on the disk: about what a model that is made from it will."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def training_examples(data: TaskData) -> TextExamples:
    """The task's training examples.

    Raises:
        ConfigError: if it has none.
    """
    if data.train is None:
        raise ConfigError(f"task {data.task.name} has no training examples; give --train-file")
    return data.train


def _start(found: Checkpoint, options: TrainOptions) -> tuple[Checkpoint, Pruner | None]:
    """The checkpoint as this run takes it, and the method to start with."""
    start = with_keys(found, options.pruning)
    if options.masking_mode == "none":
        return start, None
    if options.budget is None:
        return start, pruner_of(start, options)
    with naming(start.path / "config.json"):
        check_keys({key: value for key, value in start.config.items() if value is not None})
    start = with_relative_scores(start)
    temperature = TEMPERATURE if options.temperature is None else options.temperature
    pruner = start.pruner(learned=options.soft, temperature=temperature)
    assert isinstance(pruner, FixedThreshold)
    layers = shape_of(start.model_config()).num_layers
    return start, replace(pruner, thresholds=tuple(pruner.initial_thresholds(layers)), budgets=None)


def _teacher(found: Checkpoint, options: TrainOptions) -> Checkpoint | None:
    """The one that is named, with a budget else the dense model that the checkpoint came from."""
    name = options.teacher
    if name is None and options.target_flops is not None and not options.no_teacher:
        name = default_teacher(found)
    return None if name is None else read_teacher(name)


def _distillation(teacher: Checkpoint, task: Task, options: TrainOptions) -> Distillation:
    """The options checked against the task and the teacher's outputs."""
    if teacher.num_outputs != task.num_labels:
        raise ConfigError(
            f"--teacher {options.teacher or teacher.path} has {teacher.num_outputs} outputs; it must have as many as "
            f"the model that is trained from {options.restore} for task {task.name}, {task.num_labels}"
        )
    weight = DISTILLATION_WEIGHT if options.distillation_weight is None else options.distillation_weight
    temperature = options.distillation_temperature
    if not task.is_regression:
        return Distillation(weight, DISTILLATION_TEMPERATURE if temperature is None else temperature)
    if temperature is not None:
        raise ConfigError(
            f"--distillation-temperature is {temperature!r}; task {task.name} is a regression, which has none"
        )
    return Distillation(weight)


def _check_states(teacher: Checkpoint, start: Checkpoint, pruner: Pruner | None) -> None:
    """See that every state of the student has one of the teacher's to be held against."""
    theirs, ours = (shape_of(each.model_config()) for each in (teacher, start))
    if (theirs.num_layers, theirs.hidden_size) != (ours.num_layers, ours.hidden_size):
        raise ConfigError(
            f"--teacher-states needs a teacher of the model's layers and width; {teacher.path} has {theirs.num_layers} "
            f"layers of {theirs.hidden_size}, {start.path} {ours.num_layers} of {ours.hidden_size}"
        )
    if pruner is not None and pruner.max_tokens is not None:
        raise ConfigError(f"--teacher-states is for whole texts; {start.path} cuts them to max_tokens")


def _budget_texts(options: TrainOptions) -> TextExamples | None:
    if options.budget_input is None:
        return None
    texts = load_unlabelled(Path(options.budget_input))
    if len(texts) < FEWEST_EXAMPLES:
        raise ConfigError(f"{options.budget_input} has {len(texts)} texts; a budget needs at least {FEWEST_EXAMPLES}")
    return texts


def _processes() -> int:
    """Of one run, under torchrun or accelerate launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _training_arguments(options: TrainOptions, run_dir: RunDir, task: Task) -> TrainingArguments:
    by_steps = options.save_steps is not None
    strategy: dict[str, Any] = {
        f"{what}_strategy": "steps" if by_steps else "epoch" for what in ("eval", "save", "logging")
    }
    if by_steps:
        strategy |= {f"{what}_steps": options.save_steps for what in ("eval", "save", "logging")}
    has_accelerator = torch.accelerator.is_available()
    distributed = _processes() > 1
    arguments = TrainingArguments(
        output_dir=str(run_dir.path),
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        load_best_model_at_end=options.load_best,
        metric_for_best_model=f"eval_{task.best_metric}",
        greater_is_better=True,
        seed=options.seed,
        data_seed=options.seed,
        bf16=options.bf16,
        use_cpu=not has_accelerator,
        ddp_backend="gloo" if distributed and not has_accelerator else None,
        report_to="tensorboard" if importlib.util.find_spec("tensorboard") else "none",
        dataloader_pin_memory=has_accelerator,
        remove_unused_columns=False,
        **strategy,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for torchrun: DataParallel's copies share one forward
    arguments.per_device_train_batch_size = max(1, options.batch_size // arguments.world_size)
    return arguments
