"""Heads on a first token's last state, without what transformers' classes do around them at every call.

For one short text that takes longer than the head's own products.
"""

from typing import Any

from torch import nn
from transformers.activations import GELUActivation

from token_pruning.engine.native import NativeLinear
from token_pruning.families.intact import hooks_of, not_plain

# Class names of transformers whose logits are ``out(activation(dense(first)))``, by where these layers are.
_POOLED = ("Bert", "Ernie", "MegatronBert")  # the base model's pooler, and ``classifier``
_CLASSIFIED = ("Roberta", "XLMRoberta", "Camembert", "Data2VecText", "MPNet", "Electra")  # within ``classifier``


def first_token_steps(head: Any, base: Any) -> tuple[nn.Module, ...] | None:
    """What a classifier does with first tokens' last states ``[batch, dim]``, one module after the other.

    Args:
        head: the model, evaluating, with an engine's linear layers.
        base: its base model.

    Returns:
        The modules, whose ``forward`` gives the logits; None for a head that is not known, or not as transformers made
        it.
    """
    name = type(head).__name__.removesuffix("ForSequenceClassification")
    if not _transformers_own(head, "ForSequenceClassification") or not head.config.return_dict:
        return None
    classifier: Any = head.classifier
    within: Any = None
    if name in _POOLED and _transformers_own(within := base.pooler, "Pooler"):
        steps = (within.dense, within.activation, classifier)
        dropout = head.dropout
    elif name in _CLASSIFIED and _transformers_own(within := classifier, "ClassificationHead"):
        steps = (within.dense, getattr(within, "activation", None) or nn.Tanh(), within.out_proj)
        dropout = within.dropout
    elif name == "DistilBert":
        steps, dropout = (head.pre_classifier, nn.ReLU(), classifier), head.dropout
    else:
        return None
    as_made = type(dropout) is nn.Dropout and type(steps[1]) in (nn.Tanh, nn.ReLU, GELUActivation)
    linear = all(type(step) is NativeLinear or not not_plain(step) for step in (steps[0], steps[2]))
    untouched = all(_untouched(module) for module in (head, within, dropout, *steps) if module is not None)
    return steps if as_made and linear and untouched else None


def _transformers_own(module: Any, ending: str) -> bool:
    """Whether a module's class is one of transformers' own with a name like this."""
    cls = type(module)
    return cls.__module__.startswith("transformers.models.") and cls.__name__.endswith(ending)


def _untouched(module: nn.Module) -> bool:
    """Whether a module's forward is its class's, without hooks."""
    return "forward" not in module.__dict__ and not hooks_of(module)
