"""Attention over packed sequences on a GPU, where the attention matrix is never written to memory.

Context and log-sum-exp come from PyTorch's FlashAttention (``varlen_attn``) where it can be had, else from a kernel of
our own; the attention that tokens receive comes from a second pass over queries and keys with that log-sum-exp.
"""

import functools
import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from token_pruning.ragged import triton
from token_pruning.ragged.layout import Layout

_HALF = (torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256


def can_fuse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    dropout: float,
    *,
    differentiable_importance: bool,
    window: int | None = None,
) -> bool:
    """Whether :func:`fused_attention` computes this, and its gradient where one is wanted.

    Dropout on probabilities is left to the plain path, as is importance with a gradient (the soft stage). In float32,
    with a window, or without the library's kernels, nothing fused here has a gradient.
    """
    if not triton.usable(query.device) or query.shape[-1] > _MAX_HEAD_DIM or layout.total == 0:
        return False
    if query.dtype not in (*_HALF, torch.float32) or dropout > 0:
        return False
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return not needs_gradient or (not differentiable_importance and window is None and _library_takes(query))


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float,
    *,
    needs_importance: bool = True,
    window: int | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention within each sequence.

    Args:
        query: ``[layout.total, heads, head_dim]`` float16, bfloat16 or float32.
        key: see ``query``.
        value: see ``query``.
        layout: the tokens present.
        scaling: factor on ``query · key``.
        needs_importance: False where nothing will be pruned: then there is no second pass.
        window: greatest distance between the positions of a query and a key; None for none. Not differentiable.
        positions: ``[layout.total]`` integers or more, for the window; places in the padded batch unless given.

    Returns:
        context ``[layout.total, heads, head_dim]`` and received attention ``[layout.total]`` float32 without a gradient
        (None if not needed).
    """
    cu_seqlens, longest = layout.cu_seqlens, max(layout.lengths)
    if window is None:
        positions = None
    elif positions is None:
        positions = layout.indices % layout.width
    context, lse = _attend(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, scaling, window=window, positions=positions
    )
    if not needs_importance:
        return context, None
    from token_pruning.ragged.triton.attention import column_sums

    sums = column_sums(query, key, lse, cu_seqlens, longest, scaling, window=window, positions=positions)
    return context, sums.mean(0)


def fused_first_token_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> Tensor:
    """Softmax attention of each sequence's first token alone.

    Args:
        query: ``[batch, heads, head_dim]``; no sequence is empty.
        key: ``[layout.total, heads, head_dim]``; ``value`` alike.
        value: see ``key``.
        layout: the tokens present.
        scaling: factor on ``query · key``.

    Returns:
        context ``[batch, heads, head_dim]``.
    """
    cu_queries = torch.arange(layout.batch_size + 1, dtype=torch.int32, device=query.device)
    return _attend(query, key, value, cu_queries, layout.cu_seqlens, 1, max(layout.lengths), scaling)[0]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    scaling: float,
    *,
    window: int | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Context and log-sum-exp ``[heads, queries]``, from the library where it can."""
    if window is None and _library_takes(query):
        return _library_attention(query, key, value, cu_queries, cu_keys, max_queries, max_keys, scaling)
    from token_pruning.ragged.triton.attention import attend

    return attend(
        query, key, value, cu_queries, cu_keys, max_queries, scaling,
        window=window, query_positions=positions, key_positions=positions,
    )  # fmt: skip


def _library_takes(query: Tensor) -> bool:
    return (
        query.is_cuda
        and torch.version.hip is None  # whose log-sum-exp comes in another shape
        and query.dtype in _HALF
        and query.shape[-1] % 8 == 0
        and _varlen() is not None
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


@functools.cache
def _varlen() -> Any:
    """``torch.nn.attention.varlen``, or None where it is missing or too old to be told a scale (before 2.11)."""
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return None
    return module if "scale" in inspect.signature(module.varlen_attn).parameters else None


def _library_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Context and log-sum-exp ``[heads, queries]``; differentiable but for the latter."""
    varlen = _varlen()
    context, lse = varlen.varlen_attn(
        query, key, value, cu_queries, cu_keys, max_queries, max_keys,
        return_aux=varlen.AuxRequest(lse=True), scale=scaling,
    )  # fmt: skip
    return context, lse
