"""Attention that also says how much attention every token received: the only place that knows kernels."""

from token_pruning.attention.masked import masked_attention
from token_pruning.attention.packed import packed_attention

__all__ = ["masked_attention", "packed_attention"]
