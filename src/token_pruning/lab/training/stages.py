"""One training run or evaluation, from a checkpoint folder to a checkpoint folder."""

import importlib.util
import logging
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DataCollatorWithPadding, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from token_pruning.budget.calibration import FEWEST_EXAMPLES
from token_pruning.checkpoint import Checkpoint, load_model, read_checkpoint
from token_pruning.errors import CheckpointError, ConfigError
from token_pruning.families import shape_of
from token_pruning.lab.analysis.quantities import length_quantile
from token_pruning.lab.data import Examples, Task, TaskData, load_unlabelled
from token_pruning.lab.evaluation import Evaluation, evaluate, format_evaluation, write_evaluation
from token_pruning.lab.metrics import compute_metrics
from token_pruning.lab.training.budget import (
    HELD_OUT_EXAMPLES,
    LR_THRESHOLD,
    TEMPERATURE,
    BudgetController,
    budget_holder,
    budget_schedule,
    hold_out,
    use_relative_scores,
)
from token_pruning.lab.training.distillation import Distillation, default_teacher, read_teacher, teacher_logits
from token_pruning.lab.training.options import DISTILLATION_TEMPERATURE, DISTILLATION_WEIGHT, TrainOptions, flag
from token_pruning.lab.training.run_dir import RunDir
from token_pruning.lab.training.trainer import (
    KEPT_CHECKPOINTS,
    ConsoleCallback,
    EvaluateSplits,
    HardSecondHalf,
    PruningTrainer,
)
from token_pruning.lab.training.vocabulary import with_vocabulary_gate
from token_pruning.pruners import FixedThreshold, Pruner, Unpruned
from token_pruning.runtime.prune import freeze_thresholds, is_pruned, prune, unprune

_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")

logger = logging.getLogger(__name__)

DataSource = Callable[[Checkpoint], TaskData]


