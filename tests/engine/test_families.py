"""Every family's layers on the native kernels against the loop on PyTorch: all that the loop can do, on every level."""

import copy
import pickle
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import token_pruning as tp
from tests.engine.test_engine import own_levels
from tests.families.shared import assert_same, batch_of, model_of, valid
from tests.tiny import LONGEST, VOCABULARY, assert_close, decision_margin, outputs, pruned, ragged_batch, same_survivors
from token_pruning.engine.library import KERNELS_VARIABLE
from token_pruning.families import family_of, shape_of

FAMILIES = (
    "mpnet", "albert", "megatron-bert", "xlm-roberta-xl", "modernbert", "nomic_bert", "gte", "eurobert",
    "jina_embeddings_v3", "deberta", "deberta-v2",
)  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "mpnet, more buckets": {"relative_attention_num_buckets": 64},
    "albert, two layers per group": {"inner_group_num": 2, "layers": 3},
    "albert, groups that do not divide": {"num_hidden_groups": 3, "layers": 5},
    "albert, embeddings as wide as layers": {"embedding_size": 32},
    "modernbert, biases": {"norm_bias": True, "attention_bias": True, "mlp_bias": True},
    "modernbert, a window of one": {"local_attention": 1},
    "modernbert, windows first": {
        "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    },
    "nomic_bert, wide heads": {"head_dim": 12},
    "nomic_bert, odd halves": {"head_dim": 6},
    "gte without token types": {"type_vocab_size": 0},
    "eurobert, one head of keys": {"num_key_value_heads": 1, "attention_bias": True},
    "eurobert, as many heads of keys": {"num_key_value_heads": 4, "mlp_bias": True},
    "jina_embeddings_v3, yarn": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                            "original_max_position_embeddings": 20}
    },
    "deberta, no relative attention": {"relative_attention": False},
    "deberta, no terms": {"pos_att_type": None},
    "deberta, by queries": {"pos_att_type": "c2p"},
    "deberta, by keys": {"pos_att_type": "p2c"},
    "deberta, a term that is none": {"pos_att_type": "c2p|p2p"},
    "deberta, all distances": {"max_relative_positions": -1},
    "deberta, near distances": {"max_relative_positions": 3},
    "deberta, no positions": {"position_biased_input": False, "type_vocab_size": 0, "embedding_size": 16},
    "deberta-v2, own projections": {"share_att_key": False},
    "deberta-v2, by queries": {"share_att_key": False, "pos_att_type": "c2p"},
    "deberta-v2, by keys": {"share_att_key": False, "pos_att_type": "p2c"},
    "deberta-v2, by queries with shared projections": {"pos_att_type": ["c2p"]},
    "deberta-v2, no terms": {"pos_att_type": None, "position_biased_input": True},
    "deberta-v2, no buckets": {"position_buckets": -1, "max_relative_positions": 20},
    "deberta-v2, all distances": {"max_relative_positions": -1, "norm_rel_ebd": "none"},
    "deberta-v2, no relative attention": {"relative_attention": False, "position_biased_input": True},
    "deberta-v2, BERT's embeddings": {
        "position_biased_input": True, "type_vocab_size": 2, "embedding_size": 16, "hidden_act": "gelu_new"
    },
}  # fmt: skip
HIDDEN = 32
LENGTHS = (5, 40, 1, 33, 2, 70)
SEPARATOR = 4


def probes(layers: list[int]) -> tp.Probes:
    weights = torch.randn(len(layers), HIDDEN + 1, generator=torch.Generator().manual_seed(0))
    return tp.Probes(layers, weights / HIDDEN**0.5)


def maps() -> tp.DepartureMaps:
    weights = torch.randn(5, HIDDEN, HIDDEN + 1, generator=torch.Generator().manual_seed(0))
    return tp.DepartureMaps(range(5), weights / HIDDEN**0.5)


def context(*layers: int, rank: int = 7, number: int = 4, size: int = HIDDEN) -> tp.LinearContext:
    """Of so many layers; keys and values about as large as a tiny model's own."""
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(len(layers), rank, HIDDEN + 1, generator=generator) / HIDDEN**0.5
    return tp.LinearContext(layers, down, torch.randn(number, 2 * size, rank + 1, generator=generator) / rank**0.5)


