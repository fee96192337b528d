"""Tokens that left and are attended to still: against loops over single texts, heads and tokens."""

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import token_pruning as tp
from tests.families.shared import assert_same, batch_of, kept_model, model_of, valid, without_dropout
from tests.runtime.by_hand import Text, asking_by_hand, keep_by_hand, protected_by_hand
from tests.runtime.test_departed import (
    CORRECTION,
    GATE,
    MAPS,
    PROBES,
    draw_method,
    expected_rows,
    method,
    parts_by_hand,
    random,
    rows_of,
    singles,
)
from tests.tiny import PAD, assert_close, decision_margin, pruned, ragged_batch, same_survivors, tiny_config, tiny_model
from token_pruning.budget.fitting import predicted_flops
from token_pruning.families import Family, family_of, shape_of
from token_pruning.ragged import drop, layout_from_mask
from token_pruning.runtime.context import Context, ContextTokens
from token_pruning.runtime.token_pruner import TokenPruner

ROTARY = ("modernbert", "nomic_bert", "gte", "eurobert", "jina_embeddings_v3")
FAMILIES = (
    "bert", "roberta", "mpnet", "deberta-v2", "albert", "distilbert", "xlm-roberta-xl", "megatron-bert", "electra",
    *ROTARY,
)  # fmt: skip
HIDDEN, LAYERS, HEADS = 32, 4, 4


def context_of(*cuts: int, rank: int = 5, layers: int = LAYERS, size: int = HIDDEN, seed: int = 3) -> tp.LinearContext:
    """Keys about as large as a tiny model's own."""
    down = random(len(cuts), rank, HIDDEN + 1, seed=seed) / HIDDEN**0.5
    return tp.LinearContext(cuts, down, 1.5 * random(layers, 2 * size, rank + 1, seed=seed + 1) / rank**0.5)


def key_size(family: str) -> int:
    return shape_of(tiny_config(family)).key_size


CUTS = ((0,), (1,), (0, 1), (0, 2), (1, 2, 3), (4,), (0, 1, 2, 3, 4))
EVERYWHERE = context_of(*range(LAYERS + 1))
EVERY_PROBE = tp.Probes([1, 2, 3, 4], random(LAYERS, HIDDEN + 1) / HIDDEN**0.5)
A_FEW_LEAVE = tp.TopK(token_keep_rate=0.2, keep_all_layers=1, probes=EVERY_PROBE, vocabulary=GATE)
"""Before the first layer, and after each but the first."""
BATCH = ragged_batch([30, 1, 17, 2])
VALID = BATCH["attention_mask"].bool()


# One text, head and token at a time


@cache
def in_float64(family: str) -> Any:
    return copy.deepcopy(kept_model(family, "encoder")).double()


def affine(weights: Tensor, row: Tensor) -> Tensor:
    return weights[:, :-1].double() @ row + weights[:, -1].double()


