"""The soft stage: what is multiplied, what is summed, and the gradients, against float64 and finite differences."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import token_pruning as tp
from tests.tiny import BertByTheBook, assert_close, pruned, ragged_batch, tiny_model
from token_pruning.pruners import LayerTokens
from token_pruning.ragged import PackedTokens, layout_from_mask
from token_pruning.runtime.decisions import Decisions
from token_pruning.runtime.token_pruner import TokenPruner

LAYERS = 4
NO_DROPOUT: dict[str, dict[str, Any]] = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "distilbert": {"dropout": 0.0, "attention_dropout": 0.0},
}
LENGTHS = [13, 1, 22, 2]
BATCH = ragged_batch(LENGTHS)
VALID = BATCH["attention_mask"].bool()


def smooth(mode: Any = "mean", **settings: Any) -> tp.LearnedThreshold:
    """A temperature so large that the mask is far from a step."""
    values = {"thresholds": [0.05, 0.06, 0.07, 0.08], "temperature": 0.05, "max_seq_length": 16}
    return tp.LearnedThreshold(scoring_mode=mode, **{**values, **settings})


def soft_model(family: str, pruner: tp.LearnedThreshold, execution: Any = "packed", head: str = "token") -> Any:
    model = tiny_model(family, head, **NO_DROPOUT[family])
    return tp.prune(model, pruner, execution=execution).train()


def loss_of(model: Any) -> Tensor:
    """Some smooth function of every valid token's output and of the regulariser."""
    with tp.record(model) as trace:
        logits = model(**BATCH).logits[VALID]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    return (logits * weights).mean() + 0.3 * trace.soft_rates.sum(0).mean()


# The mask itself


def tokens_of(scores: Tensor, lengths: list[int], threshold: Tensor) -> LayerTokens:
    layout = layout_from_mask(torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None])
    return LayerTokens(1, 1, layout, scores, torch.tensor(lengths), threshold)


def test_the_mask_is_a_sigmoid_of_the_distance_to_the_threshold_and_one_for_first_tokens() -> None:
    pruner = tp.LearnedThreshold(temperature=0.1)
    scores = torch.tensor([0.3, 0.2, 0.25, 0.15, 0.35])
    mask = pruner.soft_mask(tokens_of(scores, [3, 2], torch.tensor(0.2)))
    expected = [1.0, 0.5, 1 / (1 + math.exp(-0.5)), 1.0, 1 / (1 + math.exp(-1.5))]
    assert mask.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_masks_gradients_equal_finite_differences_in_float64() -> None:
    pruner = tp.LearnedThreshold(temperature=0.07)
    scores = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    threshold = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s, t: pruner.soft_mask(tokens_of(s, [4, 0, 1, 4], t)), (scores, threshold), atol=1e-8
    )


def test_at_a_small_temperature_the_mask_is_the_hard_decision() -> None:
    pruner = tp.LearnedThreshold(temperature=1e-6)
    scores = torch.tensor([0.0, 0.1, 0.3, 0.19999, 0.20001])
    tokens = tokens_of(scores, [5], torch.tensor(0.2))
    assert pruner.soft_mask(tokens).round().tolist() == [1, 0, 1, 0, 1]
    assert pruner.keep(tokens).tolist()[1:] == [False, True, False, True]


# The regulariser's terms


@pytest.mark.parametrize(
    ("mode", "lengths", "rates"),
    [
        # Received attention 1.2, 0.8, 1.0 and 0.6, 1.4; threshold 0.2, temperature 0.1.
        # "mean", N = 4: scores 0.3, 0.2, 0.25 and 0.15, 0.35; masks 1, σ(0), σ(0.5) and 1, σ(1.5).
        ("mean", [1 + 0.5 + 0.6224593, 1 + 0.8175745], [2.1224593 / 4, 1.8175745 / 4]),
        # "mean_norm", N = 3 and 2: scores 0.4, 0.26667, 0.33333 and 0.3, 0.7; masks 1, σ(2/3), σ(4/3) and 1, σ(5).
        ("mean_norm", [1 + 0.6607564 + 0.7913915, 1 + 0.9933071], [2.4521479 / 3, 1.9933071 / 2]),
    ],
)
def test_soft_lengths_and_rates_by_hand(mode: Any, lengths: list[float], rates: list[float]) -> None:
    pruner = tp.LearnedThreshold(thresholds=[0.2], temperature=0.1, scoring_mode=mode, max_seq_length=4)
    layout = layout_from_mask(torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool())
    tokens = PackedTokens(torch.zeros(5, dtype=torch.long), torch.zeros(5, dtype=torch.long), None, layout)
    state = Decisions(TokenPruner(pruner, 1, torch.device("cpu")).train(), tokens, reads="all")
    state.decide(1, torch.tensor([1.2, 0.8, 1.0, 0.6, 1.4]))
    trace = tp.Trace(4, [state.record])
    assert trace.soft_lengths.shape == trace.soft_rates.shape == (1, 2)
    assert trace.soft_lengths[0].tolist() == pytest.approx(lengths, abs=1e-6)
    assert trace.soft_rates[0].tolist() == pytest.approx(rates, abs=1e-6)
    assert trace.ffn_lengths.tolist() == [[3, 2]]


