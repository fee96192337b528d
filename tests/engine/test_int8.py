"""int8 on every kernel level: near float32, the same in any batch, and its weights moved from one level to another."""

import pickle
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import token_pruning as tp
from tests.engine.test_engine import LENGTHS, own_levels, tiled_model
from tests.tiny import SEVEN_BITS, assert_close, ragged_batch
from token_pruning.engine.library import KERNELS_VARIABLE

LEVELS = own_levels("int8")


def weights_of(engine: Any) -> list[tuple[Tensor, Tensor]]:
    """Whole numbers and scales of every linear layer."""
    encoder = engine._encoder
    found = []
    for place in encoder._shapes:
        if place[0] == "linear":
            weight, _, scale = encoder._get(*place).tensors
            found.append((weight, scale))
    return found


@pytest.mark.parametrize("level", LEVELS)
def test_logits_and_weights_are_near_those_of_float32(level: str, monkeypatch: Any) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    model, batch = tiled_model(), ragged_batch(LENGTHS)
    with torch.no_grad():
        reference = model(**batch).logits
    engine = tp.compile(model, "int8")
    bits = 7 if level in SEVEN_BITS else 8
    assert_close(engine(**batch).logits, reference, {7: 4e-2, 8: 3e-2}[bits] * reference.abs().max().item())
    first = model.base_model.encoder.layer[0].attention.self.query.weight
    weight, scale = weights_of(engine)[0]
    limit = 2**bits / 2 if bits == 7 else 127
    assert weight.abs().max() == limit
    assert ((weight * scale[:, None] - first).abs() <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize("level", LEVELS)
def test_a_thousand_sequences_have_the_same_bits_in_any_batch(level: str, monkeypatch: Any) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    model, rng = (
        tp.prune(tiled_model(num_hidden_layers=2), tp.FixedThreshold(final_token_threshold=0.02)),
        random.Random(3),
    )
    engine = tp.compile(model, "int8", threads=1)
    lengths = [rng.randint(1, 24) for _ in range(1000)]
    batch = ragged_batch(lengths)
    rows = [batch["input_ids"][i, :length] for i, length in enumerate(lengths)]

    def logits(order: list[int], largest: int) -> Tensor:
        """By sequence, whatever order and batches they come in."""
        found = torch.empty(len(rows), 3)
        while order:
            size = rng.randint(1, largest)
            chosen, order = order[:size], order[size:]
            cu_seqlens = torch.tensor([0, *(lengths[i] for i in chosen)]).cumsum(0)
            found[chosen] = engine.run_packed(torch.cat([rows[i] for i in chosen]), cu_seqlens).logits
        return found

    everything = list(range(len(rows)))
    expected = logits(everything, 1000)
    for largest in (8, 70, 400):
        rng.shuffle(everything)
        assert torch.equal(logits(everything, largest), expected)


@pytest.mark.parametrize("other", LEVELS)
@pytest.mark.parametrize("level", LEVELS)
def test_weights_move_between_levels(level: str, other: str, monkeypatch: Any) -> None:
    """Whole numbers stay as they are; only those of eight bits are rounded again where there are seven."""
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    model, batch = tiled_model(), ragged_batch(LENGTHS)
    engine: Any = tp.compile(model, "int8")
    before = weights_of(engine)
    monkeypatch.setenv(KERNELS_VARIABLE, other)
    data = pickle.dumps(engine)
    state = engine._encoder.__dict__
    monkeypatch.setitem(state, "_limit", 99)  # no processor has it: the best there is will be taken
    moved: Any = pickle.loads(pickle.dumps(engine))
    monkeypatch.undo()
    assert f"kernels: {other}, " in moved.explain()
    assert len(pickle.dumps(moved)) < len(data) + 1000
    rounded = other in SEVEN_BITS and level not in SEVEN_BITS
    for (weight, scale), (was, scale_was) in zip(weights_of(moved), before, strict=True):
        if not rounded:
            assert torch.equal(weight, was)
            assert torch.equal(scale, scale_was)
        assert weight.abs().max() <= (64 if other in SEVEN_BITS else 127)
        difference = (weight * scale[:, None] - was * scale_was[:, None]).abs()
        assert (difference <= 0.5001 * scale[:, None] * rounded).all()
    with torch.no_grad():
        reference = model(**batch).logits
    assert_close(moved(**batch).logits, reference, 5e-2 * reference.abs().max().item())