@torch.no_grad()
def text_and_scores(model: Any, pruner: tp.Pruner, inputs: dict[str, Tensor]) -> tuple[Text, list[list[float]]]:
    """A text's pass by the modules of a BERT in float64, and each layer's scores of the tokens that were there.

    Args:
        model: not pruned.
        pruner: the method.
        inputs: the model's arguments, ``[1, tokens]``, without a mask.
    """
    ids, context, gate = inputs["input_ids"][0].tolist(), pruner.context, pruner.vocabulary
    assert context is not None
    states = list(model.embeddings(**inputs)[0])
    stays, asks = protected_by_hand(ids, pruner.protect), asking_by_hand(ids, pruner.received_from)
    alive = [i for i, x in enumerate(ids) if stays[i] or gate is None or gate.scores[x] >= gate.threshold]
    entered, left_at, margin, all_scores = len(alive), [0] * len(ids), 1.0, []
    for number, layer in enumerate(model.encoder.layer, start=1):
        own, rows = layer.attention.self, torch.stack([states[i] for i in alive])
        query, keys, values = (dict(zip(alive, part(rows), strict=True)) for part in (own.query, own.key, own.value))
        for i in sorted({*range(len(ids))} - {*alive}):
            if left_at[i] in context.layers:
                code = affine(context.down[context.layers.index(left_at[i])], states[i])
                keys[i], values[i] = affine(context.up[number - 1], code).chunk(2)
        there = sorted(keys)
        paying = [i for i in alive if asks[i]] or alive
        received = dict.fromkeys(there, 0.0)
        found = []
        for i in alive:
            mixed = []
            for head in range(HEADS):
                part = slice(head * HIDDEN // HEADS, (head + 1) * HIDDEN // HEADS)
                logits = torch.stack([keys[j][part] for j in there]) @ query[i][part] / (HIDDEN // HEADS) ** 0.5
                weights = logits.softmax(0)
                mixed.append(weights @ torch.stack([values[j][part] for j in there]))
                for j, weight in zip(there, weights.tolist(), strict=True):
                    received[j] += weight / HEADS * (i in paying) * len(alive) / len(paying)
            found.append(torch.cat(mixed))
        joined = layer.attention.output(torch.stack(found), rows)
        after = layer.output(layer.intermediate(joined), joined)
        if pruner.probes is not None and number in pruner.probes.layers:
            probe = pruner.probes.weights[pruner.probes.layers.index(number)]
            scores = [float(affine(probe[None], row)) for row in joined]
        else:
            divisor = {"mean": pruner.max_seq_length, "mean_norm": len(alive), "relative": 1}[pruner.scoring_mode]
            scores = [received[i] / divisor for i in alive]
        all_scores.append(scores)
        keep = [True] * len(alive)
        if pruner.prune_layers is None or number in pruner.prune_layers:
            keep, near = keep_by_hand(pruner, number, LAYERS, scores, entered)
            margin = min(margin, near)
        left = []
        for row, i in enumerate(alive):
            if keep[row] or stays[i]:
                states[i] = after[row]
                left.append(i)
            else:
                states[i], left_at[i] = joined[row], number
        alive = left
    for i in alive:
        left_at[i] = LAYERS + 1
    return Text(torch.stack(states), torch.stack(states), left_at, margin), all_scores


def draw_context_method(data: st.DataObject, reads: str, size: int = HIDDEN) -> tp.Pruner:
    """Any setting with every other, most with a gate; keys of a size."""
    cuts, rank = data.draw(st.sampled_from(CUTS)), data.draw(st.sampled_from([1, 5, 12]))
    gate = data.draw(st.sampled_from([None, GATE, GATE]))
    return draw_method(data, reads, context=context_of(*cuts, rank=rank, size=size), vocabulary=gate)


@settings(max_examples=60)
@given(data=st.data())
def test_every_setting_by_loops_over_tokens(data: st.DataObject) -> None:
    """BERT, whose own modules do the rest."""
    reads: Any = data.draw(st.sampled_from(["mean", "mean", "all", "first"]))
    pruner = draw_context_method(data, reads)
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4)) + [70] * (pruner.max_tokens is not None)
    model, batch = kept_model("bert", "encoder"), batch_of("bert", lengths=tuple(lengths))
    scores: list[list[list[float]]] = []

    def by_hand(_: Any, pruner: tp.Pruner, inputs: dict[str, Tensor]) -> Text:
        text, found = text_and_scores(in_float64("bert"), pruner, inputs)
        scores.append(found)
        return text

    parts = [parts_by_hand(model, pruner, inputs, by_hand) for inputs in singles(batch)]
    assume(min(part.margin for _, found in parts for part in found) > 1e-4)
    expected = [expected_rows(pruner, reads, *found) for found in parts]
    left = batch_of("bert", lengths=tuple(lengths), left=True)
    for execution, inputs in (("packed", batch), ("packed", left), ("masked", batch)):
        with pruned(model, pruner, execution, reads), torch.no_grad():
            output = model(**inputs)
            with tp.record(model) as trace:
                model(**inputs)
        found = list(output.last_hidden_state) if reads == "first" else rows_of(output, inputs)
        for rows, wanted in zip(found, expected, strict=True):
            scale = max(1.0, wanted.abs().max().item())
            assert_close(rows, wanted, 2e-5 * scale, f"{execution} {reads} {pruner}")
        for number, record in trace.passes[0].layers.items():
            if record.scores is not None:
                wanted = torch.tensor([score for each in scores for score in each[number - 1]])
                assert_close(record.scores, wanted, 2e-5 * max(1.0, wanted.abs().max().item()), f"scores {number}")


@settings(max_examples=100)
@given(data=st.data())
def test_packed_equals_masked_in_every_family(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(FAMILIES))
    head = data.draw(st.sampled_from(["encoder", "encoder", "sequence", "token"]))
    reads: Any = data.draw(st.sampled_from(["mean", "all", "first"])) if head == "encoder" else None
    pruner = draw_context_method(data, reads or {"sequence": "first", "token": "all"}[head], key_size(family))
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4)) + [100] * (pruner.max_tokens is not None)
    model, batches = kept_model(family, head), {}
    for side in (False, True):
        batches[side] = batch_of(family, lengths=tuple(max(1, length) for length in lengths), left=side)
        for row, length in enumerate(lengths):
            if length == 0:
                batches[side]["attention_mask"][row] = 0
                batches[side]["input_ids"][row] = PAD[family]
    found = {}
    for execution, side in (("packed", False), ("packed", True), ("masked", False)):
        with pruned(model, pruner, execution, reads), torch.no_grad():
            output = valid(model(**batches[side]), batches[side])
            with tp.record(model) as trace:
                recorded = valid(model(**batches[side]), batches[side])
        assert_same(recorded, output, 2e-5, "recorded")
        found[execution, side] = (output, trace)
    expected, expected_trace = found.pop(("masked", False))
    assume(decision_margin(expected_trace, LAYERS) > 1e-4)
    for which, (output, trace) in found.items():
        assert same_survivors(trace, expected_trace)
        assert_same(output, expected, 2e-5, f"{which} {family} {head} {pruner}")


