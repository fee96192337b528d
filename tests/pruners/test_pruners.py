"""Every pruner's decision, held against the rules in plain Python, and the checks of its configuration."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import token_pruning as tp
from tests.tiny import keep_by_the_book, topk_count
from token_pruning.pruners import LayerTokens
from token_pruning.ragged.layout import Layout, layout_from_mask

# A few distinct values make ties likely; the others make near misses likely.
SCORES = st.one_of(st.sampled_from([0.125, 0.25, 0.5]), st.floats(2**-10, 1, width=32))
SEQUENCES = st.lists(st.lists(SCORES, max_size=12), min_size=1, max_size=5)


def layout_of(sequences: list[list[float]]) -> Layout:
    lengths = torch.tensor([len(scores) for scores in sequences])
    return layout_from_mask(torch.arange(max(1, int(lengths.max())))[None] < lengths[:, None])


def decide(
    pruner: tp.Pruner,
    sequences: list[list[float]],
    *,
    layer: int = 4,
    layers: int = 4,
    input_lengths: list[int] | None = None,
) -> list[list[bool]]:
    """The pruner's decision per sequence, the rule of the first token applied as the package does."""
    layout = layout_of(sequences)
    thresholds = pruner.initial_thresholds(layers)
    tokens = LayerTokens(
        layer=layer,
        num_layers=layers,
        layout=layout,
        scores=torch.tensor([score for scores in sequences for score in scores], dtype=torch.float32),
        input_lengths=torch.tensor(input_lengths or layout.lengths),
        threshold=None if thresholds is None else torch.tensor(thresholds, dtype=torch.float32)[layer - 1],
    )
    keep = pruner.keep(tokens)
    assert keep.dtype == torch.bool
    assert keep.shape == (layout.total,)
    keep = keep.index_fill(0, layout.first_rows, True)
    return [part.tolist() for part in keep.split(layout.lengths)]


def as_float32(sequences: list[list[float]]) -> list[list[np.float32]]:
    return [[np.float32(score) for score in scores] for scores in sequences]


# Absolute thresholds


@given(SEQUENCES, st.one_of(st.sampled_from([0.125, 0.25, 0.5]), st.floats(0, 1)), st.integers(1, 4), st.booleans())
def test_absolute_threshold_drops_what_is_below(
    sequences: list[list[float]], final: float, layer: int, learned: bool
) -> None:
    pruner = (tp.LearnedThreshold if learned else tp.FixedThreshold)(final_token_threshold=final)
    threshold = np.float32(final * layer / 4)
    expected = [[i == 0 or score >= threshold for i, score in enumerate(scores)] for scores in as_float32(sequences)]
    assert decide(pruner, sequences, layer=layer) == expected


def test_a_score_equal_to_the_threshold_stays() -> None:
    pruner = tp.FixedThreshold(thresholds=[0.25])
    below = float(np.nextafter(np.float32(0.25), np.float32(0)))
    assert decide(pruner, [[0.0, 0.25, below, 0.5]], layer=1, layers=1) == [[True, True, False, True]]


