"""Linear settings of a method as parameters, while weights are trained."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from token_pruning.runtime.token_pruner import TokenPruner

_LINEAR = ("map_weights", "context_down", "context_up", "correction_weights")


@contextmanager
def learning(token_pruner: TokenPruner) -> Iterator[None]:
    """Inside, maps, context and corrections train with the weights; afterwards the method has what was learned."""
    for name in _LINEAR:
        tensor = getattr(token_pruner, name)
        if tensor is not None:
            delattr(token_pruner, name)
            setattr(token_pruner, name, nn.Parameter(tensor.clone()))
    try:
        yield
    finally:
        for name in _LINEAR:
            tensor = getattr(token_pruner, name)
            if tensor is not None:
                delattr(token_pruner, name)
                token_pruner.register_buffer(name, tensor.detach())
        token_pruner.follow_tensors()