@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=5),
    left=st.booleans(),
    seed=st.integers(0, 999),
)
@example(lengths=[3], left=False, seed=0)
@example(lengths=[0, 0], left=False, seed=0)
def test_laid_out_beside_others_in_the_order_of_the_text(lengths: list[int], left: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = max(1, *lengths, 1)
    columns = torch.arange(width)[None]
    sizes = torch.tensor(lengths)[:, None]
    mask = columns >= width - sizes if left else columns < sizes
    here = mask & (torch.rand(mask.shape, generator=generator) < 0.5)
    some = mask & ~here & (torch.rand(mask.shape, generator=generator) < 0.7)
    own = layout_from_mask(here)
    places = some.flatten().nonzero().squeeze(-1)
    places = places[torch.randperm(len(places), generator=generator)]  # by the layer where they left, not by place
    key = torch.zeros(len(places), 1, 1)
    context, others = Context(TokenPruner(tp.Unpruned(), LAYERS, torch.device("cpu"))), ContextTokens(places, key, key)
    found = context.beside(own, others)
    assert context.beside(own, others) is found  # as long as the same tokens are there
    fewer, *_ = drop(own, torch.arange(own.total) % 2 == 0)
    assert context.beside(fewer, others).layout.total == fewer.total + len(places)
    layout, order, rows = context.beside(own, others)
    wanted = [[row * width + i for i in range(width) if here[row, i] or some[row, i]] for row in range(len(lengths))]
    assert layout.indices.tolist() == [place for each in wanted for place in each]
    assert layout.lengths == [len(x) for x in wanted] and layout.width == width
    assert layout.cu_seqlens.dtype == own.cu_seqlens.dtype
    assert torch.equal(torch.cat([own.indices, places])[order], layout.indices)
    assert torch.equal(layout.indices[rows], own.indices)


def exact(model: Any, layers: int) -> tp.LinearContext:
    """The first layer's own keys and values of the tokens that never enter it; a rank of the whole hidden size."""
    own = model.base_model.encoder.layer[0].attention.self
    weights = torch.cat([torch.cat([part.weight, part.bias[:, None]], 1) for part in (own.key, own.value)]).detach()
    up = torch.cat([weights[None], random(layers - 1, 2 * HIDDEN, HIDDEN + 1)])
    return tp.LinearContext([0], torch.eye(HIDDEN, HIDDEN + 1)[None], up)


@pytest.mark.parametrize("reads", ["all", "first"])
@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
@torch.no_grad()
def test_exact_keys_and_values_give_the_dense_first_layer(family: str, execution: Any, reads: Any) -> None:
    model = tiny_model(family, "encoder", layers=1)
    batch = ragged_batch([30, 1, 17, 2], family=family)
    dense = model(**batch).last_hidden_state
    nothing = tp.FixedThreshold(thresholds=[0.0], vocabulary=GATE, departed="survivors")
    for context in (exact(model, 1), None):
        with pruned(model, replace(nothing, context=context), execution, reads), tp.record(model) as trace:
            states = model(**batch).last_hidden_state
        entered = trace.passes[0].entering.indices
        assert 10 < len(entered) < VALID.sum() - 10
        found, wanted = states[:, 0], dense[:, 0]
        if reads == "all":
            found, wanted = states.flatten(0, 1)[entered], dense.flatten(0, 1)[entered]
        if context is not None:
            assert_close(found, wanted, 2e-5)
        else:
            assert (found - wanted).abs().max() > 0.05  # which is what context is for


@pytest.mark.parametrize("execution", ["packed", "masked"])
@torch.no_grad()
def test_attention_received_is_that_of_the_dense_layer_from_tokens_that_are_there(execution: Any) -> None:
    model = tiny_model("bert", "encoder", attn_implementation="eager")
    attention = model(**BATCH, output_attentions=True).attentions[0]
    pruner = tp.FixedThreshold(thresholds=[0.5, 0, 0, 0], scoring_mode="relative", vocabulary=GATE)
    with pruned(model, replace(pruner, context=exact(model, LAYERS)), execution), tp.record(model) as trace:
        model(**BATCH)
    scores, entering = trace.passes[0].layers[1].scores, trace.passes[0].entering
    assert scores is not None
    for sequence, found in enumerate(scores.split(entering.lengths)):
        columns = entering.indices[entering.sequence_ids == sequence] % entering.width
        wanted = attention[sequence].mean(0)[columns][:, columns].sum(0)
        assert_close(found, wanted, 1e-5)
        assert len(columns) in (1, 2) or found.mean() < 0.95  # the rest went to those that never entered


@torch.no_grad()
def test_every_cut_matters_to_the_layers_after_it() -> None:
    """And a token that left where nothing is kept of it is gone."""
    model = kept_model("bert", "encoder")
    pruner = replace(A_FEW_LEAVE, prune_layers=[2, 4])

    def states(context: tp.LinearContext | None) -> Tensor:
        with pruned(model, replace(pruner, context=context)):
            found: Tensor = model(**BATCH).last_hidden_state[0]
            return found

    without = states(None)
    for cut in (0, 2):
        assert (states(context_of(cut)) - without).abs().max() > 0.01
    for cut in (1, 3, 4):  # nothing leaves there; nothing comes after
        assert torch.equal(states(context_of(cut)), without)
    both = replace(EVERYWHERE, layers=(0, 2), down=EVERYWHERE.down[[0, 2]])
    assert_close(states(EVERYWHERE), states(both), 1e-5)


@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize("reads", ["first", "mean", "all"])
@torch.no_grad()
def test_texts_without_tokens_and_batches_without_texts(reads: Any, execution: Any) -> None:
    model = kept_model("bert", "encoder")
    most = None if reads == "all" else 16
    with pruned(model, method(context=EVERYWHERE, vocabulary=GATE, max_tokens=most), execution, reads):
        batch = ragged_batch([0, 30, 0, 5, 0])
        states = model(**batch).last_hidden_state
        assert states.isfinite().all() and (states[[0, 2, 4]] == 0).all()
        alone = model(**{name: x[[1, 3]] for name, x in batch.items()}).last_hidden_state
        assert_close(states[[1, 3]], alone, 2e-5)
        assert (model(**{name: x[[0]] for name, x in batch.items()}).last_hidden_state == 0).all()
        if execution == "packed":
            none = {name: x[:0] for name, x in batch.items()}
            assert model(**none).last_hidden_state.shape == (0, 1 if reads == "first" else 30, HIDDEN)


@torch.no_grad()
def test_results_do_not_depend_on_the_batch() -> None:
    model, batch = kept_model("bert", "encoder"), ragged_batch([30, 7, 50, 20])
    with pruned(model, method(context=EVERYWHERE, vocabulary=GATE, max_tokens=20, chunks=True), reads="mean"):
        together = rows_of(model(**batch), batch)
        apart = [model(**one).last_hidden_state[0] for one in singles(batch)]
    for rows, alone in zip(together, apart, strict=True):
        assert_close(rows, alone, 1e-5)


@torch.no_grad()
def test_attention_probabilities_have_columns_for_them() -> None:
    model = kept_model("bert", "encoder")
    with pruned(model, method(context=EVERYWHERE, vocabulary=GATE), "masked"), tp.record(model) as trace:
        attentions = model(**BATCH, output_attentions=True).attentions
    entered = trace.passes[0].entering.grid(torch.ones(trace.passes[0].entering.total, dtype=torch.bool))
    for number, attention in enumerate(attentions, start=1):
        there = trace.passes[0].layers[number].entering
        for i, sequence in zip(there.indices.tolist(), there.sequence_ids.tolist(), strict=True):
            paid = attention[sequence, :, i % there.width]
            assert (paid[:, VALID[sequence]] > 0).all() and (paid[:, ~VALID[sequence]] == 0).all()
    assert (VALID & ~entered).any()


# Training


def gradients_of(
    pruner: tp.Pruner, reads: Any, execution: Any = "packed", family: str = "bert", checkpointing: bool | None = None
) -> dict[str, Tensor]:
    """Of a model in training mode; ``checkpointing`` says whether it is re-entrant."""
    model = tiny_model(family, "encoder", **without_dropout(family))
    tp.prune(model, pruner, execution=execution, reads=reads).train()
    if checkpointing is not None:
        enable = getattr(model, "activation_checkpointing_enable", None)  # transformers' new name for it
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": checkpointing})
    with tp.record(model) as trace:
        states = model(**ragged_batch([30, 1, 17, 2], family=family)).last_hidden_state
    weights = random(4, 30, HIDDEN)[:, : states.shape[1]]
    loss = (states * weights * (1 if reads == "first" else VALID[..., None])).sum()
    (loss + (trace.soft_rates.sum() if pruner.learned else 0)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], relative: float) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, relative * max(1.0, gradient.abs().max().item()), name)


