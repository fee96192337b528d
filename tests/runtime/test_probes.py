"""Probes: decisions by states after a layer's attention block, in every stage."""

from typing import Any

import pytest
import torch
from torch import Tensor

import token_pruning as tp
from tests.families.shared import kept_model, without_dropout
from tests.tiny import EVERY_FAMILY, assert_close, pruned, ragged_batch, tiny_model

HIDDEN, LAYERS = 32, 4
BATCH = ragged_batch([20, 1, 13, 2])
VALID = BATCH["attention_mask"].bool()


def probes(*layers: int, bias: float = 0.0) -> tp.Probes:
    weights = torch.randn(len(layers), HIDDEN + 1, generator=torch.Generator().manual_seed(3)) / HIDDEN**0.5
    weights[:, -1] = bias
    return tp.Probes(layers, weights)


@pytest.mark.parametrize("execution", ["packed", "masked"])
@torch.no_grad()
def test_the_state_is_that_after_the_attention_block(execution: Any) -> None:
    """BERT's own module says what it is."""
    model, found = tiny_model("bert", "encoder"), probes(1)
    seen: list[Tensor] = []
    norm = model.encoder.layer[0].attention.output.LayerNorm
    hook = norm.register_forward_hook(lambda module, args, output: seen.append(output))
    model(**BATCH)
    hook.remove()
    expected = seen[0][VALID] @ found.weights[0, :-1] + found.weights[0, -1]
    threshold = float(expected.median()) + 1e-3
    pruner = tp.FixedThreshold(thresholds=[threshold, 0, 0, 0], probes=found, max_seq_length=3, scoring_mode="mean")
    with pruned(model, pruner, execution), tp.record(model) as trace:
        model(**BATCH)
    record = trace.passes[0].layers[1]
    assert record.scores is not None
    assert_close(record.scores, expected, 1e-5)  # whatever the scoring mode
    stays = expected >= threshold
    stays[trace.passes[0].valid.first_rows] = True
    assert record.leaving.indices.tolist() == record.entering.indices[stays].tolist()


@torch.no_grad()
def test_topk_by_probe() -> None:
    model = kept_model("bert", "encoder")
    with pruned(model, tp.TopK(token_keep_rate=0.4, keep_all_layers=3, probes=probes(4))), tp.record(model) as trace:
        model(**BATCH)
    record = trace.passes[0].layers[4]
    assert record.scores is not None and (record.scores < 0).any()
    kept = record.leaving.indices % record.leaving.width
    for sequence, (length, scores) in enumerate(zip([20, 1, 13, 2], record.scores.split([20, 1, 13, 2]), strict=True)):
        rank = sorted(range(1, length), key=lambda i: -scores[i])
        chosen = sorted([0, *rank[: max(1, round(0.4 * length)) - 1]])
        assert kept[record.leaving.sequence_ids == sequence].tolist() == chosen


@torch.no_grad()
def test_a_threshold_of_zero_may_drop_by_a_probe_and_does_not_by_attention() -> None:
    model = kept_model("bert", "encoder")
    pruner = tp.FixedThreshold(thresholds=[0.0] * LAYERS, probes=probes(2))
    with pruned(model, pruner):
        assert model.token_pruner.dropping_layers() == [False, True, False, False]
        packed = model(**BATCH).last_hidden_state
    with pruned(model, pruner, "masked"), tp.record(model) as trace:
        masked = model(**BATCH).last_hidden_state
    assert trace.ffn_lengths[1].sum() < trace.ffn_lengths[0].sum() == 36
    assert trace.ffn_lengths[3].tolist() == trace.ffn_lengths[1].tolist()
    assert_close(packed[VALID], masked[VALID], 1e-5)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_soft_masks_by_probe_train_thresholds_and_weights(family: str) -> None:
    gradients = []
    pruner = tp.LearnedThreshold(
        thresholds=[0.1] * LAYERS, temperature=0.5, probes=probes(1, 3), protect=["separators"]
    )
    for execution in ("packed", "masked"):
        model = tiny_model(family, "encoder", **without_dropout(family))
        tp.prune(model, pruner, execution=execution, reads="mean").train()
        batch = ragged_batch([20, 1, 13, 2], family=family)
        with tp.record(model) as trace:
            states = model(**batch).last_hidden_state[VALID]
        (states.square().mean() + trace.soft_rates.sum()).backward()
        assert model.token_pruner.thresholds.grad.all()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[1].items():
        assert_close(gradients[0][name], gradient, 1e-4 * max(1.0, gradient.abs().max().item()), name)


@pytest.mark.parametrize("learned", [False, True])
def test_gradient_checkpointing_changes_nothing(learned: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("bert", "encoder", **without_dropout("bert"))
        cls: Any = tp.LearnedThreshold if learned else tp.FixedThreshold
        maps = tp.DepartureMaps(range(5), torch.randn(5, 32, 33, generator=torch.Generator().manual_seed(0)) / 6)
        pruner = cls(
            thresholds=[0.1] * LAYERS, probes=probes(1, 3), departed="map", maps=maps, received_from="first_segment"
        )
        tp.prune(model, pruner, reads="mean").train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)  # transformers' new name for it
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model(**BATCH).last_hidden_state[VALID].square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, 1e-6 * max(1.0, gradient.abs().max().item()), name)


@torch.no_grad()
def test_scores_are_float32_under_autocast() -> None:
    model = kept_model("bert", "encoder")
    pruner = tp.FixedThreshold(thresholds=[0.1] * LAYERS, probes=probes(1))
    with pruned(model, pruner), tp.record(model) as trace, torch.autocast("cpu", torch.bfloat16):
        model(**BATCH)
    scores = trace.passes[0].layers[1].scores
    assert scores is not None and scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_narrow_model_decides_as_its_masked_reference(dtype: torch.dtype) -> None:
    model = tiny_model("bert", "encoder").to(dtype)
    pruner = tp.FixedThreshold(thresholds=[0.1] * LAYERS, probes=probes(1, 2, 3, 4))
    traces = []
    for execution in ("packed", "masked"):
        with pruned(model, pruner, execution), tp.record(model) as trace:
            assert model(**BATCH).last_hidden_state.dtype == dtype
        traces.append(trace)
    assert abs(int(traces[0].ffn_lengths.sum() - traces[1].ffn_lengths.sum())) <= 2


def test_no_summaries_beside_probes() -> None:
    with pytest.raises(tp.ConfigError, match="summary_tokens is 'shared'; with probes it must be none"):
        tp.FixedThreshold(probes=probes(1), summary_tokens="shared")


@pytest.mark.parametrize("layers", [[0], [2, 1], [1, 1], [], "1", [1.0], [True], None, 3])
def test_layers_that_do_not_rise(layers: Any) -> None:
    with pytest.raises(tp.ConfigError, match="probe_layers") as caught:
        tp.Probes(layers, torch.zeros(1, 33))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "weights", [torch.zeros(1, 33), torch.zeros(2, 33, dtype=torch.int64), torch.zeros(33), [[0.0]], None]
)
def test_weights_of_another_shape(weights: Any) -> None:
    wanted = r"they must be floating-point numbers of shape \[{}, hidden \+ 1\]"
    with pytest.raises(tp.ConfigError, match="probe weights are .*" + wanted.format("2")):
        tp.Probes([1, 2], weights)
    with pytest.raises(tp.ConfigError, match="map weights are .*" + wanted.format("2, hidden")):
        tp.DepartureMaps([1, 2], weights)
    with pytest.raises(tp.ConfigError, match="correction weights are .*" + wanted.format("hidden")):
        tp.Correction(weights)
