"""One training run, from a checkpoint folder to a checkpoint folder: a plan is made, then carried out."""

import copy
import logging
import random
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import safe_globals

from token_pruning.budget.examples import as_batch
from token_pruning.budget.holding import BudgetHolder
from token_pruning.checkpoint import Checkpoint
from token_pruning.checkpoint.settings import foreign_errors
from token_pruning.errors import ConfigError
from token_pruning.families import padding_id
from token_pruning.lab.files import write_json
from token_pruning.lab.training.budget import (
    HELD_OUT_EXAMPLES,
    BudgetController,
    budget_holder,
    budget_schedule,
    fitting_examples,
    with_budget_table,
)
from token_pruning.lab.training.context import with_context
from token_pruning.lab.training.distillation import teacher_logits
from token_pruning.lab.training.evaluate import EvaluateSplits, make_evaluator
from token_pruning.lab.training.features import (
    collator,
    encode,
    label_order,
    labelled_features,
    output_names,
    shorter,
    tokenize,
)
from token_pruning.lab.training.load import load_classifier, load_float32, load_tokenizer
from token_pruning.lab.training.options import TrainOptions
from token_pruning.lab.training.plan import DataSource, TrainPlan, plan_training
from token_pruning.lab.training.states import StatesLoss
from token_pruning.lab.training.trainer import KEPT_CHECKPOINTS, ConsoleCallback, HardSecondHalf, PruningTrainer
from token_pruning.lab.training.vocabulary import with_vocabulary_gate
from token_pruning.pruners import FixedThreshold, Unpruned
from token_pruning.runtime.learning import learning
from token_pruning.runtime.prune import attachment_of, freeze_thresholds, is_pruned, prune, set_budget, unprune

logger = logging.getLogger(__name__)


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
    with ExitStack() as stack:
        plan = plan_training(options, load_data, stack)
        try:
            _carry_out(plan, callbacks)
        except KeyboardInterrupt as stop:
            if last := plan.run_dir.last_checkpoint(options.identity()):
                without = " without --overwrite-output-dir" if options.overwrite_output_dir else ""
                stop.add_note(f"the same command{without} continues from {last}")
            raise
    return plan.run_dir.path


def _carry_out(plan: TrainPlan, callbacks: Sequence[TrainerCallback]) -> None:
    options = plan.options
    built = _build(plan)  # what may still be refused; from here on files are written
    plan.data.say()
    if plan.budget_texts is not None:
        plan.budget_texts.note.say()
    if plan.first_process:
        plan.run_dir.start(options.identity(), resume=plan.resume)
    folder = plan.run_dir.path if plan.first_process else None
    evaluate_splits = make_evaluator(built.tokenizer, plan.data, built.model, options, folder)
    if plan.teacher is not None:
        with plan.arguments.main_process_first(local=False):  # the others find what it has written
            _add_teacher_logits(plan, built, plan.teacher)
    trainer = _trainer(plan, built, evaluate_splits, callbacks)
    _fit(plan, built, trainer)
    if plan.first_process:
        if plan.pruner is None and is_pruned(built.model):
            unprune(built.model)
        if options.elastic:
            _evaluate_budgets(plan, built.model, evaluate_splits)
        else:
            evaluate_splits(built.model)
        plan.run_dir.save_model(built.model, built.tokenizer)
        write_json(plan.run_dir.path / "trainer_state.json", asdict(trainer.state))
        plan.run_dir.finish(options.identity())
        print(f"saved to {plan.run_dir.path}")
    trainer.accelerator.wait_for_everyone()


def _evaluate_budgets(plan: TrainPlan, model: Any, evaluate_splits: EvaluateSplits) -> None:
    """Evaluate at every budget, the lowest last: that is where the model stays, and what ``eval_results.json`` says."""
    found = []
    for budget in reversed(plan.options.budgets):
        set_budget(model, budget)
        print(f"budget {budget:g}:")
        first = next(iter(evaluate_splits(model).values()))
        found.append({"budget": budget, "relative_flops": first.relative_flops, **first.metrics})
    write_json(plan.run_dir.path / "eval_budgets.json", found[::-1])


@dataclass(frozen=True)
class _Built:
    """What a plan needs in memory.

    Attributes:
        model: pruned for the stage; a dense one on a CPU is packed.
        tokenizer: the checkpoint's.
        features: all training examples.
        trained_on: those of them that are not held out.
        holder: keeps the budget, if there is one.
        states: what is learned of the teacher's hidden states, if anything.
    """

    model: Any
    tokenizer: Any
    features: list[dict[str, Any]]
    trained_on: list[dict[str, Any]]
    holder: BudgetHolder | None
    states: StatesLoss | None