def suited(pruner: tp.Pruner, model: Any) -> tp.Pruner:
    """The method with context for keys as large as the model's."""
    found, shape = pruner.context, shape_of(model.config)
    if found is None or found.up.shape[1] == 2 * shape.key_size:
        return pruner
    layers, rank = found.layers, found.down.shape[1]
    return replace(pruner, context=context(*layers, rank=rank, number=shape.num_layers, size=shape.key_size))


RELATIVE: dict[str, Any] = {"thresholds": [0.5, 0.6, 0.7, 0.8], "scoring_mode": "relative"}
PRUNERS: dict[str, tp.Pruner] = {
    "dense": tp.Unpruned(),
    "thresholds": tp.FixedThreshold(final_token_threshold=0.0119),
    "topk": tp.TopK(token_keep_rate=0.3, keep_all_layers=1),
    "summaries": tp.FixedThreshold(final_token_threshold=1.1, scoring_mode="relative", summary_tokens="segment"),
    "roles": tp.FixedThreshold(protect=("separators",), received_from="first_segment", **RELATIVE),
    "probes": tp.TopK(token_keep_rate=0.3, keep_all_layers=1, probes=probes([2, 4])),
    "survivors": tp.FixedThreshold(departed="survivors", **RELATIVE),
    "maps": tp.FixedThreshold(departed="map", maps=maps(), **RELATIVE),
    "max_tokens": tp.TopK(token_keep_rate=0.5, max_tokens=24),
    "windows": tp.TopK(token_keep_rate=0.5, max_tokens=24, chunks=True),
}

GATE = tp.VocabularyGate(torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(1)), 0.4)
CONTEXT: dict[str, tp.Pruner] = {
    "context of all": tp.TopK(
        token_keep_rate=0.3, keep_all_layers=1, scoring_mode="relative", vocabulary=GATE, context=context(0, 1, 2, 3, 4)
    ),
    "context of the gate's": tp.FixedThreshold(
        thresholds=[0.0] * 4, vocabulary=GATE, departed="survivors", context=context(0, rank=HIDDEN)
    ),
    "context of what entered": tp.FixedThreshold(
        thresholds=[0.6, 0.5, 0.4, 0.4], scoring_mode="relative", vocabulary=GATE, context=context(1, 2)
    ),
    "context and maps": tp.TopK(
        token_keep_rate=0.3, keep_all_layers=1, probes=probes([2]), vocabulary=GATE, departed="map", maps=maps(),
        context=context(0, 2, rank=1), protect=("separators",), received_from="first_segment",
    ),
    "context and max_tokens": tp.TopK(
        token_keep_rate=0.5, keep_all_layers=1, max_tokens=24, vocabulary=GATE, context=context(0, 2)
    ),
    "context and windows": tp.TopK(
        token_keep_rate=0.5, keep_all_layers=1, max_tokens=24, chunks=True, vocabulary=GATE, context=context(0, 2, 3)
    ),
}  # fmt: skip


@cache
def shared(family: str, head: str = "encoder", setting: str = "") -> Any:
    """A model for tests that leave it as they found it."""
    return model_of(family, head, **SETTINGS.get(setting, {}))


