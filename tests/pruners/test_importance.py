"""Scores from attention probabilities, held against loops in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import assert_close, assert_equal
from token_pruning.errors import ConfigError
from token_pruning.pruners.importance import SCORING_MODES, convert_scores, normalizer
from token_pruning.ragged.layout import layout_from_mask
from token_pruning.ragged.received import received_attention


def random_probabilities(batch: int, heads: int, width: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax of wide logits over the keys of the mask."""
    logits = 4 * torch.randn(batch, heads, width, width)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, :], torch.finfo(torch.float32).min)
    return logits.softmax(-1)


def received_by_loops(probabilities: torch.Tensor, queries: torch.Tensor | None) -> torch.Tensor:
    values = probabilities.double()
    batch, heads, rows, keys = values.shape
    result = torch.zeros(batch, keys, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for j in range(rows):
                if queries is None or queries[b, j]:
                    result[b] += values[b, h, j] / heads
    return result


@pytest.mark.parametrize("masked", [False, True])
def test_received_attention_equals_the_sum_written_as_loops(masked: bool) -> None:
    torch.manual_seed(0)
    mask = torch.rand(3, 9) < 0.7
    probabilities = random_probabilities(3, 4, 9, mask)
    queries = mask if masked else None
    received = received_attention(probabilities, queries)
    assert received.shape == (3, 9)
    assert received.dtype == torch.float32
    assert_close(received, received_by_loops(probabilities, queries), 1e-6)


def test_a_small_example_by_hand() -> None:
    # One head, three tokens, the last one padding: its row does not count.
    probabilities = torch.tensor([[[[0.75, 0.25, 0.0], [0.5, 0.5, 0.0], [0.1, 0.9, 0.0]]]])
    received = received_attention(probabilities, torch.tensor([[True, True, False]]))
    assert received.tolist() == [[1.25, 0.75, 0.0]]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.sampled_from(SCORING_MODES))
def test_mean_score_is_one_over_n(lengths: list[int], mode: str) -> None:
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    received = received_attention(random_probabilities(len(lengths), 3, max(lengths), mask), mask)
    divisors = normalizer(layout_from_mask(mask), mode, max_seq_length=37)
    for row, length in enumerate(lengths):
        mean = (received[row, :length] / divisors[row]).mean().item()
        assert mean == pytest.approx(1 / {"mean": 37, "mean_norm": length, "relative": 1}[mode], rel=1e-5)


def test_normalizer_counts_the_tokens_that_entered_or_the_configured_length() -> None:
    layout = layout_from_mask(torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).bool())
    assert normalizer(layout, "mean", 64).tolist() == [64.0, 64.0, 64.0]
    assert normalizer(layout, "mean_norm", 64).tolist() == [3.0, 0.0, 1.0]
    assert normalizer(layout, "relative", 64).tolist() == [1.0, 1.0, 1.0]
    for mode in SCORING_MODES:
        assert normalizer(layout, mode, 64).dtype == torch.float32


@pytest.mark.parametrize("source", SCORING_MODES)
@pytest.mark.parametrize("target", SCORING_MODES)
def test_conversions_agree_with_scores_computed_anew(source: str, target: str) -> None:
    layout = layout_from_mask(torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool())
    received = torch.rand(layout.total) + 0.1
    here, there = (received / normalizer(layout, mode, 64)[layout.sequence_ids] for mode in (source, target))
    present = layout.lengths_tensor[layout.sequence_ids]
    assert torch.allclose(convert_scores(here, source, target, max_seq_length=64, tokens=present), there)
    back = convert_scores(there, target, source, max_seq_length=64, tokens=present)
    assert torch.allclose(back, here)
    assert convert_scores(0.01, source, target, tokens=10) == pytest.approx(
        0.01 * {"mean": 128, "mean_norm": 10, "relative": 1}[source]
        / {"mean": 128, "mean_norm": 10, "relative": 1}[target]
    )  # fmt: skip


def test_conversions_need_to_know_the_modes_and_the_tokens() -> None:
    assert convert_scores(0.01, "mean", "relative") == 1.28  # the usual final threshold
    assert convert_scores(0.5, "mean_norm", "mean_norm") == 0.5
    for source, target in (("mean_norm", "relative"), ("mean", "mean_norm")):
        with pytest.raises(ConfigError, match="tokens is missing"):
            convert_scores(0.01, source, target)
    with pytest.raises(ConfigError, match="target is 'max'; it must be one of mean, mean_norm, relative"):
        convert_scores(0.01, "mean", "max")  # type: ignore[arg-type]


def test_relative_thresholds_survive_a_change_of_length() -> None:
    """Uniform attention: the same decision at any length, which in the other modes it is not."""
    for length in (5, 50, 500):
        received = received_attention(torch.full((1, 2, length, length), 1 / length))[0]
        assert torch.allclose(received, torch.ones(length), atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_autocast_does_not_lower_the_precision(masked: bool) -> None:
    torch.manual_seed(0)
    probabilities = random_probabilities(2, 4, 33)
    queries = torch.rand(2, 33) < 0.8 if masked else None
    expected = received_attention(probabilities, queries)
    with torch.autocast("cpu", torch.bfloat16):
        received = received_attention(probabilities, queries)
    assert received.dtype == torch.float32
    assert_equal(received, expected)


def test_half_precision_probabilities_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    probabilities = random_probabilities(1, 4, 200).bfloat16()
    assert_close(received_attention(probabilities), received_by_loops(probabilities, None), 1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_flow_to_the_queries_that_count_and_no_others(masked: bool) -> None:
    probabilities = random_probabilities(2, 4, 5).requires_grad_()
    queries = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]).bool() if masked else None
    weights = torch.randn(2, 5)
    (received_attention(probabilities, queries) * weights).sum().backward()
    counted = torch.ones(2, 5) if queries is None else queries.float()
    expected = (counted[:, None, :, None] * weights[:, None, None, :] / 4).expand(2, 4, 5, 5)
    assert probabilities.grad is not None
    assert_close(probabilities.grad, expected, 1e-6)
