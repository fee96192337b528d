"""Attention that also says how much attention every token received: the only place that knows kernels."""

from token_pruning.ragged.packed import first_token_attention, packed_attention
from token_pruning.ragged.padded import masked_attention

__all__ = ["first_token_attention", "masked_attention", "packed_attention"]