def pairs(family: str, lengths: tuple[int, ...] = LENGTHS, **options: Any) -> dict[str, Tensor]:
    """Two texts in each sequence, as far as there is room, with separators between and after them."""
    batch = batch_of(family, lengths=lengths, **options)
    mask = batch["attention_mask"].bool()
    for row, length in enumerate(lengths):
        places = mask[row].nonzero().flatten()[[*{length // 3, length - 1} - {0, -1}]]
        batch["input_ids"][row, places] = SEPARATOR
    return batch


def compare(model: Any, pruner: tp.Pruner, batch: dict[str, Tensor], what: str, **options: Any) -> Any:
    """The engine, which gives what the loop on PyTorch gives, and drops what that drops."""
    reads: Any = None if pruner.max_tokens is None else "mean" if pruner.chunks else "first"
    pruner = suited(pruner, model)
    with pruned(model, pruner, reads=reads), torch.no_grad(), tp.record(model) as expected:
        reference = model(**batch)
        engine: Any = tp.compile(model, "float32", **options)
    assert engine.is_native, engine.explain()
    with tp.record(engine) as actual:
        found = engine(**batch)
    layers = len(expected.passes[0].layers)
    assert isinstance(pruner, tp.Unpruned) or decision_margin(expected, layers) > 1e-6, "choose another threshold"
    assert same_survivors(actual, expected), what
    assert tp.count_flops(engine, actual) == tp.count_flops(model, expected)
    assert_same(valid(found, batch), valid(reference, batch), 1e-4, what)
    again = engine(**batch)
    for name, value in outputs(again).items():
        assert torch.equal(value, found[name]), f"recording changed {name}"
    return engine


@pytest.mark.parametrize("level", own_levels("float32"))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_level_gives_what_the_loop_gives(family: str, level: str, monkeypatch: Any) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    engine = compare(shared(family), PRUNERS["topk"], pairs(family), family, threads=2)
    assert f"kernels: {level}, " in engine.explain()
    compare(shared(family), CONTEXT["context of all"], pairs(family), family, threads=2)


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_gives_what_the_loop_gives(family: str, name: str) -> None:
    compare(shared(family), PRUNERS[name], pairs(family), f"{family}, {name}", threads=1)


@pytest.mark.parametrize("name", CONTEXT)
@pytest.mark.parametrize("family", FAMILIES)
def test_context_is_what_the_loop_gives(family: str, name: str) -> None:
    pruner = CONTEXT[name]
    if family == "modernbert":  # whose windows leave some tokens without any of the first segment's attention
        pruner = replace(pruner, received_from="all")
    compare(shared(family), pruner, pairs(family), f"{family}, {name}", threads=1)
    compare(shared(family), pruner, pairs(family, left=True), f"{family}, {name}, padded left", threads=2)


@pytest.mark.parametrize("head", ["sequence", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_reads_first_tokens_and_one_that_reads_all(family: str, head: str) -> None:
    for name in ("dense", "thresholds", "summaries"):
        compare(shared(family, head), PRUNERS[name], pairs(family), f"{family}, {head}, {name}", threads=2)
    for name in [*CONTEXT][:3]:
        compare(shared(family, head), CONTEXT[name], pairs(family), f"{family}, {head}, {name}", threads=2)


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_single_families(setting: str) -> None:
    family = setting.split()[0].strip(",")
    model, batch = shared(family, "encoder", setting), pairs(family)
    layers = model.config.num_hidden_layers * getattr(model.config, "inner_group_num", 1)
    by_gate = replace(CONTEXT["context of all"], context=context(0, 2, number=layers))
    # In a window of one every token receives as much.
    for pruner in (PRUNERS["dense"], *(() if setting.endswith("window of one") else (PRUNERS["topk"], by_gate))):
        compare(model, pruner, batch, f"{setting}, {pruner}")
    with torch.no_grad():  # and the model itself
        expected = valid(model(**batch), batch)
    assert_same(valid(tp.compile(model, "float32")(**batch), batch), expected, 1e-4, setting)
    assert tp.compile(model, "float32").token_pruner.num_layers == layers


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=5),
    left=st.booleans(),
    holes=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 3),
    family=st.sampled_from(FAMILIES),
    name=st.sampled_from(["dense", "topk", "summaries", "roles", "probes", "survivors", *[*CONTEXT][:4]]),
)
def test_ragged_batches(
    lengths: list[int], left: bool, holes: bool, threads: int, seed: int, family: str, name: str
) -> None:
    """Against the loop, and to the last bit against each sequence alone, with tokens masked in the middle too."""
    if not max(lengths):
        return
    batch, model = ragged_batch(lengths, family=family, seed=seed, left=left), shared(family)
    if holes:
        batch["attention_mask"] = batch["attention_mask"] * (batch["input_ids"] % 7 != 3)
    mask = batch["attention_mask"].bool()
    if not mask.any():
        return
    with pruned(model, suited({**PRUNERS, **CONTEXT}[name], model)), torch.no_grad(), tp.record(model) as expected:
        reference = model(**batch).last_hidden_state
        engine = tp.compile(model, "float32", threads=threads)
    with tp.record(engine) as actual:
        states = engine(**batch).last_hidden_state
    if name == "dense" or decision_margin(expected, 4) > 1e-5:
        assert same_survivors(actual, expected)
        assert_close(states[mask], reference[mask], 1e-4 * max(1.0, reference[mask].abs().max().item()))
    for row in range(len(lengths)):
        if mask[row].any():
            alone = engine(**{key: x[row : row + 1] for key, x in batch.items()}).last_hidden_state
            assert torch.equal(alone[0][mask[row]], states[row][mask[row]]), row


@pytest.mark.parametrize(
    ("dtype", "level"), [(dtype, level) for dtype in ("bfloat16", "int8") for level in own_levels(dtype)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_near_the_model(family: str, dtype: Any, level: str, monkeypatch: Any) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "initializer_range": 0.08}
    more = {"eurobert": {"head_dim": 32}, "albert": {"embedding_size": 64}}.get(family, {})
    model, batch = model_of(family, "encoder", **sizes, **more), pairs(family)
    with torch.no_grad():
        reference = model(**batch).last_hidden_state
    engine = tp.compile(model, dtype, threads=1)
    assert f"kernels: {level}, " in engine.explain() or level == "amx"  # whose tiles the heads here do not all fit
    mask = batch["attention_mask"].bool()
    difference = (engine(**batch).last_hidden_state - reference)[mask]
    spread = reference[mask].std()
    assert difference.std() < {"bfloat16": 2e-2, "int8": 6e-2}[dtype] * spread, difference.std() / spread


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_pickles_give_the_same_bits(family: str) -> None:
    model, batch = shared(family, "token"), pairs(family)
    pruners = [PRUNERS["summaries"], suited(CONTEXT["context of all"], model)]
    for dtype, pruner in product(("float32", "int8"), pruners):
        with pruned(model, pruner):
            engine = tp.compile(model, dtype, threads=1)
        expected = engine(**batch).logits
        for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
            assert torch.equal(other(**batch).logits, expected)
        twice = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(engine))))
        assert torch.equal(twice(**batch).logits, expected)