def _build(plan: TrainPlan) -> _Built:
    """Load and prune the model and tokenize the examples.

    Raises:
        TokenPruningError: for a checkpoint, a length or a budget that turns out not to fit.
    """
    options = plan.options
    set_seed(options.seed)
    tokenizer = load_tokenizer(plan.start)
    model = load_classifier(plan.start, plan.data.task, new_head=plan.pruner is None)
    schedule = None if options.budget is None else budget_schedule(model, options, plan.start_is_learned)
    features = labelled_features(tokenizer, plan.examples, plan.data.task, model, options.max_length)
    texts: list[dict[str, Any]] | None = None
    if plan.budget_texts is not None:
        texts = tokenize(tokenizer, plan.budget_texts, model, options.max_length)
        texts = random.Random(options.seed).sample(texts, min(len(texts), HELD_OUT_EXAMPLES))
    trained_on, holder, batch = features, None, None
    if options.budget is not None:
        trained_on, held_out = fitting_examples(features, options.seed) if texts is None else (features, texts)
        batch = as_batch(held_out, padding_id(model.config))

    dense = None
    if plan.pruner is not None:
        model.to(plan.arguments.device)
        if batch is not None and plan.pruner.probes is not None and not options.soft:
            dense = copy.deepcopy(model).eval()
        pruner = with_vocabulary_gate(plan.pruner, plan, model, tokenizer, features, texts)
        if options.context:
            pruner = with_context(pruner, model, features, options.seed)
        if options.elastic:
            assert batch is not None and schedule is not None and isinstance(pruner, FixedThreshold)
            pruner = with_budget_table(pruner, model, batch, options.budgets, schedule)
        prune(model, pruner)
    elif plan.arguments.device.type == "cpu":
        prune(model, Unpruned())  # the same arithmetic without padding: a dense step takes two thirds of the time
    if batch is not None:
        holder = budget_holder(model, dense, batch, options, schedule)
    return _Built(model, tokenizer, features, trained_on, holder, _states_loss(plan, tokenizer))


def _add_teacher_logits(plan: TrainPlan, built: _Built, teacher: Checkpoint) -> None:
    """Give every training example its ``teacher_logits``, a list of floats in the order of the model's outputs."""
    options, labels = plan.options, plan.data.task.labels
    tokenizer = load_tokenizer(teacher)  # its own: a larger model of another family may teach
    logits = teacher_logits(
        teacher,
        encode(tokenizer, plan.examples, options.max_length),
        collator(tokenizer, options.bf16),
        fallback=plan.run_dir.path,
        batch_size=options.batch_size,
        bf16=options.bf16,
        device=plan.arguments.device,
    )
    if labels is not None:
        names = teacher.label_names() or []
        theirs = label_order(names, labels)
        if not theirs and not all(name.startswith("LABEL_") for name in names):
            logger.warning("%s names its outputs %s; they are taken for %s", teacher.path, names, list(labels))
        ours = label_order(output_names(built.model.config), labels)
        logits = logits[:, [(theirs or list(labels)).index(label) for label in ours or labels]]
    for feature, row in zip(built.features, logits.tolist(), strict=True):
        feature["teacher_logits"] = row


def _states_loss(plan: TrainPlan, tokenizer: Any) -> StatesLoss | None:
    weight = plan.options.teacher_states
    if weight is None or plan.teacher is None:
        return None
    if load_tokenizer(plan.teacher).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"--teacher-states needs a teacher that reads the same tokens; {plan.teacher.path} has another vocabulary "
            f"than {plan.start.path}"
        )
    return StatesLoss(load_float32(plan.teacher).to(plan.arguments.device), weight)


def _trainer(
    plan: TrainPlan, built: _Built, evaluate_splits: EvaluateSplits, callbacks: Sequence[TrainerCallback]
) -> PruningTrainer:
    options = plan.options
    of_stage: list[TrainerCallback] = [HardSecondHalf()] if options.masking_mode == "mixed" else []
    controller = None
    if built.holder is not None:
        of_stage.append(built.holder)
    if options.budget is not None and options.soft:
        controller = BudgetController(options.budget)
        of_stage.append(controller)
    trainer = PruningTrainer(
        built.model,
        plan.arguments,
        data_collator=collator(built.tokenizer, options.bf16),
        train_dataset=shorter(built.trained_on, options.train_length_quantile, say=plan.first_process),
        eval_dataset=[],  # the Trainer asks for one; evaluate_splits has the examples
        processing_class=built.tokenizer,
        run_dir=plan.run_dir,
        evaluate_splits=evaluate_splits,
        regularization=options.regularization,
        budget=controller,
        distillation=plan.distillation,
        states=built.states,
        lr_threshold=plan.lr_threshold,
        weight_decay_threshold=options.weight_decay_threshold,
        keep_checkpoints=None if options.save_all else KEPT_CHECKPOINTS,
        callbacks=[*of_stage, *callbacks],
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ConsoleCallback())
    return trainer


def check_resumable(folder: Path) -> None:
    """Read what the Trainer will read, tensors' values left alone, and as it does: nothing is ever unpickled.

    Raises:
        CheckpointError: for a file that is missing, broken or no plain tensors.
    """
    remedy = "remove the folder to continue from an earlier one, or give --overwrite-output-dir"
    with foreign_errors(f"{folder} cannot be continued ({remedy})"):
        TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        with safe_open(folder / "model.safetensors", framework="pt") as tensors:
            tensors.keys()
        for pattern in ("optimizer*.pt", "scheduler.pt", "rng_state*.pth"):
            for file in folder.glob(pattern):
                with safe_globals():
                    torch.load(file, map_location="meta", weights_only=True)


def _fit(plan: TrainPlan, built: _Built, trainer: PruningTrainer) -> None:
    """Train to the end, then fix what a stage leaves to be fixed."""
    trainer.accelerator.wait_for_everyone()
    checkpoints = plan.run_dir.checkpoints() if plan.resume else []
    if checkpoints:
        check_resumable(checkpoints[-1])
    if checkpoints and plan.first_process:
        print(f"continuing from {checkpoints[-1]}")
    with learning(attachment_of(built.model).token_pruner) if is_pruned(built.model) else nullcontext():
        trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    if plan.options.masking_mode == "mixed":
        freeze_thresholds(built.model)  # also where the best checkpoint is one of the soft half
    if built.holder is not None:
        fit = built.holder.finish(built.model)
        if plan.first_process and fit is not None:
            where = plan.options.budget_input or "held-out training examples"
            print(f"thresholds fitted to {fit.relative_flops:.3f} of the FLOPs on {where}")
