"""Summary tokens: where they are, what they are made of, and that nothing else is changed by them."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import token_pruning as tp
from tests.runtime.test_robustness import checkpoint
from tests.tiny import (
    FAMILIES,
    VOCABULARY,
    assert_close,
    assert_equal,
    outputs,
    pruned,
    ragged_batch,
    shared_model,
    tiny_model,
)
from token_pruning.pruners.summary import Summaries, plan_merge

MODES = ("shared", "segment")
SOME = {"scoring_mode": "relative", "thresholds": [0.9, 1.0, 1.0, 1.0]}


def by_hand(groups: list[int], dropped: list[bool], there: dict[int, float], received: list[float]) -> Any:
    """Row by row: each group's host, its members' shares, and the weight gathered."""
    found: dict[int, tuple[int, dict[int, float], float]] = {}
    for group in sorted(set(groups)):
        rows = [i for i, g in enumerate(groups) if g == group]
        members = {i: there.get(i, received[i]) for i in rows if dropped[i] or i in there}
        if members:
            host = next((i for i in members if i in there), min(members))
            total = sum(members.values())
            found[group] = (host, {i: weight / total for i, weight in members.items()}, total)
    return found


@given(data=st.data())
def test_merges_equal_a_plain_loop(data: Any) -> None:
    groups = sorted(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=20)))
    rows = range(len(groups))
    received = data.draw(st.lists(st.floats(0.01, 5), min_size=len(groups), max_size=len(groups)))
    there = {groups.index(g): data.draw(st.floats(0.1, 9)) for g in sorted(set(groups)) if data.draw(st.booleans())}
    dropped = [i not in there and data.draw(st.booleans()) for i in rows]
    if not any(dropped) and not there:
        return
    present = torch.tensor([i in there for i in rows])
    summaries = Summaries(present, torch.tensor([there.get(i, 0.0) for i in rows])) if there else None
    merge, after = plan_merge(torch.tensor(groups), torch.tensor(dropped), summaries, torch.tensor(received))
    states = torch.randn(len(groups), 3, generator=torch.Generator().manual_seed(0))
    merged = merge.apply(states)
    expected = by_hand(groups, dropped, there, received)
    hosts = {host for host, _, _ in expected.values()}
    assert {i for i in rows if after.present[i]} == hosts
    for host, shares, total in expected.values():
        assert after.weights[host].item() == pytest.approx(total, rel=1e-4)
        assert_close(merged[host], sum(share * states[i] for i, share in shares.items()), 1e-4)
    for i in set(rows) - hosts:
        assert torch.equal(merged[i], states[i])


def test_the_gradient_goes_through_states_and_importance() -> None:
    received = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    states = torch.tensor([[1.0], [5.0], [2.0]], requires_grad=True)
    merge, _ = plan_merge(torch.zeros(3, dtype=torch.long), torch.tensor([False, True, True]), None, received)
    merge.apply(states)[1].backward()
    assert_close(states.grad[:, 0], torch.tensor([0.0, 0.4, 0.6]))
    mean = (2 * 5 + 3 * 2) / 5
    assert_close(received.grad, torch.tensor([0.0, (5 - mean) / 5, (2 - mean) / 5]))


def test_tokens_that_receive_nothing_are_averaged_plainly() -> None:
    merge, _ = plan_merge(torch.zeros(2, dtype=torch.long), torch.tensor([True, True]), None, torch.zeros(2))
    assert merge.apply(torch.tensor([[1.0], [3.0]]))[0].item() == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_dropped_is_the_dense_model(family: str, mode: Any) -> None:
    model, batch = shared_model(family, "sequence"), ragged_batch([30, 1, 17], family=family)
    with torch.no_grad():
        expected = model(**batch).logits
        with pruned(model, tp.FixedThreshold(thresholds=[0.0] * 4, summary_tokens=mode)), tp.record(model) as trace:
            assert_close(model(**batch).logits, expected, 1e-5)
    assert not trace.summary_lengths.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head", ["sequence", "token", "encoder"])
def test_a_sequence_does_not_depend_on_its_batch(head: str, mode: Any) -> None:
    model, batch = shared_model("bert", head), ragged_batch([30, 12, 1, 17])
    with torch.no_grad(), pruned(model, tp.FixedThreshold(**SOME, summary_tokens=mode)):
        together = outputs(model(**batch))
        for row, length in enumerate((30, 12, 1, 17)):
            alone = outputs(model(**{name: value[row : row + 1, :length] for name, value in batch.items()}))
            for name, value in alone.items():
                whole = together[name][row : row + 1]
                assert_close(value, whole[:, :length] if whole.dim() == 3 else whole, 1e-5, name)


@pytest.mark.parametrize("mode", MODES)
def test_the_trace_tells_tokens_from_summaries(mode: Any) -> None:
    model, batch = shared_model("bert", "token"), ragged_batch([30, 12, 1])
    batch["input_ids"][:, 7] = batch["input_ids"][:, 29]  # a separator in the middle of the first two
    batch["input_ids"][1, 11] = batch["input_ids"][1, 7]
    with torch.no_grad(), pruned(model, tp.FixedThreshold(**SOME, summary_tokens=mode)), tp.record(model) as trace:
        model(**batch)
    most = {"shared": 1, "segment": 2}[mode]
    assert trace.summary_lengths[:, 0].tolist() == [most] * 4
    assert trace.summary_lengths[:, 2].tolist() == [0] * 4  # a sequence of one token never drops it
    survived = trace.survived_layers
    for layer in range(4):
        tokens = trace.ffn_lengths[layer] - trace.summary_lengths[layer]
        assert tokens.tolist() == [int((layers > layer).sum()) for layers in survived]
    assert torch.equal(trace.attention_lengths[1:], trace.ffn_lengths[:-1])


def test_a_dropped_token_keeps_a_last_state_of_its_own() -> None:
    """The state it left with, and not the summary's that its row carried on."""
    model, batch = shared_model("bert", "encoder"), ragged_batch([20])
    pruner = tp.FixedThreshold(scoring_mode="relative", thresholds=[1.0, 0.0, 0.0, 0.0], summary_tokens="shared")
    with torch.no_grad():
        with pruned(model, pruner), tp.record(model) as trace:
            states = model(**batch).last_hidden_state[0]
        with pruned(model, tp.FixedThreshold(scoring_mode="relative", thresholds=[1.0, 0.0, 0.0, 0.0])):
            without = model(**batch).last_hidden_state[0]
    gone = trace.survived_layers[0] == 0
    assert 1 < int(gone.sum()) < 19
    assert_close(states[gone], without[gone], 1e-6)
    assert (states[~gone] - without[~gone]).abs().max() > 1e-3


