"""Packed and masked attention, held against one softmax per sequence in float64."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import assert_close, assert_equal
from token_pruning.ragged import masked_attention, packed_attention
from token_pruning.ragged.layout import Layout, layout_from_mask

HEADS, DIM, SCALING = 3, 4, 0.6
LENGTHS = st.lists(
    st.one_of(st.integers(0, 5), st.integers(1, 200), st.sampled_from([63, 64, 65, 128, 129])), min_size=1, max_size=6
)


def layout_of(lengths: list[int]) -> Layout:
    return layout_from_mask(torch.arange(max(1, *lengths))[None] < torch.tensor(lengths)[:, None])


def random_rows(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, rows, HEADS, DIM, generator=generator)
    return 2 * query, key, value


def attention_by_loops(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Context ``[rows, heads, dim]`` and received attention ``[tokens]``, both float64 and differentiable."""
    q, k, v = query.double(), key.double(), value.double()
    contexts, receives, start = [], [], 0
    for length in lengths:
        rows = slice(start, start + length)
        start += length
        received = torch.zeros(length, dtype=torch.float64)
        context = []
        for head in range(HEADS):
            probabilities = (q[rows, head] @ k[rows, head].T * SCALING).softmax(-1)
            context.append(probabilities @ v[rows, head])
            received = received + probabilities.sum(0) / HEADS
        contexts.append(torch.stack(context, 1))
        receives.append(received)
    contexts.append(torch.zeros(len(query) - start, HEADS, DIM, dtype=torch.float64))  # filler rows give zeros
    return torch.cat(contexts), torch.cat(receives)


@settings(max_examples=60)
@given(lengths=LENGTHS, filler=st.integers(0, 3), seed=st.integers(0, 99))
@example(lengths=[200, 1, 130, 64, 65, 2], filler=2, seed=0)
@example(lengths=[7, 7, 7], filler=0, seed=0)
@example(lengths=[7, 7, 7], filler=3, seed=0)
@example(lengths=[0, 5, 0], filler=0, seed=0)
@example(lengths=[0, 0], filler=2, seed=0)
@example(lengths=[65, 64, 63, 66], filler=0, seed=0)
def test_packed_attention_equals_one_softmax_per_sequence(lengths: list[int], filler: int, seed: int) -> None:
    query, key, value = random_rows(sum(lengths) + filler, seed)
    context, received = packed_attention(query, key, value, layout_of(lengths), SCALING)
    expected_context, expected_received = attention_by_loops(query, key, value, lengths)
    assert received is not None
    assert received.dtype == torch.float32
    assert_close(context, expected_context, 2e-5)
    assert_close(received, expected_received, 2e-5)

    with torch.no_grad():
        fused, none = packed_attention(query, key, value, layout_of(lengths), SCALING, needs_importance=False)
    assert none is None
    assert_close(fused, expected_context, 2e-5)


def test_garbage_in_filler_rows_reaches_nothing() -> None:
    lengths = [3, 9, 70]
    query, key, value = random_rows(sum(lengths) + 4)
    for tensor in (query, key, value):
        tensor[sum(lengths) :] = torch.nan
    context, received = packed_attention(query, key, value, layout_of(lengths), SCALING)
    clean = slice(0, sum(lengths))
    expected, expected_received = attention_by_loops(query[clean], key[clean], value[clean], lengths)
    assert_close(context[clean], expected, 2e-5)
    assert not context[sum(lengths) :].any()
    assert received is not None
    assert_close(received, expected_received, 2e-5)


@pytest.mark.parametrize("lengths", [[5, 5], [5, 0, 17, 1], [70, 3, 130]])
@pytest.mark.parametrize("needs_importance", [True, False])
def test_gradients_equal_the_reference(lengths: list[int], needs_importance: bool) -> None:
    rows = random_rows(sum(lengths) + 2)
    leaves = [x.clone().requires_grad_() for x in rows]
    references = [x.double().requires_grad_() for x in rows]
    weights = torch.randn(rows[0].shape), torch.randn(sum(lengths))

    context, received = packed_attention(*leaves, layout_of(lengths), SCALING, needs_importance=needs_importance)
    expected, expected_received = attention_by_loops(*references, lengths)
    loss = (context * weights[0]).sum()
    expected_loss = (expected * weights[0]).sum()
    if received is not None:
        loss = loss + (received * weights[1]).sum()
        expected_loss = expected_loss + (expected_received * weights[1]).sum()
    loss.backward()
    expected_loss.backward()
    for name, leaf, reference in zip("qkv", leaves, references, strict=True):
        assert leaf.grad is not None and reference.grad is not None
        assert_close(leaf.grad, reference.grad, 1e-4, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[20, 20], [3, 0, 70, 131, 12]])