TRAINED: dict[str, tp.Pruner] = {
    "state": method(vocabulary=GATE, context=EVERYWHERE),
    "survivors": method(vocabulary=GATE, context=EVERYWHERE, departed="survivors"),
    "map": method(vocabulary=GATE, context=EVERYWHERE, departed="map", maps=MAPS, probes=PROBES),
    "gate": method(vocabulary=GATE, context=context_of(0), thresholds=[0.0] * LAYERS, departed="survivors"),
    "later": method(context=context_of(1, 3), departed="survivors", correction=CORRECTION),
    "soft": tp.LearnedThreshold(
        thresholds=[0.8] * LAYERS, temperature=0.5, scoring_mode="relative", vocabulary=GATE, context=EVERYWHERE
    ),
}


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "megatron-bert"])
@pytest.mark.parametrize("reads", ["first", "mean"])
@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_the_masked_reference_s(name: str, reads: Any, family: str) -> None:
    found, wanted = (gradients_of(TRAINED[name], reads, execution, family) for execution in ("packed", "masked"))
    # Without a norm before them keys and values of context are large, and so is their rounding.
    assert_gradients(found, wanted, 2e-4 if family == "megatron-bert" else 2e-5)


@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize("reads", ["first", "mean"])
@pytest.mark.parametrize("name", TRAINED)
def test_gradient_checkpointing_changes_nothing(name: str, reads: Any, execution: Any) -> None:
    plain, checkpointed = (gradients_of(TRAINED[name], reads, execution, checkpointing=way) for way in (None, False))
    assert_gradients(checkpointed, plain, 1e-6)


@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize("name", TRAINED)
def test_checkpointing_that_cuts_the_graph_is_refused(name: str, execution: Any) -> None:
    with pytest.raises(tp.ConfigError, match=r"summary tokens and context cannot train through re-entrant.*False}$"):
        gradients_of(TRAINED[name], "mean", execution, checkpointing=True)


