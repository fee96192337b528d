"""Packing and dropping, held against lists of tokens."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from token_pruning.ragged.layout import Layout, drop, layout_from_mask, pack, row_bucket, unpack

MASKS = st.integers(1, 9).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=5)
)


def as_lists(layout: Layout) -> list[list[int]]:
    """The places of every sequence's tokens in the flattened grid."""
    ends = layout.cu_seqlens.tolist()
    places = layout.indices.tolist()
    return [places[start:end] for start, end in pairwise(ends)]


def places_in(mask: list[list[bool]]) -> list[list[int]]:
    width = len(mask[0])
    return [[row * width + column for column in range(width) if mask[row][column]] for row in range(len(mask))]


def check_views(layout: Layout, expected: list[list[int]]) -> None:
    """Everything a layout says of itself follows from its tokens."""
    lengths = [len(places) for places in expected]
    assert as_lists(layout) == expected
    assert layout.indices.dtype == torch.int64
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.batch_size == len(expected)
    assert layout.total == sum(lengths)
    assert layout.lengths == layout.lengths_tensor.tolist() == lengths
    assert layout.sequence_ids.tolist() == [s for s, length in enumerate(lengths) for _ in range(length)]
    firsts = [sum(lengths[:s]) for s, length in enumerate(lengths) if length]
    assert layout.first_rows.tolist() == firsts


def test_the_example_of_the_module_docstring() -> None:
    layout = layout_from_mask(torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool())
    assert layout.indices.tolist() == [0, 1, 2, 4, 5]
    assert layout.cu_seqlens.tolist() == [0, 3, 5]
    fewer, kept, dropped = drop(layout, torch.tensor([1, 0, 1, 1, 0]).bool())
    assert fewer.indices.tolist() == [0, 2, 4]
    assert fewer.cu_seqlens.tolist() == [0, 2, 3]
    assert (kept.tolist(), dropped.tolist()) == ([0, 2, 3], [1, 4])


@given(MASKS)
def test_layout_from_mask_equals_lists(mask: list[list[bool]]) -> None:
    check_views(layout_from_mask(torch.tensor(mask)), places_in(mask))


@given(MASKS, st.integers(1, 3))
def test_unpack_undoes_pack_and_leaves_zeros_elsewhere(mask: list[list[bool]], dim: int) -> None:
    valid = torch.tensor(mask)
    grid = torch.randn(*valid.shape, dim)
    layout = layout_from_mask(valid)
    rows = pack(grid, layout)
    assert rows.shape == (layout.total, dim)
    assert torch.equal(rows, grid[valid])
    back = unpack(rows, layout.indices, *valid.shape)
    assert torch.equal(back, grid * valid[..., None])


@given(MASKS, st.randoms(use_true_random=False))
def test_unpack_accepts_rows_in_any_order(mask: list[list[bool]], random) -> None:
    valid = torch.tensor(mask)
    grid = torch.randn(*valid.shape, 2)
    layout = layout_from_mask(valid)
    order = list(range(layout.total))
    random.shuffle(order)
    shuffled = torch.tensor(order, dtype=torch.long)
    back = unpack(pack(grid, layout)[shuffled], layout.indices[shuffled], *valid.shape)
    assert torch.equal(back, grid * valid[..., None])


@given(MASKS, st.data())
def test_dropping_twice_keeps_order_and_places(mask: list[list[bool]], data: st.DataObject) -> None:
    layout, expected = layout_from_mask(torch.tensor(mask)), places_in(mask)
    for _ in range(2):
        keep = data.draw(st.lists(st.booleans(), min_size=layout.total, max_size=layout.total))
        old_rows = [place for places in expected for place in places]
        stays = {place for place, stay in zip(old_rows, keep, strict=True) if stay}
        layout, kept, dropped = drop(layout, torch.tensor(keep, dtype=torch.bool))
        expected = [[place for place in places if place in stays] for places in expected]
        check_views(layout, expected)
        assert [old_rows[row] for row in kept.tolist()] == [place for place in old_rows if place in stays]
        assert [old_rows[row] for row in dropped.tolist()] == [place for place in old_rows if place not in stays]
        assert layout.width == len(mask[0])


def test_sequences_without_tokens_stay_in_the_batch() -> None:
    mask = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0]]).bool()
    layout = layout_from_mask(mask)
    check_views(layout, [[], [4, 5], [], [9], []])
    fewer, _, _ = drop(layout, torch.tensor([0, 1, 0]).bool())
    check_views(fewer, [[], [5], [], [], []])
    grid = torch.randn(5, 3, 2)
    assert torch.equal(unpack(pack(grid, layout), layout.indices, 5, 3), grid * mask[..., None])


@given(st.integers(1, 1 << 20))
def test_row_bucket_is_little_more_than_the_rows(rows: int) -> None:
    bucket = row_bucket(rows)
    assert rows <= bucket <= rows + rows // 16 + 1
    assert row_bucket(bucket) == bucket
    assert row_bucket(rows + 1) >= bucket


def test_row_bucket_has_at_most_sixteen_sizes_per_octave() -> None:
    for octave in range(14):
        buckets = {row_bucket(rows) for rows in range((1 << octave) + 1, (2 << octave) + 1)}
        assert len(buckets) <= 16
    assert [row_bucket(rows) for rows in (1, 31, 32, 33, 1000)] == [1, 31, 32, 34, 1024]


def test_gradients_go_through_pack_and_unpack() -> None:
    grid = torch.randn(2, 3, 2, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    layout = layout_from_mask(mask)
    (2 * unpack(pack(grid, layout), layout.indices, 2, 3)).sum().backward()
    assert grid.grad is not None
    assert torch.equal(grid.grad, 2.0 * mask[..., None].expand(2, 3, 2))