def every_weight(family: str) -> list[str]:
    return [name for name, weight in shared(family).named_parameters() if "pooler" not in name and weight.dim() < 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_nan_in_any_weight_reaches_the_result(family: str) -> None:
    """So no weight is left out."""
    model, batch = copy.deepcopy(shared(family)), pairs(family)
    weights, mask = dict(model.named_parameters()), batch["attention_mask"].bool()
    for name in every_weight(family):
        weight = weights[name].data
        was = weight.clone()
        weight[..., 0] = torch.nan
        with pruned(model, tp.Unpruned()), torch.no_grad():  # in a padded batch, padding spoils what is beside it
            expected = model(**batch).last_hidden_state[mask].isnan()
        found = tp.compile(model, "float32", threads=1)(**batch).last_hidden_state[mask].isnan()
        assert expected.any() and torch.equal(found, expected), name
        weight.copy_(was)


@pytest.mark.parametrize("level", own_levels("float32"))
@pytest.mark.parametrize("family", ["mpnet", "deberta-v2"])
def test_a_nan_in_context_stays_in_its_sequence(family: str, level: str, monkeypatch: Any) -> None:
    """A token that never enters: nothing of it is left but its keys and values."""
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    model, batch = copy.deepcopy(shared(family)), pairs(family)
    special, mask = 7, batch["attention_mask"].bool()
    scores = torch.where(torch.arange(VOCABULARY) == special, 0.0, 1.0)
    batch["input_ids"][batch["input_ids"] == special] = special + 1
    for layers in ((0,), (1,)):
        pruner = tp.FixedThreshold(
            thresholds=[0.0] * 4, vocabulary=tp.VocabularyGate(scores, 0.5), departed="survivors",
            context=context(*layers),
        )  # fmt: skip
        with pruned(model, pruner):
            clean = tp.compile(model, "float32", threads=2)(**batch).last_hidden_state
            ids = batch["input_ids"].clone()
            ids[1, 7] = special
            model.get_input_embeddings().weight.data[special] = torch.nan
            found = tp.compile(model, "float32", threads=2)(**{**batch, "input_ids": ids}).last_hidden_state
        assert found[1][mask[1]].isnan().any() == (layers == (0,))
        others = [row for row in range(len(LENGTHS)) if row != 1]
        assert torch.equal(found[others][mask[others]], clean[others][mask[others]])
        model.get_input_embeddings().weight.data[special] = 0.1


@pytest.mark.parametrize("level", own_levels("float32"))
@pytest.mark.parametrize("family", ["mpnet", "modernbert", "eurobert", "deberta-v2"])
def test_a_nan_stays_in_its_sequence(family: str, level: str, monkeypatch: Any) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    model, batch = copy.deepcopy(shared(family)), pairs(family)
    special, mask = 7, batch["attention_mask"].bool()
    batch["input_ids"][batch["input_ids"] == special] = special + 1
    clean = tp.compile(model, "float32", threads=2)(**batch).last_hidden_state
    model.get_input_embeddings().weight.data[special] = torch.nan
    batch["input_ids"][1, 7] = special
    found = tp.compile(model, "float32", threads=2)(**batch).last_hidden_state
    assert found[1].isnan().any()
    others = [row for row in range(len(LENGTHS)) if row != 1]
    assert torch.equal(found[others][mask[others]], clean[others][mask[others]])


@pytest.mark.parametrize(
    ("family", "rate"),
    [("modernbert", 0.1), ("mpnet", 0.1), ("eurobert", 0.1), ("deberta", 0.14), ("deberta-v2", 0.14)],
)
def test_long_texts_with_tokens_far_apart(family: str, rate: float) -> None:
    """Farther than any window and any bucket of distances, and blocks of queries with gaps between them."""
    long = {"max_position_embeddings": 720} if family in ("mpnet", "deberta") else {}
    model = model_of(family, "encoder", **long)
    batch = ragged_batch((400, 650, 3), family=family)
    few = tp.TopK(token_keep_rate=rate, keep_all_layers=1)
    far = replace(few, scoring_mode="relative", vocabulary=GATE, context=context(0, 2))
    for pruner in (tp.Unpruned(), few, far):
        compare(model, pruner, batch, family, threads=2)


def test_position_ids_turn_queries_and_keys_but_windows_are_of_places() -> None:
    model = shared("modernbert")
    batch = ragged_batch((40, 12), family="modernbert")
    batch["position_ids"] = torch.arange(40).flip(0).expand(2, 40) * 3
    compare(model, PRUNERS["topk"], batch, "position_ids")
    compare(model, CONTEXT["context of all"], batch, "position_ids, context")


def test_shared_layers_are_packed_once() -> None:
    one, many = (model_of("albert", "encoder", layers=layers, num_hidden_groups=1) for layers in (1, 12))
    sizes = [tp.compile(model, "float32")._encoder.weight_bytes for model in (one, many)]
    assert sizes[0] == sizes[1]


def test_a_class_that_adds_something_to_logits_runs_on_pytorch() -> None:
    """A subclass of a native family that says nothing about it."""
    mpnet = family_of(shared("mpnet").config)
    own = mpnet.distance_bias
    try:
        mpnet.distance_bias = lambda self: None  # type: ignore[method-assign]
        explained = tp.compile(shared("mpnet"), "float32").explain()
    finally:
        mpnet.distance_bias = own  # type: ignore[method-assign]
    assert "kernels: PyTorch, because the native ones have no 'mpnet' attention" in explained


def test_what_never_entered_gets_the_last_norm() -> None:
    """Of the vocabulary gate's tokens the embeddings count, as the loop has them."""
    for family in ("modernbert", "eurobert", "megatron-bert", "albert", "deberta-v2"):
        model, batch = shared(family), pairs(family)
        scores = torch.rand(model.config.vocab_size, generator=torch.Generator().manual_seed(0))
        for departed in ("state", "survivors"):
            gate = tp.VocabularyGate(scores, 0.3)
            pruner = tp.TopK(token_keep_rate=0.5, vocabulary=gate, departed=departed)
            compare(model, pruner, batch, f"{family}, {departed}")
            others = replace(pruner, scoring_mode="relative", context=context(0))
            compare(model, others, batch, f"{family}, {departed}, context")


def test_lengths_of_every_kind() -> None:
    """Around the edges of blocks of queries and of steps of keys."""
    lengths = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)
    for family in ("mpnet", "modernbert", "deberta", "deberta-v2"):
        assert max(lengths) <= LONGEST[family]
        compare(shared(family), PRUNERS["dense"], ragged_batch(lengths, family=family), family, threads=2)
        batch = ragged_batch(lengths, family=family, seed=2)
        compare(shared(family), CONTEXT["context of all"], batch, f"{family}, context", threads=2)