def test_linear_thresholds_of_twelve_layers() -> None:
    for cls in (tp.FixedThreshold, tp.LearnedThreshold):
        thresholds = cls(final_token_threshold=0.01).initial_thresholds(12)
        assert thresholds is not None
        assert [thresholds[layer - 1] for layer in (3, 6, 9, 12)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
        assert len(thresholds) == 12
        assert np.diff([0.0, *thresholds]) == pytest.approx([0.01 / 12] * 12)


def test_explicit_thresholds_are_used_as_given() -> None:
    pruner = tp.LearnedThreshold(thresholds=[0.5, 0.0, 0.25], scoring_mode="mean_norm")
    assert list(pruner.initial_thresholds(3) or ()) == [0.5, 0.0, 0.25]
    scores = [[0.0, 0.2, 0.3, 0.6]]
    assert decide(pruner, scores, layer=1, layers=3) == [[True, False, False, True]]
    assert decide(pruner, scores, layer=2, layers=3) == [[True] * 4]
    assert decide(pruner, scores, layer=3, layers=3) == [[True, False, True, True]]


# Top-k


@given(SEQUENCES, st.floats(-2, 1), st.integers(0, 30), st.integers(3, 13), st.data())
def test_topk_keeps_the_best_of_every_sequence(
    sequences: list[list[float]], rate: float, extra: int, layers: int, data: st.DataObject
) -> None:
    layer = data.draw(st.integers(1, layers))
    pruner = tp.TopK(token_keep_rate=rate)
    lengths = [len(scores) + extra for scores in sequences]
    if layer > 3:  # a product that is a half but for rounding is another test's matter
        exact = rate + (1 - rate) * (layers - layer) / (layers - 3)
        assume(all(abs(n * exact % 1 - 0.5) > 1e-9 for n in lengths))
    expected = [
        keep_by_the_book(pruner, layer, layers, scores, n)[0] if scores else []
        for scores, n in zip(sequences, lengths, strict=True)
    ]
    assert decide(pruner, sequences, layer=layer, layers=layers, input_lengths=lengths) == expected


@pytest.mark.parametrize(
    ("tokens", "rate", "kept"),
    [
        (1, 0.5, 1),  # 0.5 → 0, but never fewer than the first
        (3, 0.5, 2),  # 1.5 → 2
        (5, 0.5, 2),  # 2.5 → 2
        (7, 0.5, 4),  # 3.5 → 4
        (9, 0.5, 4),  # 4.5 → 4
        (10, 0.25, 2),  # 2.5 → 2
        (6, 0.25, 2),  # 1.5 → 2
        (8, 0.0, 1),
        (8, -3.0, 1),
        (8, 1.0, 8),
        (15, 0.1, 2),  # 1.5 → 2
        (35, 0.3, 10),  # 10.5 → 10
        (45, 0.1, 4),  # 4.5 → 4
    ],
)
def test_topk_rounds_half_to_even_at_the_last_layer(tokens: int, rate: float, kept: int) -> None:
    # The reference count is Python's round(n · rate), which is half to even.
    assert max(1, round(tokens * max(0.0, rate))) == kept
    scores = [[i / 64 for i in range(tokens)]]
    (decision,) = decide(tp.TopK(token_keep_rate=rate), scores, layer=12, layers=12)
    assert sum(decision) == kept


def test_topk_counts_the_first_token_and_always_keeps_it() -> None:
    scores = [[0.0, 0.3, 0.2, 0.4]]
    assert decide(tp.TopK(token_keep_rate=0.5), scores) == [[True, False, False, True]]
    assert decide(tp.TopK(token_keep_rate=0), scores) == [[True, False, False, False]]


def test_topk_keeps_the_earlier_of_equal_scores() -> None:
    assert decide(tp.TopK(token_keep_rate=0.5), [[0.5] * 6, [0.25] * 4]) == [
        [True, True, True, False, False, False],
        [True, True, False, False],
    ]


def test_topk_counts_from_the_input_and_not_from_what_entered() -> None:
    # Ten tokens at the input, six of them left: half of ten stay.
    assert [sum(d) for d in decide(tp.TopK(token_keep_rate=0.5), [[0.5] * 6], input_lengths=[10])] == [5]


def test_topk_leaves_the_first_three_layers_alone_and_then_falls_linearly() -> None:
    pruner = tp.TopK(token_keep_rate=-0.5)
    kept = [sum(decide(pruner, [[0.5] * 12], layer=layer, layers=7)[0]) for layer in range(1, 8)]
    # Rates 1, 1, 1, then 0.625, 0.25, -0.125 → 0, -0.5 → 0.
    assert kept == [12, 12, 12, 8, 3, 1, 1]
    assert kept == [topk_count(-0.5, layer, 7, 12) for layer in range(1, 8)]
    assert [pruner.prunes(layer, 7) for layer in range(1, 8)] == [False] * 3 + [True] * 4
    assert [pruner.keep_rate(layer, 7) for layer in range(1, 8)] == [1, 1, 1, 0.625, 0.25, 0, 0]
    earlier = tp.TopK(token_keep_rate=0.2, keep_all_layers=1)
    assert [earlier.keep_rate(layer, 5) for layer in range(1, 6)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert [earlier.prunes(layer, 5) for layer in range(1, 6)] == [False] + [True] * 4


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_topk_does_not_prune_a_model_of_three_layers(layers: int) -> None:
    for layer in range(1, layers + 1):
        assert not tp.TopK(token_keep_rate=0).prunes(layer, layers)
        assert decide(tp.TopK(token_keep_rate=0), [[0.5] * 4], layer=layer, layers=layers) == [[True] * 4]


# Relative thresholds


@given(SEQUENCES, st.one_of(st.sampled_from([0.25, 0.5, 1.0]), st.floats(0, 1)), st.integers(1, 4), st.booleans())
def test_relative_thresholds_compare_with_the_sequences_largest_score(
    sequences: list[list[float]], value: float, layer: int, rising: bool
) -> None:
    pruner = tp.RisingThreshold(final_token_threshold=value) if rising else tp.RelativeThreshold(token_threshold=value)
    threshold = np.float32(value * layer / 4 if rising else value)
    expected = [
        [i == 0 or score / max(scores) >= threshold for i, score in enumerate(scores)]
        for scores in as_float32(sequences)
    ]
    assert decide(pruner, sequences, layer=layer) == expected


def test_relative_threshold_by_hand() -> None:
    # The first token's score is the largest: it counts for the maximum.
    scores = [[0.8, 0.4, 0.2, 0.1], [0.1, 0.2, 0.05]]
    assert decide(tp.RelativeThreshold(token_threshold=0.5), scores) == [
        [True, True, False, False],
        [True, True, False],
    ]
    rising = tp.RisingThreshold(final_token_threshold=1)
    assert decide(rising, scores, layer=1, layers=4) == [[True, True, True, False], [True, True, True]]
    assert decide(rising, scores, layer=4, layers=4) == [[True, False, False, False], [True, True, False]]


def test_the_largest_token_stays_at_a_relative_threshold_of_one() -> None:
    assert decide(tp.RelativeThreshold(token_threshold=1), [[0.1, 0.7, 0.3]]) == [[True, True, False]]


# Configuration


@pytest.mark.parametrize(
    ("cls", "key", "value", "allowed"),
    [
        (tp.TopK, "token_keep_rate", 1.5, "<= 1"),
        (tp.TopK, "keep_all_layers", 0, ">= 1"),
        (tp.TopK, "token_keep_rate", "abc", "number"),
        (tp.TopK, "token_keep_rate", math.nan, "finite"),
        (tp.TopK, "token_keep_rate", -math.inf, "finite"),
        (tp.TopK, "token_keep_rate", True, "number"),
        (tp.TopK, "token_keep_rate", None, "number"),
        (tp.RelativeThreshold, "token_threshold", 1.5, "<= 1"),
        (tp.RelativeThreshold, "token_threshold", -0.1, ">= 0"),
        (tp.RelativeThreshold, "token_threshold", "abc", "number"),
        (tp.RelativeThreshold, "token_threshold", math.nan, "finite"),
        (tp.RelativeThreshold, "token_threshold", False, "number"),
        (tp.RisingThreshold, "final_token_threshold", 1.5, "<= 1"),
        (tp.RisingThreshold, "final_token_threshold", -1, ">= 0"),
        (tp.RisingThreshold, "final_token_threshold", [0.1], "number"),
        (tp.FixedThreshold, "final_token_threshold", -0.01, ">= 0"),
        (tp.FixedThreshold, "final_token_threshold", "abc", "number"),
        (tp.FixedThreshold, "final_token_threshold", math.nan, "finite"),
        (tp.FixedThreshold, "final_token_threshold", math.inf, "finite"),
        (tp.FixedThreshold, "final_token_threshold", True, "number"),
        (tp.FixedThreshold, "thresholds", "0.1", "list"),
        (tp.FixedThreshold, "thresholds", 0.1, "list"),
        (tp.LearnedThreshold, "final_token_threshold", -1, ">= 0"),
        (tp.LearnedThreshold, "temperature", 0, "> 0"),
        (tp.LearnedThreshold, "temperature", -1e-3, "> 0"),
        (tp.LearnedThreshold, "temperature", math.nan, "finite"),
        (tp.LearnedThreshold, "temperature", "hot", "number"),
        (tp.LearnedThreshold, "scoring_mode", "median", "mean, mean_norm"),
        (tp.TopK, "scoring_mode", None, "mean, mean_norm"),
        (tp.FixedThreshold, "max_seq_length", 0, ">= 1"),
        (tp.FixedThreshold, "max_seq_length", 12.5, "whole"),
        (tp.RelativeThreshold, "max_seq_length", True, "whole"),
        (tp.RisingThreshold, "max_seq_length", "128", "whole"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_is_allowed(cls: Any, key: str, value: Any, allowed: str) -> None:
    with pytest.raises(tp.ConfigError) as caught:
        cls(**{key: value})
    message = str(caught.value)
    assert message.startswith(f"{key} is {value!r};")
    assert allowed in message
    assert "\n" not in message


@pytest.mark.parametrize("value", [math.nan, "abc", True, None])
def test_a_wrong_threshold_in_a_list_is_named_with_its_place(value: Any) -> None:
    with pytest.raises(tp.ConfigError, match=r"^thresholds\[1\] is .*finite number"):
        tp.FixedThreshold(thresholds=[0.1, value])


@pytest.mark.parametrize("cls", [tp.FixedThreshold, tp.LearnedThreshold])
def test_a_wrong_number_of_thresholds_names_both_counts(cls: Any) -> None:
    with pytest.raises(tp.ConfigError, match="thresholds has 2 values; the model has 4 layers"):
        cls(thresholds=[0.1, 0.2]).initial_thresholds(4)


def test_limits_themselves_are_allowed() -> None:
    tp.TopK(token_keep_rate=1)
    tp.TopK(token_keep_rate=-5)
    tp.RelativeThreshold(token_threshold=0)
    tp.RelativeThreshold(token_threshold=1)
    tp.RisingThreshold(final_token_threshold=1)
    tp.FixedThreshold(final_token_threshold=0)
    tp.LearnedThreshold(temperature=1e-9)


def test_defaults() -> None:
    assert (tp.LearnedThreshold().scoring_mode, tp.LearnedThreshold().max_seq_length) == ("mean", 128)


def test_pruners_are_frozen_and_equal_by_value() -> None:
    pruner = tp.LearnedThreshold(thresholds=[0.1, 0.2])
    assert pruner == tp.LearnedThreshold(thresholds=(0.1, 0.2))
    assert pruner != tp.LearnedThreshold(thresholds=(0.1, 0.3))
    with pytest.raises(AttributeError):
        pruner.temperature = 1.0


def test_a_method_of_ones_own_needs_a_name_and_keep() -> None:
    @dataclass(frozen=True, kw_only=True)
    class KeepEverySecond(tp.Pruner):
        prune_mode = "every_second"

        def keep(self, tokens: LayerTokens) -> torch.Tensor:
            rows = torch.arange(tokens.layout.total)
            return (rows - tokens.layout.cu_seqlens.long()[tokens.layout.sequence_ids]) % 2 == 0

    assert decide(KeepEverySecond(), [[0.1] * 3, [0.1] * 2]) == [[True, False, True], [True, False]]
    with pytest.raises(TypeError):
        tp.Pruner()


# How a method is shown


@dataclass(frozen=True, kw_only=True)
class _Shown(tp.Pruner, registered=False):
    prune_mode = "shown"

    needed: int
    many: list[int] = field(default_factory=list)
    hidden: int = field(default=0, repr=False)

    def keep(self, tokens: LayerTokens) -> torch.Tensor:
        return tokens.scores > 0


def test_only_what_differs_from_the_defaults_is_shown() -> None:
    assert repr(tp.TopK()) == "TopK()"
    gate = tp.VocabularyGate(torch.zeros(3), 0.5)
    method = tp.FixedThreshold(thresholds=[0, 1], protect=["separators"], vocabulary=gate)
    assert repr(method) == f"FixedThreshold(protect=('separators',), vocabulary={gate!r}, thresholds=(0.0, 1.0))"
    assert repr(tp.LearnedThreshold(temperature=0.5)) == "LearnedThreshold(temperature=0.5)"


def test_a_method_of_ones_own_is_shown_alike_unless_it_says_otherwise() -> None:
    assert repr(_Shown(needed=3, hidden=1)) == "_Shown(needed=3)"
    assert repr(_Shown(needed=3, many=[1], max_tokens=64)) == "_Shown(max_tokens=64, needed=3, many=[1])"

    @dataclass(frozen=True, kw_only=True)
    class Named(_Shown, registered=False):
        def __repr__(self) -> str:
            return "mine"

    assert repr(Named(needed=3)) == "mine"
