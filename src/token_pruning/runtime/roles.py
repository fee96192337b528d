"""What tokens are in their text, as far as pruning treats some otherwise: separators, and the first text of a pair.

Tokenizers end every sequence with the separator they also put between two texts, so a sequence's last token says what
the separator is, whatever the model.
"""

import torch
from torch import Tensor

from token_pruning.errors import ConfigError
from token_pruning.pruners import Pruner
from token_pruning.ragged import Layout, PackedTokens


def protected(tokens: PackedTokens, pruner: Pruner) -> Tensor | None:
    """Tokens that never leave, besides first ones.

    Args:
        tokens: the valid tokens.
        pruner: its ``protect`` says which.

    Returns:
        ``[tokens]`` bool; None where all may leave.

    Raises:
        ConfigError: where ids are needed and missing.
    """
    if not pruner.protect:
        return None
    ids = _ids(tokens, f"protect is {list(pruner.protect)}")
    found = torch.zeros_like(ids, dtype=torch.bool)
    if "separators" in pruner.protect:
        found = found | separators(ids, tokens.layout)
    if "first_segment" in pruner.protect:
        first = first_segment(ids, tokens.layout)
        second = torch.zeros(tokens.layout.batch_size, device=ids.device).scatter_add(
            0, tokens.layout.sequence_ids, (~first).float()
        )
        found = found | first & (second > 0)[tokens.layout.sequence_ids]  # a single text is no pair's first
    return found


def asking(tokens: PackedTokens, pruner: Pruner) -> Tensor | None:
    """Tokens whose attention counts as importance.

    Args:
        tokens: the valid tokens.
        pruner: its ``received_from`` says which.

    Returns:
        ``[tokens]`` bool; None for all.

    Raises:
        ConfigError: where ids are needed and missing.
    """
    if pruner.received_from == "all":
        return None
    first = torch.zeros(tokens.layout.total, dtype=torch.bool, device=tokens.positions.device)
    first = first.index_fill(0, tokens.layout.first_rows, 1)
    if pruner.received_from == "first":
        return first
    ids = _ids(tokens, f"received_from is {pruner.received_from!r}")
    return first_segment(ids, tokens.layout) & ~separators(ids, tokens.layout) & ~first


def separators(ids: Tensor, layout: Layout) -> Tensor:
    """``[tokens]`` bool: tokens like the last one of their sequence."""
    ends = layout.cu_seqlens.long()[1:] - 1  # an empty sequence borrows its neighbour's, and has no token to mark
    if layout.total == 0:
        return torch.zeros_like(ids, dtype=torch.bool)
    return ids == ids[ends.clamp(min=0)][layout.sequence_ids]


def first_segment(ids: Tensor, layout: Layout) -> Tensor:
    """``[tokens]`` bool: tokens up to the first separator of their sequence, that one included."""
    marks = separators(ids, layout).long()
    before = marks.cumsum(0) - marks  # over all sequences; those of the sequences before this one do not count
    starts = layout.cu_seqlens.long()[:-1].clamp(max=max(0, layout.total - 1))
    return (before - before[starts][layout.sequence_ids]) == 0 if layout.total else marks.bool()


def _ids(tokens: PackedTokens, what: str) -> Tensor:
    if tokens.ids is None:
        raise ConfigError(f"{what}, which needs input_ids; inputs_embeds will not do")
    return tokens.ids