@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_the_masked_reference(execution: Any, checkpointing: bool) -> None:
    def gradients(how: Any, again: bool) -> dict[str, Tensor]:
        model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        tp.prune(model, tp.FixedThreshold(**SOME, summary_tokens="segment"), execution=how).train()
        if again:
            checkpoint(model, reentrant=False)
        model(**ragged_batch([30, 12, 1, 17]), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients("masked", False)
    found = gradients(execution, checkpointing)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert_close(gradient, expected[name], 1e-5, name)


def test_it_is_saved_and_loaded(tmp_path: Any) -> None:
    model, batch = tiny_model(), ragged_batch([30, 12])
    tp.prune(model, tp.FixedThreshold(**SOME, summary_tokens="segment"))
    model.save_pretrained(tmp_path)
    again = tp.from_pretrained(tmp_path)
    assert again.token_pruner.pruner == model.token_pruner.pruner
    with torch.no_grad():
        assert_equal(again(**batch).logits, model(**batch).logits)
    plain = tp.prune(tiny_model(), tp.FixedThreshold())
    assert not hasattr(plain.config, "summary_tokens")


def test_a_wrong_value_is_named() -> None:
    with pytest.raises(tp.ConfigError, match="summary_tokens is 'two'; it must be one of none, shared, segment"):
        tp.FixedThreshold(summary_tokens="two")  # type: ignore[arg-type]


def test_soft_stage_has_none() -> None:
    model = tp.prune(tiny_model(), tp.LearnedThreshold(summary_tokens="segment")).train()
    with tp.record(model) as trace:
        model(**ragged_batch([30, 12]))
    assert not trace.summary_lengths.any()
    assert trace.soft_survival.shape == (4, 2)


@torch.no_grad()
def test_segments_are_those_of_the_text_where_the_vocabulary_threshold_drops_their_end() -> None:
    """The separator itself may never enter: model, reference and engine take the same tokens for the second segment."""
    batch = ragged_batch([14, 9, 5])
    for row, length in enumerate([14, 9, 5]):
        batch["input_ids"][row, [length // 2, length - 1]] = 7  # the separator, and what its entry scores
    scores = torch.ones(VOCABULARY)
    scores[7] = 0
    pruner = tp.FixedThreshold(
        final_token_threshold=1.1, scoring_mode="relative", summary_tokens="segment",
        vocabulary=tp.VocabularyGate(scores, 0.5),
    )  # fmt: skip
    model = tiny_model(head="token")
    found = []
    for execution in ("masked", "packed"):
        with pruned(model, pruner, execution), tp.record(model) as trace:
            found.append(model(**batch).logits)
            engine = tp.compile(model, "float32")
    valid = batch["attention_mask"].bool()
    assert trace.summary_lengths.max() == 2
    assert_close(found[1][valid], found[0][valid], 1e-4)
    assert_close(engine(**batch).logits[valid], found[0][valid], 1e-4)