@pytest.mark.parametrize("execution", ["packed", "masked"])
def test_tokens_that_left_learn_through_their_keys_and_values(execution: Any) -> None:
    """Where survivors alone count, nothing else comes from those that never entered."""
    ids = BATCH["input_ids"][VALID]
    gone = ids[GATE.scores[ids] < GATE.threshold]
    stay = torch.cat([ids[GATE.scores[ids] >= GATE.threshold], BATCH["input_ids"][:, 0]])
    gone = gone[~torch.isin(gone, stay)]
    assert len(gone) > 3
    name = "embeddings.word_embeddings.weight"
    learned = gradients_of(TRAINED["gate"], "mean", execution)[name]
    assert (learned[gone].abs().sum(1) > 1e-6).all()
    without = gradients_of(replace(TRAINED["gate"], context=None), "mean", execution)[name]
    assert (without[gone] == 0).all()


@pytest.mark.parametrize("reads", ["first", "mean"])
def test_grad_no_grad_and_inference_mode_agree(reads: Any) -> None:
    model = kept_model("bert", "encoder")
    options: dict[str, Any] = {"context": EVERYWHERE, "received_from": "first_segment", "vocabulary": GATE}
    with pruned(model, method(**options, max_tokens=20), reads=reads):
        with_grad = model(**BATCH).last_hidden_state
        assert with_grad.requires_grad
        with torch.no_grad():
            assert_close(model(**BATCH).last_hidden_state, with_grad, 2e-5)
        with torch.inference_mode():
            assert_close(model(**BATCH).last_hidden_state.clone(), with_grad, 2e-5)


def test_dropout_leaves_decisions_alone() -> None:
    """The first layer's, which no dropout comes before; the others see what was dropped."""
    family = {**without_dropout("bert"), "attention_probs_dropout_prob": 0.5}
    model = tiny_model("bert", "encoder", **family)
    tp.prune(model, method(vocabulary=GATE, context=EVERYWHERE), reads="mean")
    scores = []
    for training in (False, True):
        with tp.record(model.train(training)) as trace, torch.no_grad():
            assert model(**BATCH).last_hidden_state.isfinite().all()
        scores.append(trace.passes[0].layers[1].scores)
    assert scores[0] is not None and scores[1] is not None
    assert_close(scores[1], scores[0], 1e-5)


