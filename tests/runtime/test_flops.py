"""FLOPs from token counts, held against counting the operations of real matrix products."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import token_pruning as tp
from tests.tiny import pruned, ragged_batch, shared_model, tiny_config, tiny_model
from token_pruning.families import shape_of
from token_pruning.runtime.flops import layer_flops

FAMILIES = ("bert", "roberta", "electra", "distilbert")
KEEP_ALL = tp.FixedThreshold(final_token_threshold=0)


def bare_encoder(family: str) -> Any:
    """A model whose matrix products are its layers' alone: no pooler, no embedding projection, no head."""
    extra: dict[str, Any] = {"attn_implementation": "eager"}
    if family == "electra":
        extra["embedding_size"] = 32
    model = tiny_model(family, "encoder", **extra)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def measured(model: Any, batch: dict[str, torch.Tensor]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**batch)
    return counter.get_total_flops()


def recorded(model: Any, *batches: dict[str, torch.Tensor]) -> tp.Trace:
    with torch.no_grad(), tp.record(model) as trace:
        for batch in batches:
            model(**batch)
    return trace


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_and_padded_equal_the_products_of_a_dense_forward_pass(family: str) -> None:
    model = bare_encoder(family)
    lengths = [3, 17, 40]
    dense = [measured(model, ragged_batch([length], family=family)) for length in lengths]
    padded = measured(model, ragged_batch([48], family=family))
    tp.prune(model, tp.FixedThreshold(final_token_threshold=0.5, max_seq_length=48))
    flops = tp.count_flops(model, recorded(model, ragged_batch(lengths, family=family)))
    assert flops.dense == sum(dense) / 3
    assert flops.padded == padded
    assert flops.pruned < flops.dense < flops.padded


