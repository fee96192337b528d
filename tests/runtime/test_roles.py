"""Who is protected, whose attention counts, and that no method lets a protected token go."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import token_pruning as tp
from tests.families.shared import kept_model
from tests.runtime.by_hand import asking_by_hand, protected_by_hand
from tests.tiny import assert_close, pruned, ragged_batch, tiny_model
from token_pruning.ragged import PackedTokens, layout_from_mask
from token_pruning.runtime.decisions import Decisions
from token_pruning.runtime.roles import asking, first_segment, protected
from token_pruning.runtime.token_pruner import TokenPruner

HIDDEN, LAYERS = 32, 4
# Separators are 2 and 3, so that a text may end with either; many texts are pairs.
TEXTS = st.lists(st.lists(st.sampled_from([2, 3, 7, 8, 9]), max_size=9), min_size=1, max_size=5)
ROLES: Any = st.sets(st.sampled_from(["separators", "first_segment"]))
GATE = tp.VocabularyGate(torch.linspace(0, 1, 200), 0.6)
METHODS: dict[str, tp.Pruner] = {
    "fixed": tp.FixedThreshold(final_token_threshold=100),
    "relative": tp.RelativeThreshold(token_threshold=1),
    "rising": tp.RisingThreshold(final_token_threshold=1),
    "topk": tp.TopK(token_keep_rate=-9, keep_all_layers=1),
    "learned": tp.LearnedThreshold(final_token_threshold=100),
    "probes": tp.FixedThreshold(thresholds=[9.0] * LAYERS, probes=tp.Probes([1, 3], torch.zeros(2, HIDDEN + 1))),
    "summaries": tp.FixedThreshold(final_token_threshold=100, summary_tokens="segment"),
}


def packed(texts: list[list[int]]) -> PackedTokens:
    lengths = torch.tensor([len(text) for text in texts])
    layout = layout_from_mask(torch.arange(max(1, int(lengths.max())))[None] < lengths[:, None])
    ids = torch.tensor([x for text in texts for x in text], dtype=torch.int64)
    return PackedTokens(ids, torch.zeros_like(ids), None, layout)


@given(texts=TEXTS, roles=ROLES)
def test_protected_tokens_by_hand(texts: list[list[int]], roles: Any) -> None:
    tokens = packed(texts)
    found = protected(tokens, tp.FixedThreshold(protect=sorted(roles)))
    if not roles:
        assert found is None
        return
    assert found is not None
    found = found.index_fill(0, tokens.layout.first_rows, True)
    assert found.tolist() == [x for text in texts if text for x in protected_by_hand(text, roles)]


def test_the_first_segment_ends_with_the_first_separator() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()
    ids = torch.tensor([[0, 8, 2, 2, 9, 2], [0, 8, 9, 2, 1, 1], [1, 1, 1, 1, 1, 1], [2, 2, 0, 2, 7, 2]])
    layout = layout_from_mask(mask)
    found = layout.grid(first_segment(ids[mask], layout))
    assert found[0].tolist() == [1, 1, 1, 0, 0, 0]  # RoBERTa's <s> A </s></s> B </s>
    assert found[1].tolist()[:4] == [1, 1, 1, 1]
    assert found[3].tolist()[2:] == [1, 1, 0, 0]  # padded on the left, where the separator's id means nothing
    assert not first_segment(ids[0, :0], layout_from_mask(torch.zeros(1, 6).bool())).numel()


@given(texts=TEXTS, received_from=st.sampled_from(["first", "first_segment"]))
def test_who_asks_by_hand(texts: list[list[int]], received_from: Any) -> None:
    found = asking(packed(texts), tp.FixedThreshold(received_from=received_from))
    assert found is not None
    assert found.tolist() == [x for text in texts if text for x in asking_by_hand(text, received_from)]


@given(texts=TEXTS, received_from=st.sampled_from(["first", "first_segment"]))
def test_what_attention_counts_has_mean_one(texts: list[list[int]], received_from: Any) -> None:
    tokens = packed(texts)
    module = TokenPruner(tp.FixedThreshold(received_from=received_from), 1, torch.device("cpu"))
    paid = Decisions(module, tokens, reads="all").paid(1)
    assert paid is not None
    for text, part in zip(texts, paid.split(tokens.layout.lengths), strict=True):
        if text:
            asks = asking_by_hand(text, received_from)
            asks = asks if any(asks) else [True] * len(text)  # nothing but a first token and separators
            expected = [len(text) / sum(asks) * x for x in asks]
            assert_close(part, torch.tensor(expected), 1e-5)


@pytest.mark.parametrize("protect", [["separators"], ["first_segment"], ["separators", "first_segment"]])
@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_no_method_lets_a_protected_token_go(name: str, execution: Any, protect: Any) -> None:
    model, batch = kept_model("bert", "encoder"), ragged_batch([20, 1, 13, 2])
    for row, length in ((0, 20), (2, 13)):
        batch["input_ids"][row, [5, length - 1]] = 3
    pruner = replace(METHODS[name], protect=protect, vocabulary=GATE)
    with pruned(model, pruner, execution), tp.record(model) as trace:
        model(**batch)
    for row, mask, survived in zip(
        batch["input_ids"], batch["attention_mask"].bool(), trace.survived_layers, strict=True
    ):
        stays = protected_by_hand(row[mask].tolist(), protect)
        there = [layers == LAYERS for layers in survived.tolist()]
        if name in ("relative", "rising"):  # beside its largest score no text's largest is small
            assert sum(there) <= sum(stays) + 1
            there = [one and stay for one, stay in zip(there, stays, strict=True)]
        assert there == stays  # and all others do go


def test_nor_does_the_soft_stage_mask_one() -> None:
    pruner = tp.LearnedThreshold(final_token_threshold=1, temperature=0.5, protect=["separators"])
    model, batch = tp.prune(tiny_model("bert", "token"), pruner).train(), ragged_batch([20, 1, 13, 2])
    batch["input_ids"][0, [5, 19]] = 3
    with tp.record(model) as trace:
        model(**batch)
    masks = [record.soft_mask for record in trace.passes[0].layers.values()]
    assert len(masks) == LAYERS
    for mask in masks:
        assert mask is not None
        assert (mask[[0, 5, 19]] == 1).all() and (mask[[1, 2, 3, 4, 6]] < 1).all()


@torch.no_grad()
def test_a_query_of_nothing_and_a_single_text() -> None:
    """The one asks with all of its rows; the other is all of the first segment."""
    model = kept_model("bert", "encoder")
    ids = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[0, [1, 11]] = 3  # [CLS] [SEP] … [SEP]
    scores = {}
    for received_from in ("all", "first_segment"):
        pruner = tp.FixedThreshold(final_token_threshold=0, received_from=received_from)
        with pruned(model, pruner), tp.record(model) as trace:
            model(ids)
        found = trace.passes[0].layers[1].scores
        assert found is not None
        scores[received_from] = found.view(2, 12)
    assert_close(scores["all"][0], scores["first_segment"][0], 1e-6)
    assert not torch.allclose(scores["all"][1], scores["first_segment"][1], atol=1e-4)  # without first and last row
    assert_close(scores["first_segment"].sum(1), torch.full((2,), 12 / 128), 1e-6)


def test_ids_are_needed() -> None:
    embeds = torch.zeros(1, 5, HIDDEN)
    for options, message in (
        ({"protect": ["separators"]}, r"protect is \['separators'\], which needs input_ids; inputs_embeds will not do"),
        ({"received_from": "first_segment"}, "received_from is 'first_segment', which needs input_ids"),
    ):
        model = tp.prune(tiny_model("bert", "encoder"), tp.FixedThreshold(**options))
        with pytest.raises(tp.ConfigError, match=message):
            model(inputs_embeds=embeds)
    model = tp.prune(tiny_model("bert", "encoder"), tp.FixedThreshold(received_from="first"))
    assert model(inputs_embeds=embeds).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protect": "separators"}, "protect is 'separators'; it must be a list of separators, first_segment"),
        ({"protect": ["separator"]}, r"protect\[0\] is 'separator'; it must be one of separators, first_segment"),
        ({"protect": [["separators"]]}, r"protect\[0\] is \['separators'\]; it must be one of"),
        ({"protect": 3}, "protect is 3; it must be a list of"),
        ({"protect": None}, "protect is None; it must be a list of"),
        ({"received_from": "query"}, "received_from is 'query'; it must be one of all, first_segment, first"),
        ({"received_from": None}, "received_from is None; it must be one of"),
        ({"departed": "mean"}, "departed is 'mean'; it must be one of state, survivors, map"),
        ({"departed": "map"}, "departed is 'map', but there are no maps of what left"),
        ({"probes": [1, 2]}, r"probes is \[1, 2\]; it must be a Probes"),
    ],
)
def test_what_is_not_allowed_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(tp.ConfigError, match=message) as caught:
        tp.FixedThreshold(**options)
    assert "\n" not in str(caught.value)