# Narrow numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reads", ["first", "mean", "all"])
@torch.no_grad()
def test_a_narrow_model_keeps_its_tensors_in_float32(reads: Any, dtype: torch.dtype) -> None:
    model = tiny_model("bert", "encoder")
    pruner = method(context=EVERYWHERE, vocabulary=GATE, thresholds=[0.0] * LAYERS)
    with pruned(model, pruner, reads=reads):
        expected = model(**BATCH).last_hidden_state
    model.to(dtype)
    tp.prune(model, pruner, reads=reads)
    model.half() if dtype == torch.float16 else model.bfloat16()
    tensors = dict(model.token_pruner.named_buffers())
    for name, own in (("context_down", EVERYWHERE.down), ("context_up", EVERYWHERE.up)):
        assert tensors[name].dtype == torch.float32 and torch.equal(tensors[name], own)
    states = model(**BATCH).last_hidden_state
    assert states.dtype == dtype
    scale = expected.abs().max().item()
    assert_close(states.float(), expected, (0.08 if dtype == torch.bfloat16 else 0.01) * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_narrow_model_decides_as_its_masked_reference(dtype: torch.dtype) -> None:
    model, traces = tiny_model("bert", "encoder").to(dtype), []
    for execution in ("packed", "masked"):
        with pruned(model, method(context=EVERYWHERE, vocabulary=GATE), execution), tp.record(model) as trace:
            states = model(**BATCH).last_hidden_state
        assert states.dtype == dtype and states.isfinite().all()
        traces.append(trace)
    assert abs(int(traces[0].ffn_lengths.sum() - traces[1].ffn_lengths.sum())) <= 4


@pytest.mark.parametrize("execution", ["packed", "masked"])
@torch.no_grad()
def test_autocast_rounds_no_code(execution: Any) -> None:
    """Codes, keys and values are computed in float32, and then rounded as the model's own."""
    model = kept_model("bert", "encoder")
    huge = replace(context_of(0), up=torch.zeros(LAYERS, 2 * HIDDEN, 6))
    huge.up[..., 0], huge.up[..., 1] = 1e4, -1e4  # the codes' difference counts
    huge.down[:, 1] = huge.down[:, 0]
    huge.down[:, 1, -1] += 1e-4
    pruner = method(thresholds=[0.0] * LAYERS, vocabulary=GATE)
    with pruned(model, replace(pruner, context=huge), execution):
        expected = model(**BATCH).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            found = model(**BATCH).last_hidden_state
    assert_close(found.float(), expected, 0.08 * expected.abs().max().item())


# What it costs: hidden 32, intermediate 64, four layers


def macs_by_hand(
    own: list[int], others: list[int], projected: list[int], left: list[int], rank: int, coded: int
) -> int:
    """Tokens there, tokens that left and are attended to, rows of the output projection and of the feed-forward."""
    macs = coded * rank * HIDDEN
    for n, more, joined, fed in zip(own, others, projected, left, strict=True):
        macs += 3 * n * HIDDEN * HIDDEN + 2 * n * (n + more) * HIDDEN + joined * HIDDEN * HIDDEN
        macs += 2 * fed * HIDDEN * 64 + more * rank * 2 * HIDDEN
    return macs


def recorded(model: Any, batch: dict[str, Tensor]) -> tp.Trace:
    with torch.no_grad(), tp.record(model) as trace:
        model(**batch)
    return trace


def test_a_small_case_in_numbers() -> None:
    """Ten tokens, of which top-k leaves eight after the second layer, six after the third, four after the last."""
    pruner = tp.TopK(token_keep_rate=0.4, keep_all_layers=1, departed="survivors", context=context_of(2, rank=5))
    model = tp.prune(tiny_model("bert", "encoder"), pruner, reads="all")
    trace = recorded(model, ragged_batch([10]))
    assert trace.ffn_lengths[:, 0].tolist() == [10, 8, 6, 4]
    computed = trace.computed_lengths
    assert computed.context[:, 0].tolist() == [0, 0, 2, 2]
    assert computed.context_products.tolist() == [[2 * 5 * 32 + 2 * (2 * 64 * 5)]]
    assert computed.projected[:, 0].tolist() == [10, 10, 6, 4]  # what leaves is projected where it becomes context
    macs = 0
    macs += 4 * 10 * 1024 + 2 * 10 * 10 * 32 + 2 * 10 * 2048
    macs += 4 * 10 * 1024 + 2 * 10 * 10 * 32 + 2 * 8 * 2048
    macs += 3 * 8 * 1024 + 2 * 8 * (8 + 2) * 32 + 6 * 1024 + 2 * 6 * 2048
    macs += 3 * 6 * 1024 + 2 * 6 * (6 + 2) * 32 + 4 * 1024 + 2 * 4 * 2048
    macs += 2 * 5 * 32 + 2 * 64 * 5 + 2 * 64 * 5
    assert tp.count_flops(model, trace).pruned == 2 * macs


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("departed", ["state", "survivors"])
@pytest.mark.parametrize("reads", ["first", "mean", "all"])
@torch.no_grad()
def test_what_it_costs_by_hand(reads: Any, departed: Any, cuts: tuple[int, ...]) -> None:
    pruner = tp.FixedThreshold(
        thresholds=[0.5, 0.6, 0.6, 0.6], scoring_mode="relative", departed=departed, vocabulary=GATE,
        context=context_of(*cuts, rank=7),
    )  # fmt: skip
    model = tp.prune(tiny_model("bert", "encoder"), pruner, reads=reads)
    together = []
    for length in (30, 1, 23):
        trace = recorded(model, ragged_batch([length], seed=length))
        own, left = trace.attention_lengths[:, 0].tolist(), trace.ffn_lengths[:, 0].tolist()
        lost = [length - own[0], *(n - m for n, m in zip(own, left, strict=True))]
        assert length == 1 or min(lost[:3]) > 0
        others, coded = [], 0
        for number in range(1, LAYERS + 1):
            others.append(sum(lost[cut] for cut in cuts if cut < number))
            coded = others[-1]  # what leaves after the last layer needs no code
        joined = []
        for number in range(1, LAYERS + 1):
            wanted = (departed == "state" and reads != "first") or (number in cuts and number < LAYERS)
            joined.append(own[number - 1] if wanted else left[number - 1])
        macs = macs_by_hand(own, others, joined, left, 7, coded)
        if reads == "first":  # one query, one row of everything after it
            n = own[-1]
            macs -= (n - 1) * HIDDEN**2 + 2 * (n - 1) * (n + others[-1]) * HIDDEN
            macs -= (joined[-1] - 1) * HIDDEN**2 + 2 * (left[-1] - 1) * HIDDEN * 64
        assert tp.count_flops(model, trace).pruned == 2 * macs
        together.append(2 * macs)
    texts = [ragged_batch([length], seed=length, width=30) for length in (30, 1, 23)]
    trace = recorded(model, {name: torch.cat([text[name] for text in texts]) for name in BATCH})
    assert tp.count_flops(model, trace).pruned == pytest.approx(sum(together) / 3, rel=1e-12)


@pytest.mark.parametrize("departed", ["state", "survivors"])
@pytest.mark.parametrize("reads", ["first", "all"])
@pytest.mark.parametrize("cut", [0, 2, 3])
def test_it_equals_the_products_of_a_forward_pass(cut: int, reads: Any, departed: Any) -> None:
    """But for two things: with gradients on, codes are computed in each layer; and packed attention has a query of
    zeros for each token that left."""
    model = model_of("bert", "encoder")
    model.pooler = None
    tp.prune(model, replace(A_FEW_LEAVE, departed=departed, context=context_of(cut, rank=7)), reads=reads)
    batch = ragged_batch([37])
    trace = recorded(model, batch)
    with FlopCounterMode(display=False) as counter:
        model(**batch)  # with gradients on: fused attention is no matrix product to the counter
    others, own = trace.computed_lengths.context[:, 0].tolist(), trace.attention_lengths[:, 0].tolist()
    more = sum(map(bool, others)) - 1
    again = more * max(others) * 7 * HIDDEN
    asked = [2 * m * (n + m) * HIDDEN for n, m in zip(own, others, strict=True)]
    if reads == "first":
        asked.pop()
    assert max(others) > 0
    assert tp.count_flops(model, trace).pruned + 2 * (again + sum(asked)) == counter.get_total_flops()


@pytest.mark.parametrize("head", ["sequence", "token"])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("departed", ["state", "survivors"])
def test_prediction_is_what_sequences_cost_that_keep_the_same_fraction(
    departed: Any, cuts: tuple[int, ...], head: str
) -> None:
    """Of twenty and forty tokens beside the first, top-k keeps nine, eight and seven in ten: whole numbers all."""
    model, batch = kept_model("bert", head), ragged_batch([21, 41])
    pruner = tp.TopK(token_keep_rate=0.7, keep_all_layers=1, departed=departed, context=context_of(*cuts))
    with pruned(model, pruner):
        trace = recorded(model, batch)
        assert trace.ffn_lengths[:, 1].tolist() == [41, 37, 33, 29]
        measured = tp.count_flops(model, trace).relative
        profile = [1.0, 0.9, 0.8, 0.7][: 3 if head == "sequence" else 4]
        assert predicted_flops(model, batch, profile) == pytest.approx(measured, rel=1e-9)


@pytest.mark.parametrize("reads", ["first", "mean"])
def test_prediction_of_a_gate_alone(reads: Any) -> None:
    model = kept_model("bert", "encoder")
    costs = []
    for context in (None, context_of(0, rank=3), context_of(0, rank=12)):
        with pruned(model, method(thresholds=[0.0] * LAYERS, vocabulary=GATE, context=context), reads=reads):
            measured = tp.count_flops(model, recorded(model, BATCH)).relative
            profile = [1.0] * (3 if reads == "first" else 4)
            assert predicted_flops(model, BATCH, profile) == pytest.approx(measured, rel=1e-9)
        costs.append(measured)
    assert costs[0] < costs[1] < costs[2] < 1


# What does not fit


def test_what_it_says_of_itself() -> None:
    assert repr(context_of(0, 2, rank=7)) == "LinearContext(layers=[0, 2], rank=7)"
    assert "context=LinearContext(layers=[0, 2], rank=7)" in repr(method(context=context_of(0, 2, rank=7)))
    assert tp.LinearContext(range(2), torch.zeros(2, 1, 33), torch.zeros(4, 64, 2)).layers == (0, 1)


@pytest.mark.parametrize("layers", [[-1], [2, 1], [1, 1], [], "1", [1.0], [True], None, 3, [0, None]])
def test_layers_that_do_not_rise(layers: Any) -> None:
    with pytest.raises(tp.ConfigError, match="context_layers") as caught:
        tp.LinearContext(layers, torch.zeros(1, 5, 33), torch.zeros(4, 64, 6))
    assert "\n" not in str(caught.value)


FITS = {"down": torch.zeros(2, 5, 33), "up": torch.zeros(4, 64, 6)}


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("down", torch.zeros(1, 5, 33), r"are torch.float32 \[1, 5, 33\]; they .* shape \[2, rank, hidden \+ 1\]"),
        ("down", torch.zeros(3, 5, 33), r"are torch.float32 \[3, 5, 33\]; they .* shape \[2, rank, hidden \+ 1\]"),
        ("down", torch.zeros(2, 0, 33), r"are torch.float32 \[2, 0, 33\]; they .* shape \[2, rank, hidden \+ 1\]"),
        ("down", torch.zeros(2, 33), r"are torch.float32 \[2, 33\]; they .* \[context_layers, rank, hidden \+ 1\]"),
        ("down", FITS["down"].long(), r"are torch.int64 \[2, 5, 33\]; they must be floating-point numbers of shape"),
        ("down", [[[0.0]]], r"are list; they must be floating-point numbers of shape \[context_layers, rank, hidden"),
        ("down", None, r"are NoneType; they must be floating-point numbers of shape \[context_layers, rank, hidden"),
        ("up", torch.zeros(4, 64, 5), r"are torch.float32 \[4, 64, 5\]; they .* shape \[layers, 2 · keys, 6\]"),
        ("up", torch.zeros(4, 63, 6), r"are torch.float32 \[4, 63, 6\]; they .* shape \[layers, 2 · keys, 6\]"),
        ("up", torch.zeros(64, 6), r"are torch.float32 \[64, 6\]; they .* \[layers, 2 · keys, rank \+ 1\]"),
        ("up", FITS["up"].long(), r"are torch.int64 \[4, 64, 6\]; they must be floating-point numbers of shape"),
        ("up", "up", r"are str; they must be floating-point numbers of shape \[layers, 2 · keys, rank \+ 1\]"),
    ],
)  # fmt: skip
def test_weights_of_another_shape(name: str, weights: Any, message: str) -> None:
    with pytest.raises(tp.ConfigError, match=f"^context {name} weights {message}") as caught:
        tp.LinearContext([0, 2], **{**FITS, name: weights})
    assert "\n" not in str(caught.value)