@pytest.mark.parametrize("method", ["fixed", "relative", "topk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_equals_the_products_that_packed_execution_really_computes(family: str, method: str) -> None:
    pruner: tp.Pruner = {
        "fixed": tp.FixedThreshold(final_token_threshold=0.04, max_seq_length=32),
        "relative": tp.RelativeThreshold(token_threshold=0.3),
        "topk": tp.TopK(token_keep_rate=0.2),
    }[method]
    model = tp.prune(bare_encoder(family), pruner)
    batch = ragged_batch([37], family=family)
    with FlopCounterMode(display=False) as counter, tp.record(model) as trace:
        model(**batch)  # with gradients on: fused attention is no matrix product to the counter
    flops = tp.count_flops(model, trace)
    assert flops.pruned == counter.get_total_flops()
    assert flops.pruned < 0.95 * flops.dense


def test_one_layer_by_hand() -> None:
    shape = shape_of(tiny_config("bert"))  # hidden 32, intermediate 64
    # Ten tokens in the attention, four in the feed-forward, multiply–accumulates:
    macs = 4 * 10 * 32 * 32 + 10 * 10 * 32 + 10 * 10 * 32 + 4 * 32 * 64 + 4 * 64 * 32
    assert macs == 63744
    assert layer_flops(shape, torch.tensor(10), torch.tensor(4)).item() == 2 * macs


def test_figures_by_hand_for_a_trace_of_two_batches() -> None:
    model = tiny_model()  # four layers
    tp.prune(model, tp.TopK(token_keep_rate=0.5, max_seq_length=20))
    trace = recorded(model, ragged_batch([8, 2]), ragged_batch([10]))

    def layer(attending: int, remaining: int) -> int:
        return 2 * (4 * attending * 1024 + 2 * attending**2 * 32 + 2 * remaining * 2048)

    flops = tp.count_flops(model, trace)
    assert flops.padded == 4 * layer(20, 20)
    assert flops.dense == pytest.approx(4 * (layer(8, 8) + layer(2, 2) + layer(10, 10)) / 3)

    def last_layer(attending: int) -> int:  # one query and one feed-forward row, whatever the pruner says
        return 2 * ((2 * attending + 2) * 1024 + 2 * attending * 32 + 2 * 2048)

    last = last_layer(8) + last_layer(2) + last_layer(10)
    assert flops.pruned == pytest.approx((3 * (layer(8, 8) + layer(2, 2) + layer(10, 10)) + last) / 3)
    assert flops.relative == flops.pruned / flops.dense
    assert flops.gflops() == {
        "padded": flops.padded / 1e9,
        "dense": flops.dense / 1e9,
        "pruned": flops.pruned / 1e9,
    }


def test_a_dropped_token_still_counts_in_its_layers_attention() -> None:
    model = tp.prune(tiny_model(head="token"), tp.FixedThreshold(thresholds=[9.0] * 4))
    flops = tp.count_flops(model, recorded(model, ragged_batch([30])))
    shape = shape_of(model.config)
    lengths = torch.tensor([30, 1, 1, 1])
    assert flops.pruned == layer_flops(shape, lengths, torch.ones(4)).sum().item()


def test_nothing_pruned_costs_what_dense_costs() -> None:
    with pruned(shared_model("roberta", "token"), KEEP_ALL) as model:
        flops = tp.count_flops(model, recorded(model, ragged_batch([8, 30], family="roberta")))
    assert flops.pruned == flops.dense
    assert flops.relative == 1


def test_padded_is_the_longest_sequence_where_that_is_longer_than_max_seq_length() -> None:
    model = tp.prune(tiny_model(), tp.FixedThreshold(final_token_threshold=0, max_seq_length=20))
    long = tp.count_flops(model, recorded(model, ragged_batch([50, 3])))
    assert long.padded == 4 * layer_flops(shape_of(model.config), torch.tensor(50), torch.tensor(50)).item()
    short = tp.count_flops(model, recorded(model, ragged_batch([5, 3], width=40)))  # padding is no length
    assert short.padded == 4 * layer_flops(shape_of(model.config), torch.tensor(20), torch.tensor(20)).item()


def test_a_config_will_do_for_a_model() -> None:
    model = tp.prune(tiny_model("distilbert"), tp.TopK())
    trace = recorded(model, ragged_batch([9]))
    assert tp.count_flops(model.config, trace) == tp.count_flops(model, trace)


def test_long_traces_do_not_lose_digits() -> None:
    shape = shape_of(tiny_config("bert"))
    counts = torch.full((1,), 2**20)
    exact = 2 * (4 * 2**20 * 1024 + 2 * 2**40 * 32 + 2 * 2**20 * 2048)
    assert layer_flops(shape, counts, counts).item() == exact


def test_figures_cannot_be_changed() -> None:
    flops = tp.Flops(3.0, 2.0, 1.0)
    with pytest.raises(FrozenInstanceError):
        flops.pruned = 0.5
    assert flops.relative == 0.5


# Probes, survivors, maps and corrections: hidden 32, intermediate 64, four layers

GATE = tp.VocabularyGate(torch.linspace(0, 1, 200), 0.3)
PROBES = tp.Probes([2], torch.linspace(-1, 1, 33)[None])
MAPS = tp.DepartureMaps(range(5), torch.zeros(5, 32, 33))
CORRECTION = tp.Correction(torch.zeros(32, 33))


def by_hand(keys: list[int], projected: list[int], left: list[int], vectors: int, maps: int) -> int:
    """``vectors``: inner products with a row; ``maps``: products of a row and a matrix."""
    macs = 0
    for n, joined, fed in zip(keys, projected, left, strict=True):
        macs += 3 * n * 32 * 32 + 2 * n * n * 32 + joined * 32 * 32 + 2 * fed * 32 * 64
    return 2 * (macs + vectors * 32 + maps * 32 * 32)


@pytest.mark.parametrize("reads", ["mean", "all"])
@pytest.mark.parametrize("departed", ["state", "survivors", "map"])
@pytest.mark.parametrize("probed", [False, True])
@torch.no_grad()
def test_what_departed_tokens_cost_by_hand(departed: str, probed: bool, reads: Any) -> None:
    options: dict[str, Any] = {"departed": departed, "vocabulary": GATE, "probes": PROBES if probed else None}
    if departed == "map":
        options["maps"] = MAPS
    if reads == "mean":
        options["correction"] = CORRECTION
    pruner = tp.FixedThreshold(thresholds=[0.5, 0.7, 0.7, 0.7], scoring_mode="relative", **options)
    model = tp.prune(tiny_model("bert", "encoder"), pruner, reads=reads)
    for length in (30, 1):
        trace = recorded(model, ragged_batch([length]))
        keys, left = trace.attention_lengths[:, 0].tolist(), trace.ffn_lengths[:, 0].tolist()
        lost = [length - keys[0], *(n - m for n, m in zip(keys, left, strict=True))]
        assert length == 1 or min(lost[0], lost[1], lost[2]) > 0
        projected = left if departed == "survivors" else keys
        projected = [keys[layer] if probed and layer == 1 else joined for layer, joined in enumerate(projected)]
        maps = 0
        if departed == "map":
            maps = sum(map(bool, lost)) if reads == "mean" else sum(lost)
        if reads == "mean":
            maps += any(lost)
        expected = by_hand(keys, projected, left, keys[1] if probed else 0, maps)
        assert tp.count_flops(model, trace).pruned == expected


@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize("departed", ["state", "survivors"])
@pytest.mark.parametrize("reads", ["first", "all"])
def test_they_equal_the_products_of_a_forward_pass(departed: Any, probed: bool, reads: Any) -> None:
    probes = tp.Probes([2, 4], torch.linspace(-1, 1, 33).repeat(2, 1)) if probed else None
    model = tp.prune(
        bare_encoder("bert"),
        tp.FixedThreshold(thresholds=[0.5, 0.2, 0.6, 0.3], scoring_mode="relative", departed=departed, probes=probes),
        reads=reads,
    )
    batch = ragged_batch([37])
    trace = recorded(model, batch)
    with FlopCounterMode(display=False) as counter:
        model(**batch)  # with gradients on: fused attention is no matrix product to the counter
    assert tp.count_flops(model, trace).pruned == counter.get_total_flops()


@torch.no_grad()
def test_a_token_that_became_a_summary_was_lost() -> None:
    pruner = tp.FixedThreshold(
        thresholds=[0.5, 0, 0, 0], scoring_mode="relative", summary_tokens="shared", departed="map", maps=MAPS
    )
    model = tp.prune(tiny_model("bert", "encoder"), pruner)
    trace = recorded(model, ragged_batch([30]))
    kept = [int((layers > 0).sum()) for layers in trace.survived_layers]
    assert trace.computed_lengths.mapped.tolist() == [[30 - kept[0]]]
