"""What keeps tokens few in the soft stage, in one's own loop and in a trainer."""

from typing import Any, TypeVar

import torch
from torch import Tensor

from token_pruning.checks import number
from token_pruning.errors import ConfigError
from token_pruning.runtime.prune import attachment_of, record
from token_pruning.runtime.trace import Trace

TrainerT = TypeVar("TrainerT")


def regularizer(trace: Trace) -> Tensor:
    """``Σ_l (Σ_i m_i / N)``, the mean over the batch (arXiv 2107.00910, equation 8): a float32 scalar."""
    return trace.soft_rates.sum(0).mean()


def regularize(trainer: TrainerT, weight: float) -> TrainerT:
    """Add the soft stage's regularizer to the loss that a trainer minimises, in place.

    The loss becomes task + ``weight`` · Σ_l (Σ_i m_i / N), the mean over the texts of a batch. Evaluations, and steps
    after :func:`freeze_thresholds`, have the task's loss alone. Each batch's loss counts as a mean, as it is for all
    heads but language models': transformers' Trainer would otherwise sum it over the steps of gradient accumulation, as
    it does with a ``compute_loss_func``. Called again it takes another weight.

    Args:
        trainer: a ``Trainer`` of transformers, or a ``SentenceTransformerTrainer`` or ``CrossEncoderTrainer``, whose
            model is pruned by :class:`LearnedThreshold`.
        weight: λ; 0 or more. The larger, the fewer tokens stay.

    Returns:
        The same trainer.

    Raises:
        ConfigError: for something else than a trainer, a model that is not pruned that way, or a weight that is not
            allowed; while training for a loss that calls the model without gradients, such as the cached ones of
            sentence-transformers.
    """
    number("weight", weight, low=0)
    own = getattr(trainer, "compute_loss", None)
    own = getattr(own, "without_regularizer", own)
    model = getattr(trainer, "model", None)
    if own is None or model is None:
        raise ConfigError(f"a {type(trainer).__name__} is given; it must be a trainer with a model and compute_loss")
    pruner = attachment_of(model).token_pruner.pruner
    if not pruner.learned:
        raise ConfigError(f"the trainer's model is pruned by {pruner!r}; only LearnedThreshold has a regularizer")

    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        with record(model) as trace:
            loss, outputs = own(model, inputs, return_outputs=True, **options)
        if attachment_of(model).token_pruner.soft:
            term = regularizer(trace)
            if torch.is_grad_enabled() and not term.requires_grad:
                raise ConfigError(
                    "the loss calls the model without gradients, so that none would come from the regularizer; use a "
                    "loss that is not cached"
                )
            loss = loss + weight * term
        return (loss, outputs) if return_outputs else loss

    changed: Any = trainer
    changed.compute_loss = compute_loss
    changed.compute_loss.without_regularizer = own
    changed.model_accepts_loss_kwargs = False
    return trainer