def with_sizes(cuts: tuple[int, ...], hidden: int, layers: int, keys: int) -> tp.LinearContext:
    return tp.LinearContext(cuts, torch.zeros(len(cuts), 5, hidden + 1), torch.zeros(layers, 2 * keys, 6))


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (with_sizes((0,), 31, 4, 32), "^context down weights are for hidden size 31; the model's is 32$"),
        (with_sizes((0,), 32, 3, 32), r"^context up weights are \[3, 64, 6\]; the model has 4 layers with 64 numbers"),
        (with_sizes((0,), 32, 4, 16), r"^context up weights are \[4, 32, 6\]; the model has 4 layers with 64 numbers"),
        (with_sizes((0, 9), 32, 4, 32), "^context_layers names layer 9; the model has 4 layers"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_one_line(context: tp.LinearContext, message: str) -> None:
    model = tiny_model("bert", "encoder")
    before = model.config.to_dict()
    with pytest.raises(tp.ConfigError, match=message) as caught:
        tp.prune(model, method(context=context))
    assert "\n" not in str(caught.value)
    assert model.config.to_dict() == before and not hasattr(model, "token_pruner")


@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize("family", ROTARY)
def test_a_family_that_does_not_say_how_keys_turn(family: str, execution: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family, "encoder")
    own = family_of(model.config)
    monkeypatch.setattr(own, "turned", Family.turned)
    before = model.config.to_dict()
    message = (
        rf"^context is LinearContext\(layers=\[0\], rank=5\), but the family {own.__name__} does not say how its "
        "rotary positions turn keys; leave context out, or give the family a method turned$"
    )
    with pytest.raises(tp.ConfigError, match=message):
        tp.prune(model, method(context=context_of(0, size=key_size(family))), execution=execution)
    assert model.config.to_dict() == before and not hasattr(model, "token_pruner")


@pytest.mark.parametrize("factor", [1.0, 1.3])
@pytest.mark.parametrize("family", ROTARY)
@torch.no_grad()
def test_keys_turn_as_the_layers_own_and_back(family: str, factor: float) -> None:
    model = tiny_model(family, "encoder")
    bound, positions = family_of(model.config)(model), torch.tensor([0, 3, 1, 40])
    for name in [name for name in vars(model.rotary_emb) if name.endswith("attention_scaling")]:
        setattr(model.rotary_emb, name, factor)
    rows = random(4, HIDDEN)
    for layer in bound.layers:
        _, turned, _ = bound.project(layer, rows, positions, None)
        _, standing, _ = bound.project(layer, rows, positions * 0, None)
        assert_close(bound.turned(layer, standing / factor, positions), turned)
        assert_close(bound.turned(layer, turned, positions, back=True), standing / factor)


@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize("family", ["nomic_bert", "gte", "jina_embeddings_v3", "modernbert"])
@torch.no_grad()
def test_exact_keys_that_turn_give_the_dense_first_layer(family: str, execution: Any) -> None:
    model, batch = tiny_model(family, "encoder", layers=1), ragged_batch([30, 1, 17, 2], family=family)
    dense = model(**batch).last_hidden_state
    weights = dict(model.named_parameters())
    parts = [
        (weights[n], weights.get(n.replace("weight", "bias"))) for n in weights if "k_proj.w" in n or "v_proj.w" in n
    ]
    if family == "modernbert":
        parts = [(part, None) for part in weights["layers.0.attn.Wqkv.weight"].chunk(3)[1:]]
    assert len(parts) == 2
    rows = [torch.cat([w, torch.zeros(len(w), 1) if b is None else b[:, None]], 1) for w, b in parts]
    own = tp.LinearContext([0], torch.eye(HIDDEN, HIDDEN + 1)[None], torch.cat(rows)[None])
    gated = tp.FixedThreshold(thresholds=[0.0], vocabulary=GATE, departed="survivors")
    for pruner in (replace(gated, context=own), gated):
        with pruned(model, pruner, execution, "all"), tp.record(model) as trace:
            states = model(**batch).last_hidden_state.flatten(0, 1)
        entered = trace.passes[0].entering.indices
        assert 10 < len(entered) < VALID.sum() - 10
        difference = (states - dense.flatten(0, 1))[entered].abs().max()
        assert (difference < 1e-4) == (pruner.context is not None)


@pytest.mark.parametrize("summaries", ["shared", "segment"])
def test_no_summaries_beside_it(summaries: Any) -> None:
    with pytest.raises(tp.ConfigError, match=f"^summary_tokens is '{summaries}'; with context it must be none: what"):
        method(context=context_of(0), summary_tokens=summaries)
    with pytest.raises(tp.ConfigError, match=r"^context is 3; it must be a LinearContext$"):
        method(context=3)


# Taken off again


@torch.no_grad()
def test_unprune_leaves_the_dense_model() -> None:
    model = tiny_model("bert", "sequence")
    before, weights = model.config.to_dict(), {name: x.clone() for name, x in model.state_dict().items()}
    expected = model(**BATCH).logits
    tp.prune(model, method(context=EVERYWHERE, vocabulary=GATE))
    assert model.config.context_layers == [0, 1, 2, 3, 4]
    assert {"token_pruner.context_down", "token_pruner.context_up"} <= model.state_dict().keys()
    assert not torch.equal(model(**BATCH).logits, expected)
    tp.unprune(model)
    assert torch.equal(model(**BATCH).logits, expected)
    assert model.config.to_dict() == before and model.state_dict().keys() == weights.keys()
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


@torch.no_grad()
def test_nothing_leaves_and_nothing_changes() -> None:
    model = kept_model("bert", "encoder")
    keep_all = method(thresholds=[0.0] * LAYERS)
    with pruned(model, keep_all):
        expected = model(**BATCH).last_hidden_state
    with pruned(model, replace(keep_all, context=EVERYWHERE)):
        assert torch.equal(model(**BATCH).last_hidden_state, expected)
        copied = copy.deepcopy(model)
    assert torch.equal(copied.token_pruner.context_up, EVERYWHERE.up)
    assert torch.equal(copied(**BATCH).last_hidden_state, expected)
