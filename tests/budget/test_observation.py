"""What a dense model says of its tokens: influence against finite differences, attention and maps against loops."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import token_pruning as tp
from tests.tiny import assert_close, ragged_batch, tiny_model
from token_pruning.budget import observation
from token_pruning.budget.observation import Target, _influence, _read, _TakingPart, observe
from token_pruning.runtime.prune import attachment_of, prunable

LENGTHS = [5, 7, 9]  # rising, so that batches keep the order
LAYERS = 3
STEP = 1e-2
TARGETS = get_args(Target)
ZEROS = tp.FixedThreshold(thresholds=[0.0] * LAYERS, scoring_mode="relative")


@contextmanager
def observed(family: str, head: str, reads: Any, pruner: tp.Pruner = ZEROS) -> Iterator[Any]:
    model = tiny_model(family, head, layers=LAYERS, initializer_range=0.15)
    with prunable(model, pruner, reads):
        yield model


def what_is_read(model: Any, batch: dict[str, Tensor], change: Callable[[list[Tensor]], None]) -> Tensor:
    """What :func:`_influence` takes the gradient of, with other factors."""

    class Changed(_TakingPart):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            with torch.no_grad():
                change(self.factors)

    attachment = attachment_of(model)
    before = attachment.loop
    loops: list[Any] = []
    attachment.loop = partial(Changed, seen=loops)
    try:
        with torch.no_grad():
            output = model(**batch)
            return _read(output, loops[0], attachment.reads)
    finally:
        attachment.loop = before


@pytest.mark.parametrize(
    ("family", "head", "reads"),
    [
        ("bert", "sequence", None),
        ("bert", "token", None),
        ("bert", "question", None),
        ("bert", "encoder", "mean"),
        ("bert", "encoder", "first"),
        ("mpnet", "encoder", "mean"),
        ("distilbert", "sequence", None),
    ],
)
def test_influence_is_how_far_the_output_moves(family: str, head: str, reads: Any) -> None:
    batch = ragged_batch(LENGTHS, family=family)
    places = batch["attention_mask"].flatten().nonzero().squeeze(-1).tolist()
    with observed(family, head, reads) as model:
        [seen] = list(_influence(model, batch, seed=4))
        shape = what_is_read(model, batch, lambda factors: None).shape
        generator = torch.Generator().manual_seed(4)
        torch.randperm(1, generator=generator)  # the order of the batches
        directions = [torch.randn(shape, generator=generator) for _ in range(observation._PROJECTIONS)]
        if shape[1] <= observation._PROJECTIONS:  # every number of the output by itself
            directions = [torch.eye(shape[1])[number].expand(shape) for number in range(shape[1])]
        for start in range(LAYERS):
            moved = []
            for token, place in enumerate(places):

                def change(factors: list[Tensor], by: float, start: int = start, place: int = place) -> None:
                    for factor in factors[start:]:
                        factor[place] += by

                one, other = (what_is_read(model, batch, partial(change, by=by)) for by in (STEP, -STEP))
                slope = (one - other) / (2 * STEP)
                squares = sum(float((slope * direction).sum()) ** 2 for direction in directions)
                row = next(i for i in range(len(LENGTHS)) if token < sum(LENGTHS[: i + 1]))
                moved.append(squares**0.5 * LENGTHS[row])
            expected = torch.tensor(moved)
            expected = expected / expected.mean() + 1e-3
            found = seen.worth(start)
            assert_close(found, expected, 0.02 * float(expected.max()), f"from layer {start + 1} on")
    assert torch.equal(seen.ids, batch["input_ids"][batch["attention_mask"].bool()])


def test_influence_is_of_texts_of_all_lengths() -> None:
    batch = ragged_batch([*[8] * 225, *[60] * 30])
    with observed("bert", "encoder", "mean") as model, pytest.MonkeyPatch.context() as patch:
        patch.setattr(observation, "_BATCH_TOKENS", 400)
        patch.setattr(observation, "_INFLUENCE_GRADIENTS", 4 * 1500)
        tokens = [len(seen.ids) for seen in _influence(model, batch, seed=0)]
    assert 1500 <= sum(tokens) < 1500 + 200
    assert {count % 60 == 0 for count in tokens} == {True, False}  # three long ones, or up to 25 short ones


def test_the_same_seed_gives_the_same_directions() -> None:
    batch = ragged_batch(LENGTHS)
    with observed("bert", "encoder", "mean") as model:
        first, again, other = (next(iter(_influence(model, batch, seed=seed))).worth(0) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_long_texts_are_observed_where_they_enter() -> None:
    batch = ragged_batch([40, 12, 30] * 12)
    for chunks in (False, True):
        pruner = tp.FixedThreshold(thresholds=[0.0] * LAYERS, scoring_mode="relative", max_tokens=16, chunks=chunks)
        with observed("bert", "encoder", "mean", pruner) as model:
            found = observe(model, batch, [1, 2], TARGETS, seed=0)
        assert set(found.maps) == {0, 1, 2}
        assert all(probe.isfinite().all() for probe in found.probes.values())


@pytest.mark.parametrize(("head", "reads", "maps"), [("encoder", "mean", {0, 1, 2}), ("sequence", None, set())])
def test_everything_that_is_fitted_has_its_shape(head: str, reads: Any, maps: set[int]) -> None:
    batch = ragged_batch([12, 20, 9, 16] * 10)
    with observed("bert", head, reads) as model:
        found = observe(model, batch, [1, 2], TARGETS, seed=0)
        size, hidden = model.get_input_embeddings().weight.shape
    assert set(found.tables) == {"attention", "influence"}
    assert set(found.probes) == {(target, layer) for target in found.tables for layer in (1, 2)}
    assert set(found.maps) == maps
    for table in found.tables.values():
        assert table.shape == (size,) and table.dtype == torch.float32 and bool((table > 0).all())
    assert all(probe.shape == (hidden + 1,) for probe in found.probes.values())
    assert all(weights.shape == (hidden, hidden + 1) for weights in found.maps.values())


def test_the_loop_is_put_back() -> None:
    batch = ragged_batch(LENGTHS)
    with observed("bert", "encoder", "mean") as model:
        before = attachment_of(model).loop
        observe(model, batch, [1], TARGETS, seed=0)
        assert attachment_of(model).loop is before
        with pytest.raises(tp.TokenPruningError):
            observe(model, {**batch, "input_ids": batch["input_ids"].float()}, [1], TARGETS, seed=0)
        assert attachment_of(model).loop is before