def test_half_precision_stays_near_float64(lengths: list[int], dtype: torch.dtype) -> None:
    rows = [x.to(dtype) for x in random_rows(sum(lengths) + 1)]
    context, received = packed_attention(*rows, layout_of(lengths), SCALING)
    expected, expected_received = attention_by_loops(*rows, lengths)
    assert context.dtype == dtype
    assert received is not None
    assert received.dtype == torch.float32
    assert_close(context, expected, 0.1)
    # Only queries, keys and their product are rounded; the softmax and the sums over queries are float32.
    assert_close(received, expected_received, 0.03 * expected_received.max().item())
    assert received.sum().item() == pytest.approx(sum(lengths), abs=1e-3)


@pytest.mark.parametrize("packed", [True, False])
def test_dropout_is_applied_after_the_importance_is_taken(packed: bool) -> None:
    torch.manual_seed(0)
    lengths = [6, 3]
    layout = layout_of(lengths)
    alive = torch.tensor([[1] * 6, [1] * 3 + [0] * 3]).bool()
    query, key, value = random_rows(9)

    def attention(dropout: float) -> tuple[Tensor, Tensor]:
        if packed:
            context, received = packed_attention(query, key, value, layout, SCALING, dropout)
            assert received is not None
            return context, received
        padded = [torch.zeros(2, HEADS, 6, DIM) for _ in range(3)]
        for grid, rows in zip(padded, (query, key, value), strict=True):
            grid.transpose(1, 2)[alive] = rows
        context, _, received = masked_attention(*padded, alive, SCALING, dropout)
        return context.transpose(1, 2)[alive], received[alive]

    plain, plain_received = attention(0.0)
    draws = [attention(0.25) for _ in range(3000)]
    for _, received in draws:
        assert_equal(received, plain_received)
    contexts = torch.stack([context for context, _ in draws])
    assert_close(contexts.mean(0), plain, 0.08)  # scaled up by 1 / (1 - 0.25), so that the mean stays
    # A probability is zeroed a quarter of the time: all six of a row, of one head, 0.25 ** length of the time.
    zeroed = (contexts == 0).all(-1).float().mean((0, 2))
    assert_close(zeroed[6:], torch.full((3,), 0.25**3), 0.006)


def test_dropout_is_applied_where_no_importance_is_needed() -> None:
    torch.manual_seed(0)
    query, key, value = random_rows(5)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            context, _ = packed_attention(query, key, value, layout_of([2, 3]), SCALING, 1.0, needs_importance=False)
        assert not context.any()


def test_masked_attention_equals_one_softmax_per_sequence() -> None:
    torch.manual_seed(0)
    alive = torch.rand(4, 11) < 0.6
    alive[1] = False  # a sequence without any token must not become NaN
    query, key, value = torch.randn(3, 4, HEADS, 11, DIM)
    context, probabilities, received = masked_attention(query, key, value, alive, SCALING)
    assert context.isfinite().all()
    assert probabilities.shape == (4, HEADS, 11, 11)
    assert received.dtype == torch.float32
    rows = [x.transpose(1, 2)[alive] for x in (query, key, value)]
    expected, expected_received = attention_by_loops(*rows, alive.sum(1).tolist())
    assert_close(context.transpose(1, 2)[alive], expected, 1e-5)
    assert_close(received[alive], expected_received, 1e-5)
    others = ~alive & alive.any(1, keepdim=True)
    assert not received[others].any()
    assert not probabilities.transpose(1, 3)[others].any()


# How much the attention that a token pays counts


@settings(max_examples=40)
@given(lengths=LENGTHS, seed=st.integers(0, 99), grad=st.booleans())
@example(lengths=[200, 1, 130, 64, 65, 2], seed=0, grad=False)
@example(lengths=[7, 7, 7], seed=0, grad=True)
@example(lengths=[0, 5, 0], seed=0, grad=False)
def test_received_attention_is_weighed_by_who_pays(lengths: list[int], seed: int, grad: bool) -> None:
    query, key, value = random_rows(sum(lengths) + 2, seed)
    layout = layout_of(lengths)
    paid = 3 * torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed))
    paid = paid * (paid > 1)  # many do not count at all
    expected, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        total = torch.zeros(length, dtype=torch.float64)
        for head in range(HEADS):
            logits = query[rows, head].double() @ key[rows, head].double().T * SCALING
            total += paid[rows].double() @ logits.softmax(-1) / HEADS
        expected.append(total)
        start += length
    with torch.set_grad_enabled(grad):
        plain, _ = packed_attention(query, key, value, layout, SCALING)
        context, received = packed_attention(query, key, value, layout, SCALING, paid=paid)
        assert received is not None
        assert_close(received, torch.cat(expected), 1e-4)
        assert_equal(context, plain)
        assert packed_attention(query, key, value, layout, SCALING, needs_importance=False, paid=paid)[1] is None
    alive = layout.grid(torch.ones(layout.total)).bool()
    padded = [torch.zeros(*alive.shape, HEADS, DIM) for _ in range(3)]
    for grid, rows_of in zip(padded, (query, key, value), strict=True):
        grid[alive] = rows_of[: layout.total]
    q, k, v = (x.transpose(1, 2) for x in padded)
    _, _, masked = masked_attention(q, k, v, alive, SCALING, paid=layout.grid(paid))
    assert_close(masked[alive], torch.cat(expected), 1e-4)
    assert not masked[~alive].any()
