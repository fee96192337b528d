"""The context that a training run starts with."""

import random
from dataclasses import replace
from typing import Any

from token_pruning.budget.context import can_have_context, fit_context
from token_pruning.budget.examples import as_batch
from token_pruning.budget.fitting import prunable_layers
from token_pruning.errors import ConfigError
from token_pruning.families import padding_id
from token_pruning.pruners import Pruner
from token_pruning.runtime.prune import prunable

_EXAMPLES = 1000


def with_context(pruner: Pruner, model: Any, features: list[dict[str, Any]], seed: int) -> Pruner:
    """The method with context for tokens that leave anywhere: the checkpoint's, if that has one.

    Args:
        pruner: the method.
        model: the checkpoint's, not pruned.
        features: the training examples, tokenized.
        seed: of the choice of those that it is fitted to.

    Raises:
        ConfigError: for a model of a family that does not say how its keys turn with their positions.
    """
    if pruner.context is not None:
        return pruner
    with prunable(model):
        if not can_have_context(model):
            raise ConfigError(f"--context is not for {model.config.model_type!r}: nothing says how its keys turn")
        some = random.Random(seed).sample(features, min(len(features), _EXAMPLES))
        layers = range(1, prunable_layers(model) + 1)
        context = fit_context(model, as_batch(some, padding_id(model.config)), layers)
    return replace(pruner, context=context)