def train(options: TrainOptions, load_data: DataSource, *, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Train one stage, or continue it where it was killed.

    Args:
        options: what to do.
        load_data: gives the task's examples, from the checkpoint (whose labels may matter).
        callbacks: for the Trainer, beside those of the stage. What one raises ends the run as a kill would: the same
            options continue it.

    Returns:
        The run's folder, which is a checkpoint and holds ``eval_results.json``.

    Raises:
        TokenPruningError: for every mistake of the user.
    """
    checkpoint = read_checkpoint(options.restore)
    checkpoint.config.update(options.pruning or {})
    learned = checkpoint.thresholds is not None
    pruner = _pruner(checkpoint, options)
    run_dir = RunDir(Path(options.output_dir) if options.output_dir else options.default_output_dir(checkpoint.config))
    if run_dir.path.resolve() == checkpoint.path.resolve():
        raise ConfigError(f"output directory {run_dir.path} is the --restore folder; give another --output-dir")
    teacher_path = options.teacher
    if options.target_flops is not None and not options.no_teacher:
        teacher_path = teacher_path or default_teacher(checkpoint)
    teacher = None if teacher_path is None else read_teacher(teacher_path)
    if teacher is not None and run_dir.path.resolve() == teacher.path.resolve():
        raise ConfigError(f"output directory {run_dir.path} is the --teacher folder; give another --output-dir")
    identity = options.identity()
    resume = run_dir.check(identity, overwrite=options.overwrite_output_dir)
    data = load_data(checkpoint)
    if data.train is None:
        raise ConfigError(f"task {data.task.name} has no training examples; give --train-file")
    distillation = None if teacher is None else _distillation(teacher, data.task, options)

    arguments = _training_arguments(options, run_dir, data.task)
    if options.batch_size % arguments.world_size:
        raise ConfigError(
            f"--bs is {options.batch_size}; it must be a multiple of the {arguments.world_size} processes"
        )
    set_seed(options.seed)
    tokenizer = load_tokenizer(checkpoint)
    model = load_classifier(checkpoint, data.task, new_head=options.masking_mode == "none")
    schedule = None if options.target_flops is None else budget_schedule(model, options, learned)
    features = labelled_features(tokenizer, data.train, data.task, model, options.max_length)
    first_process = arguments.process_index == 0
    texts: list[dict[str, Any]] | None = None
    if pruner is not None:
        model.to(arguments.device)
        if options.budget_input is not None:
            texts = _budget_texts(tokenizer, model, options)
        pruner = with_vocabulary_gate(pruner, checkpoint, model, tokenizer, features, texts, options, say=first_process)
        prune(model, pruner)
    elif arguments.device.type == "cpu":
        prune(model, Unpruned())  # the same arithmetic without padding: a dense step takes two thirds of the time

    of_stage: list[TrainerCallback] = [HardSecondHalf()] if options.masking_mode == "mixed" else []
    holder, controller, trained_on = None, None, features
    if options.target_flops is not None:
        if texts is None:
            trained_on, texts = hold_out(features, options.seed)
        holder = budget_holder(model, texts, options.target_flops, schedule, bf16=options.bf16)
        of_stage.append(holder)
        if options.soft:
            controller = BudgetController(options.target_flops)
            of_stage.append(controller)
    if first_process:
        run_dir.start(identity, resume=resume)

    evaluate_splits = make_evaluator(tokenizer, data, model, options, run_dir.path if first_process else None)
    if teacher is not None:
        with arguments.main_process_first(local=False):  # the others find what it has written
            _add_teacher_logits(features, teacher, data.train, data.task, model, options, run_dir, arguments.device)
    trainer = PruningTrainer(
        model,
        arguments,
        data_collator=collator(tokenizer, options.bf16),
        train_dataset=_shorter(trained_on, options.train_length_quantile, say=first_process),
        eval_dataset=[],  # the Trainer asks for one; evaluate_splits has the examples
        processing_class=tokenizer,
        run_dir=run_dir,
        evaluate_splits=evaluate_splits,
        regularization=options.regularization,
        budget=controller,
        distillation=distillation,
        lr_threshold=LR_THRESHOLD if controller and options.lr_threshold is None else options.lr_threshold,
        weight_decay_threshold=options.weight_decay_threshold,
        keep_checkpoints=None if options.save_all else KEPT_CHECKPOINTS,
        callbacks=[*of_stage, *callbacks],
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ConsoleCallback())
    trainer.accelerator.wait_for_everyone()
    checkpoints = run_dir.checkpoints() if resume else []
    if checkpoints and first_process:
        print(f"continuing from {checkpoints[-1]}")
    trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    if options.masking_mode == "mixed":
        freeze_thresholds(model)  # also where the best checkpoint is one of the soft half
    if holder is not None:
        fit = holder.fit(model)
        if first_process:
            where = options.budget_input or "held-out training examples"
            print(f"thresholds fitted to {fit.relative_flops:.3f} of the FLOPs on {where}")

    if first_process:
        if pruner is None and is_pruned(model):
            unprune(model)
        evaluate_splits(model)
        run_dir.save_model(model, tokenizer)
        trainer.state.save_to_json(str(run_dir.path / "trainer_state.json"))
        run_dir.finish(identity)
        print(f"saved to {run_dir.path}")
    trainer.accelerator.wait_for_everyone()
    return run_dir.path


def evaluate_checkpoint(options: TrainOptions, load_data: DataSource) -> dict[str, Evaluation]:
    """Evaluate a checkpoint, dense (``masking_mode`` none) or with its tokens removed.

    ``eval_results.json`` is written to ``output_dir``, or else to ``eval`` inside the checkpoint.
    """
    checkpoint = read_checkpoint(options.restore)
    checkpoint.config.update(options.pruning or {})
    pruner = _pruner(checkpoint, options)
    data = load_data(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    model = load_classifier(checkpoint, data.task)
    if torch.cuda.is_available():
        model.to("cuda")
    if pruner is not None:
        checkpoint.prune(model, pruner)
    folder = Path(options.output_dir) if options.output_dir else checkpoint.path / "eval"
    return make_evaluator(tokenizer, data, model, options, folder)(model)


def load_split(checkpoint: Checkpoint, task: Task, examples: Examples, max_length: int) -> tuple[Any, Any, Any]:
    """A checkpoint's dense model and tokenizer, and a task's examples tokenized and labelled for them.

    Raises:
        TokenPruningError: for a bad checkpoint, or a ``max_length`` beyond the model's positions.
    """
    tokenizer = load_tokenizer(checkpoint)
    model = load_classifier(checkpoint, task)
    return model, tokenizer, labelled_features(tokenizer, examples, task, model, max_length)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: if its files are missing or unreadable.
    """
    if not any((checkpoint.path / name).exists() for name in _VOCABULARIES):  # transformers would make an empty one
        raise CheckpointError(f"{checkpoint.path} has no tokenizer: none of {', '.join(_VOCABULARIES)}")
    try:
        if checkpoint.is_ibert:
            return transformers.RobertaTokenizerFast.from_pretrained(checkpoint.path)
        return transformers.AutoTokenizer.from_pretrained(checkpoint.path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint.path} has no tokenizer that can be loaded: {reason}") from None


def _pruner(checkpoint: Checkpoint, options: TrainOptions) -> Pruner | None:
    if options.masking_mode == "none":
        return None
    if options.target_flops is not None:
        use_relative_scores(checkpoint)
        temperature = TEMPERATURE if options.temperature is None else options.temperature
        pruner = checkpoint.pruner(learned=options.soft, temperature=temperature)
        assert isinstance(pruner, FixedThreshold)
        layers = checkpoint.config.get("num_hidden_layers") or checkpoint.config["n_layers"]
        return replace(pruner, thresholds=tuple(pruner.initial_thresholds(layers)))
    pruner = checkpoint.pruner(learned=options.soft, temperature=options.temperature)
    if options.soft and not pruner.learned:
        raise ConfigError(
            f"{checkpoint.path / 'config.json'}: prune_mode is {pruner.prune_mode!r}; masking mode "
            f"{options.masking_mode!r} learns thresholds, so it must be absolute_threshold"
        )
    return pruner


def _budget_texts(tokenizer: Any, model: Any, options: TrainOptions) -> list[dict[str, Any]]:
    """The texts whose cost is held to the budget, tokenized, some of them where there are many."""
    assert options.budget_input is not None
    features = tokenize(tokenizer, load_unlabelled(Path(options.budget_input)), model, options.max_length)
    if len(features) < FEWEST_EXAMPLES:
        raise ConfigError(
            f"{options.budget_input} has {len(features)} texts; a budget needs at least {FEWEST_EXAMPLES}"
        )
    return random.Random(options.seed).sample(features, min(len(features), HELD_OUT_EXAMPLES))


def load_classifier(checkpoint: Checkpoint, task: Task, *, new_head: bool = False) -> Any:
    """The checkpoint's model with a head for the task, a new one if it has none, or ``new_head`` and another task's."""
    architecture = (checkpoint.config.get("architectures") or ["none"])[0]
    if not architecture.endswith("ForSequenceClassification"):
        logger.warning("%s has no classification head (%s): a new one is trained", checkpoint.path, architecture)
    labels = task.labels
    head: dict[str, Any] = {"num_labels": task.num_labels}
    if labels is not None and not _label_order(checkpoint.label_names() or [], labels):
        head["id2label"] = dict(enumerate(labels))
        head["label2id"] = {label: number for number, label in enumerate(labels)}
    # Said outright: a checkpoint of another task may name another.
    head["problem_type"] = "regression" if task.is_regression else "single_label_classification"
    return load_model(
        checkpoint, model_class=transformers.AutoModelForSequenceClassification, new_head=new_head, **head
    )


def _distillation(teacher: Checkpoint, task: Task, options: TrainOptions) -> Distillation:
    """The options checked against the task and the teacher's outputs."""
    if teacher.num_outputs != task.num_labels:
        raise ConfigError(
            f"--teacher {options.teacher} has {teacher.num_outputs} outputs; it must have as many as the model that is "
            f"trained from {options.restore} for task {task.name}, {task.num_labels}"
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


def _add_teacher_logits(
    features: list[dict[str, Any]],
    teacher: Checkpoint,
    examples: Examples,
    task: Task,
    model: Any,
    options: TrainOptions,
    run_dir: RunDir,
    device: torch.device,
) -> None:
    """Give every training example its ``teacher_logits``, a list of floats in the order of the model's outputs."""
    tokenizer = load_tokenizer(teacher)  # its own: a larger model of another family may teach
    logits = teacher_logits(
        teacher,
        _encode(tokenizer, examples, options.max_length),
        collator(tokenizer, options.bf16),
        fallback=run_dir.path,
        batch_size=options.batch_size,
        bf16=options.bf16,
        device=device,
    )
    if task.labels is not None:
        names = teacher.label_names() or []
        theirs = _label_order(names, task.labels)
        if not theirs and not all(name.startswith("LABEL_") for name in names):
            logger.warning("%s names its outputs %s; they are taken for %s", teacher.path, names, list(task.labels))
        ours = _label_order((name for _, name in sorted(model.config.id2label.items())), task.labels)
        logits = logits[:, [(theirs or list(task.labels)).index(label) for label in ours or task.labels]]
    for feature, row in zip(features, logits.tolist(), strict=True):
        feature["teacher_logits"] = row


def _label_order(names: Iterable[str], labels: tuple[str, ...]) -> list[str]:
    """The task's labels in the order of the model's outputs; empty if the model has other ``names`` for them."""
    by_name = {label.lower(): label for label in labels}
    lowered = [name.lower() for name in names]
    return [by_name[name] for name in lowered] if sorted(lowered) == sorted(by_name) else []


def tokenize(tokenizer: Any, examples: Examples, model: Any, max_length: int) -> list[dict[str, Any]]:
    """Tokenized texts, one dictionary of lists each.

    Raises:
        ConfigError: if ``max_length`` is more than the model's positions.
    """
    longest = shape_of(model.config).max_positions
    if longest is not None and max_length > longest:
        raise ConfigError(f"{flag('max_length')} is {max_length}; the model has positions for at most {longest} tokens")
    return _encode(tokenizer, examples, max_length)


def _encode(tokenizer: Any, examples: Examples, max_length: int) -> list[dict[str, Any]]:
    encoded = tokenizer(examples.first, examples.second, truncation=True, max_length=max_length)
    return [{name: encoded[name][i] for name in encoded} for i in range(len(examples))]


def labelled_features(
    tokenizer: Any, examples: Examples, task: Task, model: Any, max_length: int
) -> list[dict[str, Any]]:
    """Tokenized examples; label ids in the order of the model's outputs."""
    features = tokenize(tokenizer, examples, model, max_length)
    if examples.labels is not None:
        labels: list[Any] = list(examples.labels)
        names = [name for _, name in sorted(model.config.id2label.items())]
        if task.labels is not None and (order := _label_order(names, task.labels)):
            labels = [order.index(task.labels[label]) for label in labels]
        for feature, label in zip(features, labels, strict=True):
            feature["labels"] = label
    return features


def _shorter(features: list[dict[str, Any]], quantile: float | None, *, say: bool) -> list[dict[str, Any]]:
    """The examples that are at most as long as the given quantile of all lengths; all of them for None."""
    if quantile is None:
        return features
    longest = length_quantile([len(feature["input_ids"]) for feature in features], quantile)
    chosen = [feature for feature in features if len(feature["input_ids"]) <= longest]
    if say:
        print(f"training on {len(chosen)} of {len(features)} examples; the longest has {longest} tokens")
    return chosen


def collator(tokenizer: Any, bf16: bool) -> DataCollatorWithPadding:
    """Makes padded batches of tokenized texts."""
    # Half-precision products on a CPU must not meet a fresh shape in every batch.
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if bf16 else None)


def make_evaluator(
    tokenizer: Any, data: TaskData, model: Any, options: TrainOptions, folder: Path | None
) -> EvaluateSplits:
    """What evaluates a model on every split, prints what it finds and writes ``eval_results.json``.

    Where ``folder`` is None it keeps silent: another process reports.
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
            about = {
                "task": data.task.name,
                "checkpoint": options.restore,
                "masking_mode": options.masking_mode,
                "prune_mode": getattr(model.config, "prune_mode", None) if options.masking_mode != "none" else None,
                "step": step,
                "batch_size": options.batch_size,
                "max_length": options.max_length,
                "dtype": "bfloat16 autocast" if options.bf16 else "float32",
                "device": str(model.device),
                "threads": torch.get_num_threads(),
            }
            write_evaluation(folder / "eval_results.json", splits, about)
        return splits

    return evaluate_splits


def _training_arguments(options: TrainOptions, run_dir: RunDir, task: Task) -> TrainingArguments:
    by_steps = options.save_steps is not None
    strategy: dict[str, Any] = {
        f"{what}_strategy": "steps" if by_steps else "epoch" for what in ("eval", "save", "logging")
    }
    if by_steps:
        strategy |= {f"{what}_steps": options.save_steps for what in ("eval", "save", "logging")}
    has_accelerator = torch.accelerator.is_available()
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
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
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for torchrun: DataParallel copies modules, not hooks
    arguments.per_device_train_batch_size = max(1, options.batch_size // arguments.world_size)
    return arguments
