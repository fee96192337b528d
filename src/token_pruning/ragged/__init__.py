"""Ragged batches, tensors only: packing, dropping rows, and attention that says how much of it every token received."""

from token_pruning.ragged.layout import (
    Layout,
    drop,
    drop_below,
    full_layout,
    layout_from_mask,
    pack,
    row_bucket,
    unpack,
)
from token_pruning.ragged.logits import NO_TERMS, LogitTerms
from token_pruning.ragged.packed import first_token_attention, packed_attention
from token_pruning.ragged.padded import masked_attention
from token_pruning.ragged.tokens import PackedTokens

__all__ = [
    "NO_TERMS",
    "Layout",
    "LogitTerms",
    "PackedTokens",
    "drop",
    "drop_below",
    "first_token_attention",
    "full_layout",
    "layout_from_mask",
    "masked_attention",
    "pack",
    "packed_attention",
    "row_bucket",
    "unpack",
]
