"""The Trainer: the regularized or distilled loss, thresholds with their own learning rate, checkpoints never half."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, ProgressCallback

from token_pruning.lab.files import STAGING_PREFIX, sync
from token_pruning.lab.training.budget import BudgetController, soft_relative_flops
from token_pruning.lab.training.distillation import Distillation
from token_pruning.lab.training.evaluate import EvaluateSplits
from token_pruning.lab.training.run_dir import RunDir
from token_pruning.lab.training.states import StatesLoss
from token_pruning.pruners import Unpruned
from token_pruning.runtime.prune import attachment_of, freeze_thresholds, is_pruned, record
from token_pruning.runtime.regularize import regularizer

KEPT_CHECKPOINTS = 3


def _drops_tokens(model: Any) -> bool:
    return is_pruned(model) and not isinstance(attachment_of(model).token_pruner.pruner, Unpruned)


class WholeCheckpoints:
    """Put before a Trainer's class, it makes checkpoints appear whole or not at all, and keeps the last ones.

    Attributes:
        run_dir: where they go.
        keep_checkpoints: how many to keep, None for all.
    """

    run_dir: RunDir
    keep_checkpoints: int | None = KEPT_CHECKPOINTS

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        """Write a checkpoint under a temporary name, publish it, delete those no longer wanted."""
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            self.run_dir.staging(name)
        self.accelerator.wait_for_everyone()
        staging = self.run_dir.path / (STAGING_PREFIX + name)
        with self.run_dir.whole_or_removed(staging):
            self.save_model(str(staging), _internal_call=True)
            self._save_optimizer_and_scheduler(str(staging))
            self._save_rng_state(str(staging))
            if self.state.best_global_step:
                best = self.run_dir.path / f"checkpoint-{self.state.best_global_step}"
                if best.name == name or best.exists():
                    self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                exportable = [*self.callback_handler.callbacks, self.control]
                for callback in (c for c in exportable if isinstance(c, ExportableState)):
                    saved = self.state.stateful_callbacks.get(type(callback).__name__)
                    if isinstance(saved, list):
                        saved.append(callback.state())
                    else:
                        self.state.stateful_callbacks[type(callback).__name__] = callback.state()
                self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()  # every process has written its random state
            if self.args.should_save:
                sync(staging)
        if self.args.should_save:
            self.run_dir.publish(staging)
            if self.keep_checkpoints is not None:
                self.run_dir.keep_only(self.keep_checkpoints, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()


class PruningTrainer(WholeCheckpoints, Trainer):  # type: ignore[misc]
    """A Trainer for every stage; see :func:`token_pruning.lab.training.train.train`."""

    def __init__(
        self,
        *args: Any,
        run_dir: RunDir,
        evaluate_splits: EvaluateSplits,
        regularization: float | None = None,
        budget: BudgetController | None = None,
        distillation: Distillation | None = None,
        states: StatesLoss | None = None,
        lr_threshold: float | None = None,
        weight_decay_threshold: float | None = None,
        keep_checkpoints: int | None = KEPT_CHECKPOINTS,
        **kwargs: Any,
    ) -> None:
        """As Trainer.

        Args:
            *args: Trainer's.
            run_dir: where checkpoints go.
            evaluate_splits: evaluates a model on every validation split and reports what it finds.
            regularization: λ of the soft stage.
            budget: the controller that takes λ's place in the soft stage.
            distillation: how to learn from the examples' ``teacher_logits``; None where they have none.
            states: how to learn the teacher's hidden states besides; None for not at all.
            lr_threshold: learning rate of the thresholds; the weights' if None.
            weight_decay_threshold: of the thresholds; 0 if None.
            keep_checkpoints: how many checkpoints to keep, None for all.
            **kwargs: Trainer's.
        """
        self.run_dir = run_dir
        self.evaluate_splits = evaluate_splits
        self.regularization = regularization
        self.budget = budget
        self.distillation = distillation
        self.states = states
        self.lr_threshold = lr_threshold
        self.weight_decay_threshold = weight_decay_threshold
        self.keep_checkpoints = keep_checkpoints
        self._kept: list[Tensor] = []
        self.control: Any
        super().__init__(*args, **kwargs)
        # Classification heads average their loss themselves and ignore num_items_in_batch; told otherwise, the Trainer
        # would multiply the loss by the number of processes.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss, mixed with the distance to the teacher; in the soft stage plus what keeps tokens few."""
        teacher_logits = inputs.pop("teacher_logits", None)
        with ExitStack() as stack:
            trace = stack.enter_context(record(model)) if _drops_tokens(model) else None
            passes = None if self.states is None else stack.enter_context(self.states.watching(model))
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.distillation is not None:
            loss = self.distillation.mix(loss, outputs["logits"], teacher_logits)
        if self.states is not None and passes is not None:
            given = {name: value for name, value in inputs.items() if name != "labels"}
            loss = loss + self.states.of(passes[-1], given)
        if trace is None:
            return (loss, outputs) if return_outputs else loss
        token_pruner = attachment_of(model).token_pruner
        lengths = trace.soft_lengths if token_pruner.soft else trace.ffn_lengths
        self._kept.append((lengths.detach().sum(1) / trace.input_lengths.sum()).float())
        if token_pruner.soft:
            if self.budget is not None:
                loss = loss + self.budget.loss(soft_relative_flops(attachment_of(model).shape, trace))
            else:
                assert self.regularization is not None
                loss = loss + self.regularization * regularizer(trace)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Thresholds get a group of their own."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        target = self.model if model is None else model
        thresholds = attachment_of(target).token_pruner.thresholds if is_pruned(target) else None
        if thresholds is None or not thresholds.requires_grad:
            return optimizer
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p is not thresholds]
        optimizer.add_param_group(
            {
                "params": [thresholds],
                "lr": self.args.learning_rate if self.lr_threshold is None else self.lr_threshold,
                "weight_decay": self.weight_decay_threshold or 0.0,
            }
        )
        return optimizer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate on every split, in every process alike; metrics of the first are ``eval_…``."""
        splits = self.evaluate_splits(self.model, self.console, self.state.global_step)
        metrics: dict[str, float] = {}
        for number, (name, evaluation) in enumerate(splits.items()):
            prefix = "eval_" if number == 0 else f"eval_{name}_"
            metrics |= {prefix + key: value for key, value in evaluation.metrics.items()}
            metrics |= {f"{prefix}gflops_{key}": value for key, value in evaluation.gflops_per_example.items()}
            metrics[prefix + "relative_flops"] = evaluation.relative_flops
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def console(self, text: str) -> None:
        """Print above the progress bar."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ConsoleCallback) and callback.training_bar is not None:
                callback.training_bar.write(text)
                return
        print(text)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the thresholds and the fraction of tokens kept, per layer."""
        if "loss" in logs and _drops_tokens(self.model):
            thresholds = attachment_of(self.model).token_pruner.thresholds
            if thresholds is not None:
                logs |= {f"threshold_{layer}": value for layer, value in enumerate(thresholds.tolist(), start=1)}
            if self._kept:
                kept = torch.stack(self._kept).mean(0).tolist()
                logs |= {f"kept_{layer}": value for layer, value in enumerate(kept, start=1)}
                self._kept.clear()
        super().log(logs, start_time)


class HardSecondHalf(TrainerCallback):  # type: ignore[misc]
    """Masking mode ``mixed``: after half the steps thresholds are fixed and tokens removed."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Freeze once; a resumed run gets there with the thresholds of its checkpoint."""
        if state.global_step >= state.max_steps // 2:
            freeze_thresholds(model)


class ConsoleCallback(ProgressCallback):  # type: ignore[misc]
    """Progress bars, and one line per log entry instead of a dictionary."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Print loss, thresholds and kept fractions; evaluations print themselves."""
        if not state.is_world_process_zero or self.training_bar is None or not logs or "loss" not in logs:
            return

        def layers(prefix: str) -> str:
            values = [logs[key] for key in logs if key.startswith(prefix)]
            return f", {prefix[:-1]} " + " ".join(f"{value:.4g}" for value in values) if values else ""

        self.training_bar.write(
            f"step {state.global_step} (epoch {logs.get('epoch', 0):.2f}): loss {logs['loss']:.4f}, "
            f"lr {logs.get('learning_rate', 0):.2e}{layers('threshold_')}{layers('kept_')}"
        )