@pytest.mark.parametrize("mode", ["mean", "mean_norm"])
def test_rates_are_lengths_over_n(mode: str) -> None:
    with tp.record(model := soft_model("bert", smooth(mode))) as trace:
        model(**BATCH)
    divisors = torch.tensor([16.0] * 4 if mode == "mean" else [float(n) for n in LENGTHS])
    assert_close(trace.soft_rates, trace.soft_lengths / divisors, 1e-6)
    assert (trace.soft_lengths <= torch.tensor(LENGTHS) + 1e-4).all()
    assert (trace.soft_lengths >= 1).all()


# The whole model


@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize("mode", ["mean", "mean_norm"])
def test_outputs_rates_and_gradients_equal_a_second_writing_in_float64(mode: str, execution: str) -> None:
    pruner = smooth(mode)
    model = soft_model("bert", pruner, execution, head="encoder")
    weights = torch.randn(*VALID.shape, 32, generator=torch.Generator().manual_seed(0)) * VALID[..., None]
    with tp.record(model) as trace:
        states = model(**BATCH).last_hidden_state
    ((states * weights).sum() + 3 * trace.soft_rates.sum()).backward()

    book = BertByTheBook(model, pruner, soft=True)
    expected_loss = torch.zeros((), dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        expected, _, masks = book.sequence(BATCH["input_ids"][row, :length].tolist())
        sums = torch.stack([mask.sum() for mask in masks])
        assert_close(states[row, :length], expected, message=f"sequence {row}")
        assert_close(trace.soft_lengths[:, row], sums)
        divisor = 16 if mode == "mean" else length
        expected_loss = expected_loss + (expected * weights[row, :length]).sum() + 3 * (sums / divisor).sum()
    expected_loss.backward()

    assert book.thresholds is not None and book.thresholds.grad is not None
    threshold_gradient = model.token_pruner.thresholds.grad
    assert threshold_gradient.abs().min() > 1e-3
    scale = threshold_gradient.abs().max().item()
    assert_close(threshold_gradient, book.thresholds.grad, 1e-4 * scale)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name != "token_pruner.thresholds":
            reference = book.weights[name].grad
            assert reference is not None
            assert_close(parameter.grad, reference, 1e-4 * max(1.0, reference.abs().max().item()), name)


@pytest.mark.parametrize("mode", ["mean", "mean_norm"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_threshold_gradients_equal_central_finite_differences(family: str, mode: str) -> None:
    model = soft_model(family, smooth(mode))
    thresholds = model.token_pruner.thresholds
    loss_of(model).backward()
    gradient, step = thresholds.grad.clone(), 2e-3
    measured = torch.zeros(LAYERS)
    with torch.no_grad():
        for layer in range(LAYERS):
            ends = []
            for sign in (1, -1):
                thresholds[layer] += sign * step
                ends.append(loss_of(model).double())
                thresholds[layer] -= sign * step
            measured[layer] = (ends[0] - ends[1]) / (2 * step)
    assert gradient.abs().min() > 1e-2
    assert_close(gradient, measured, 0.02 * gradient.abs().max().item())


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_the_regulariser_reaches_the_weights_through_the_scores(family: str) -> None:
    model = soft_model(family, smooth())
    with tp.record(model) as trace:
        model(**BATCH)
    trace.soft_rates[0].sum().backward()  # the first layer's only
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    first = "transformer.layer.0" if family == "distilbert" else "encoder.layer.0"
    layer = {name: gradient for name, gradient in gradients.items() if "layer." in name}
    # Queries and keys of the first layer make its scores; values and later layers have no part in them.
    projections = ("q_lin", "k_lin") if family == "distilbert" else ("query", "key")
    touched = {name for name, gradient in layer.items() if gradient.abs().max() > 1e-6}
    # A bias of the keys moves all logits of a query alike.
    assert touched == {
        name
        for name in dict(model.named_parameters())
        if first in name and any(p in name for p in projections) and not name.endswith(f"{projections[1]}.bias")
    }
    assert gradients[next(name for name in gradients if "word_embeddings" in name)].any()
    assert gradients["token_pruner.thresholds"][0] < -1e-3  # a higher threshold keeps less
    assert not gradients["token_pruner.thresholds"][1:].any()


@pytest.mark.parametrize("mode", ["mean", "mean_norm"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_packed_soft_equals_masked_soft(family: str, mode: str) -> None:
    results = []
    for execution in ("packed", "masked"):
        model = soft_model(family, smooth(mode), execution)
        with tp.record(model) as trace:
            logits = model(**BATCH).logits
        loss_of(model).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((logits, trace, gradients))
    (packed, packed_trace, packed_gradients), (masked, masked_trace, masked_gradients) = results
    assert_close(packed, masked)
    assert_close(packed_trace.soft_lengths, masked_trace.soft_lengths)
    assert packed_gradients.keys() == masked_gradients.keys()
    for name, gradient in packed_gradients.items():
        reference = masked_gradients[name]
        assert_close(gradient, reference, 1e-4 * max(1.0, reference.abs().max().item()), name)


# What train() and eval() mean


@pytest.mark.parametrize("execution", ["packed", "masked"])
def test_train_masks_softly_and_removes_nothing_and_eval_removes(execution: str) -> None:
    model = soft_model("bert", smooth(temperature=1e-3), execution)
    with tp.record(model) as soft:
        model(**BATCH)
    assert soft.ffn_lengths.tolist() == [LENGTHS] * LAYERS
    assert all((survived == LAYERS).all() for survived in soft.survived_layers)
    assert (soft.soft_lengths[-1] < torch.tensor(LENGTHS) - 0.5).any()

    model.eval()
    with torch.no_grad(), tp.record(model) as hard:
        logits = model(**BATCH).logits
    assert (hard.ffn_lengths[-1] < hard.attention_lengths[0]).any()
    for name in ("soft_lengths", "soft_rates"):
        with pytest.raises(RuntimeError, match=r"LearnedThreshold and train\(\)"):
            getattr(hard, name)

    twin = tiny_model("bert", "token")
    with pruned(twin, tp.FixedThreshold(thresholds=[0.05, 0.06, 0.07, 0.08], max_seq_length=16)), torch.no_grad():
        assert_close(logits, twin(**BATCH).logits, 1e-5)  # eval() is the fixed thresholds' decision

    model.train()
    with tp.record(model) as again:
        model(**BATCH)
    assert again.ffn_lengths.tolist() == [LENGTHS] * LAYERS


def test_a_model_pruned_in_training_mode_starts_softly() -> None:
    model = tiny_model("bert", "token").train()
    with tp.record(tp.prune(model, smooth())) as trace:
        model(**BATCH)
    assert trace.soft_lengths.shape == (LAYERS, 4)


def test_fixed_thresholds_remove_in_training_too() -> None:
    model = tp.prune(tiny_model("bert", "token"), tp.FixedThreshold(thresholds=[9] * LAYERS)).train()
    with tp.record(model) as trace:
        model(**BATCH)
    assert trace.ffn_lengths.tolist() == [[1] * 4] * LAYERS
    with pytest.raises(RuntimeError, match="soft stage"):
        _ = trace.soft_rates


def test_a_mask_of_ones_is_the_unpruned_model_and_of_nearly_zero_leaves_the_first_token() -> None:
    dense = tiny_model("bert", "token", **NO_DROPOUT["bert"]).train()
    with torch.no_grad():
        expected = dense(**BATCH).logits[VALID]
    all_ones = soft_model("bert", smooth(thresholds=[-50.0] * LAYERS))
    with torch.no_grad():
        assert_close(all_ones(**BATCH).logits[VALID], expected, 1e-5)

    model = soft_model("bert", smooth(thresholds=[50.0] * LAYERS), head="encoder")
    with torch.no_grad(), tp.record(model) as trace:
        states = model(**BATCH).last_hidden_state
    assert_close(trace.soft_lengths, torch.ones(LAYERS, 4), 1e-6)
    assert states[:, 0].abs().amax(-1).min() > 0.1
    assert not states[:, 1:].abs().gt(1e-6).any()


def test_soft_batches_of_several_passes_follow_one_another() -> None:
    model = soft_model("bert", smooth())
    with tp.record(model) as trace:
        model(**BATCH)
        model(**ragged_batch([5]))
    assert trace.soft_rates.shape == (LAYERS, 5)
    assert trace.soft_rates.requires_grad
