"""Families whose attention has terms of its own, shared layers, or further embeddings."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import token_pruning as tp
from tests.tiny import (
    LONGEST,
    MORE_HEADS,
    SPECIAL_ATTENTION,
    assert_close,
    assert_equal,
    outputs,
    pruned,
    ragged_batch,
    same_survivors,
    tiny_config,
    tiny_model,
)
from token_pruning.families import shape_of
from token_pruning.runtime.prune import reads_of

FAMILY_HEADS = [
    (family, head)
    for family in SPECIAL_ATTENTION
    for head in MORE_HEADS
    if head != "regression" and type(tiny_config(family)) in MORE_HEADS[head]._model_mapping
]
NO_DROPOUT = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0, "classifier_dropout_prob": 0}
PRUNERS: dict[str, tp.Pruner] = {
    "relative": tp.RelativeThreshold(token_threshold=0.3),
    "topk": tp.TopK(token_keep_rate=0.3),
    "fixed": tp.FixedThreshold(final_token_threshold=0.97, scoring_mode="relative", summary_tokens="segment"),
}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "albert, two layers per group": ("albert", {"inner_group_num": 2, "layers": 3}),
    "albert, groups that do not divide": ("albert", {"num_hidden_groups": 3, "layers": 5}),
    "ernie without tasks": ("ernie", {"use_task_id": False}),
    "deberta without relative attention": ("deberta", {"relative_attention": False}),
    "deberta without terms": ("deberta", {"pos_att_type": None}),
    "deberta c2p": ("deberta", {"pos_att_type": "c2p"}),
    "deberta p2c": ("deberta", {"pos_att_type": "p2c"}),
    "deberta with a term that is none": ("deberta", {"pos_att_type": "c2p|p2p"}),
    "deberta, all distances": ("deberta", {"max_relative_positions": -1}),
    "deberta, no positions": ("deberta", {"position_biased_input": False, "embedding_size": 16}),
    "deberta-v2, own projections": ("deberta-v2", {"share_att_key": False}),
    "deberta-v2 c2p": ("deberta-v2", {"share_att_key": False, "pos_att_type": "c2p"}),
    "deberta-v2 p2c": ("deberta-v2", {"share_att_key": False, "pos_att_type": "p2c"}),
    "deberta-v2 c2p, shared": ("deberta-v2", {"pos_att_type": ["c2p"]}),
    "deberta-v2 without terms": ("deberta-v2", {"pos_att_type": None}),
    "deberta-v2 with a term that is none": ("deberta-v2", {"pos_att_type": "c2p|p2p"}),
    "deberta-v2 without buckets": ("deberta-v2", {"position_buckets": -1, "max_relative_positions": 20}),
    "deberta-v2, all distances": ("deberta-v2", {"max_relative_positions": -1, "norm_rel_ebd": "none"}),
    "deberta-v2 without relative attention": ("deberta-v2", {"relative_attention": False}),
    "deberta-v2, BERT's embeddings": (
        "deberta-v2",
        {"position_biased_input": True, "embedding_size": 16, "type_vocab_size": 2},
    ),
}


def model_of(family: str, head: str, **settings: Any) -> Any:
    """A tiny model whose biases and norms are not what Hugging Face starts them with, zeros and ones."""
    model = tiny_model(family, head, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def batch_of(family: str, head: str = "encoder", **settings: Any) -> dict[str, Tensor]:
    """Ragged, with sequences of one token, of two and of as many as the model takes, and segments."""
    batch = ragged_batch([30, 1, LONGEST[family], 2, 17, 41], family=family, **settings)
    if tiny_config(family).to_dict().get("type_vocab_size", 0) > 1:
        batch["token_type_ids"] = (
            (torch.arange(batch["input_ids"].shape[1]) % 7 > 3).long().expand_as(batch["input_ids"])
        )
    return {name: x.view(2, 3, -1) for name, x in batch.items()} if head == "multiple_choice" else batch


def valid(output: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an output, those per token at valid tokens alone, whose order padding does not change."""
    mask = batch["attention_mask"].bool()
    return {n: x[mask] if x.shape[: mask.dim()] == mask.shape else x for n, x in outputs(output).items()}


def run(model: Any, pruner: tp.Pruner, batch: dict[str, Tensor], execution: Any = "packed") -> tuple[Any, tp.Trace]:
    with pruned(model, pruner, execution), torch.no_grad(), tp.record(model) as trace:
        return model(**batch), trace


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float, message: str = "") -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, relative * max(1.0, value.abs().max().item()), f"{message} {name}")


def zero_thresholds(model: Any) -> tp.Pruner:
    layers = shape_of(model.config).num_layers
    return tp.FixedThreshold(thresholds=[0.0] * layers, scoring_mode="relative")


def assert_dense(model: Any, batch: dict[str, Tensor]) -> None:
    """Nothing dropped is Hugging Face's own model."""
    with torch.no_grad():
        expected = valid(model(**batch), batch)
    for pruner in (tp.Unpruned(), zero_thresholds(model)):
        for execution in ("packed", "masked"):
            output, _ = run(model, pruner, batch, execution)
            assert_same(valid(output, batch), expected, 2e-5, f"{pruner} {execution}")


@pytest.mark.parametrize(("family", "head"), FAMILY_HEADS)
def test_nothing_dropped_equals_hugging_face(family: str, head: str) -> None:
    model = model_of(family, head)
    assert_dense(model, batch_of(family, head))
    assert reads_of(model) == ("first" if head in ("sequence", "multiple_choice") else "all")


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_dropped_equals_hugging_face_in_further_settings(name: str) -> None:
    family, settings = SETTINGS[name]
    for head in ("encoder", "sequence"):
        model = model_of(family, head, **settings)
        assert_dense(model, batch_of(family))
        packed, trace = run(model, PRUNERS["relative"], batch_of(family))
        masked, masked_trace = run(model, PRUNERS["relative"], batch_of(family), "masked")
        assert same_survivors(trace, masked_trace)
        assert_same(valid(packed, batch_of(family)), valid(masked, batch_of(family)), 1e-5)


@pytest.mark.parametrize("family", ["deberta", "deberta-v2", "mpnet"])
def test_relative_positions_are_those_of_the_columns(family: str) -> None:
    """Whatever position ids are given, and wherever the mask has holes."""
    batch = batch_of(family)
    batch["attention_mask"][0, [3, 4, 20]] = 0
    generator = torch.Generator().manual_seed(0)
    batch["position_ids"] = torch.randint(2, LONGEST[family], batch["input_ids"].shape, generator=generator)
    assert_dense(model_of(family, "encoder", position_biased_input=True), batch)


def test_without_absolute_positions_a_text_may_be_longer_than_the_table() -> None:
    for settings in ({}, {"max_relative_positions": 12}, {"position_buckets": 2}):
        assert_dense(model_of("deberta-v2", "token", **settings), ragged_batch([200, 90], family="deberta-v2"))


@pytest.mark.parametrize("family", SPECIAL_ATTENTION)
def test_embeddings_can_be_given_for_ids(family: str) -> None:
    model, batch = model_of(family, "token"), batch_of(family)
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    assert_dense(model, batch)


@pytest.mark.parametrize("family", SPECIAL_ATTENTION)
def test_padding_on_the_left_changes_nothing(family: str) -> None:
    for head in ("sequence", "token"):
        model = model_of(family, head)
        right, left = (ragged_batch([30, 1, 64, 2, 17], family=family, left=left) for left in (False, True))
        for name, pruner in PRUNERS.items():
            expected, trace = run(model, pruner, right)
            output, left_trace = run(model, pruner, left)
            assert torch.equal(trace.ffn_lengths, left_trace.ffn_lengths)
            assert_same(valid(output, left), valid(expected, right), 1e-5, name)


@pytest.mark.parametrize("method", PRUNERS)
@pytest.mark.parametrize(("family", "head"), FAMILY_HEADS)
def test_packed_equals_masked(family: str, head: str, method: str) -> None:
    model, batch = model_of(family, head), batch_of(family, head)
    packed, trace = run(model, PRUNERS[method], batch)
    masked, masked_trace = run(model, PRUNERS[method], batch, "masked")
    assert same_survivors(trace, masked_trace)
    assert 0.02 < trace.ffn_lengths[-1].sum() / batch["attention_mask"].sum() < 0.9
    for name, value in outputs(masked).items():
        assert_close(outputs(packed)[name], value, message=name)


@pytest.mark.parametrize("method", PRUNERS)
@pytest.mark.parametrize("family", SPECIAL_ATTENTION)
def test_a_sequence_alone_equals_it_in_the_batch(family: str, method: str) -> None:
    model, batch = model_of(family, "token"), batch_of(family)
    together, _ = run(model, PRUNERS[method], batch)
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone, _ = run(model, PRUNERS[method], {name: x[row : row + 1, :length] for name, x in batch.items()})
        assert_close(together.logits[row : row + 1, :length], alone.logits)


@pytest.mark.parametrize("method", ["relative", "topk", "learned"])
@pytest.mark.parametrize("family", SPECIAL_ATTENTION)
def test_gradients_of_packed_and_masked_are_the_same(family: str, method: str) -> None:
    for head in ("sequence", "token"):
        found = []
        for execution in ("packed", "masked"):
            model = model_of(family, head, **NO_DROPOUT)
            pruner = PRUNERS.get(method) or tp.LearnedThreshold(temperature=0.05, max_seq_length=80)
            tp.prune(model, pruner, execution=execution).train()  # type: ignore[arg-type]
            with tp.record(model) as trace:
                logits = model(**batch_of(family)).logits
            loss = (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits))[
                :, : 1 if head == "sequence" else None
            ]
            (loss.square().sum() + (trace.soft_rates.sum() if method == "learned" else 0)).backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        packed, masked = found
        assert packed.keys() == masked.keys()
        assert (method == "learned") == ("token_pruner.thresholds" in packed)
        for name, gradient in masked.items():
            assert_close(packed[name], gradient, 2e-4 * max(1.0, gradient.abs().max().item()), name)


@pytest.mark.parametrize("family", SPECIAL_ATTENTION)
def test_every_dropout_is_hugging_faces(family: str) -> None:
    """Each set to one in turn: what then remains is the same, and no chance is left."""
    batch = ragged_batch([30, 12], family=family)
    model = model_of(family, "encoder", layers=2, **NO_DROPOUT).train()
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    pruner = zero_thresholds(model)
    changed = 0
    with torch.no_grad():
        dense = model(**batch)[0]
        for dropout in dropouts:
            dropout.p = 1.0
            expected = model(**batch)
            changed += not torch.equal(dense, expected[0])
            with pruned(model, pruner):
                assert_same(valid(model(**batch), batch), valid(expected, batch), 2e-5)
            dropout.p = 0.0
    assert changed >= 5


@pytest.mark.parametrize("method", PRUNERS)
@pytest.mark.parametrize("family", SPECIAL_ATTENTION)
def test_flops_equal_the_products_really_computed(family: str, method: str) -> None:
    """But for two that no token has a part in, or no layer: projections of relative positions and of embeddings."""
    model = model_of(family, "encoder", attn_implementation="eager")
    model.pooler = None
    config, length = model.config, 37
    batch = ragged_batch([length], family=family)
    uncounted = {
        "albert": 2 * length * config.hidden_size * getattr(config, "embedding_size", 0),
        "deberta": 4 * 2 * (2 * 2 * 16) * config.hidden_size**2,  # layers · c2p and p2c · 2 · 32 positions
        "deberta-v2": 4 * 2 * (2 * 2 * 16) * config.hidden_size**2,
    }.get(family, 0)
    with FlopCounterMode(display=False) as dense:
        model(**batch)
    tp.prune(model, PRUNERS[method])
    with FlopCounterMode(display=False) as counter, tp.record(model) as trace:
        model(**batch)
    flops = tp.count_flops(model, trace)
    assert flops.dense == dense.get_total_flops() - uncounted
    assert flops.pruned == counter.get_total_flops() - uncounted
    assert flops.pruned < 0.95 * flops.dense


@pytest.mark.parametrize("method", PRUNERS)
@pytest.mark.parametrize(("family", "head"), FAMILY_HEADS)
def test_a_compiled_model_computes_the_same(family: str, head: str, method: str) -> None:
    model, batch = model_of(family, head), batch_of(family, head)
    expected, _ = run(model, PRUNERS[method], batch)
    with pruned(model, PRUNERS[method]):
        engine = tp.compile(model, dtype="float32")
    actual = valid(engine(**batch), batch)
    assert_same(actual, valid(expected, batch), 5e-5)
    native = family in ("data2vec-text", "ernie")
    assert ("kernels: PyTorch, because the native ones have no" in engine.explain()) != native


@pytest.mark.parametrize("family", SPECIAL_ATTENTION)
def test_unprune_leaves_nothing_behind(family: str) -> None:
    model, batch = model_of(family, "sequence"), batch_of(family)

    def traces() -> Any:
        return [(name, list(vars(module))) for name, module in model.named_modules()], model.config.to_dict()

    before = traces()
    with torch.no_grad():
        expected = model(**batch).logits
        for method in PRUNERS.values():
            tp.prune(model, method)
            assert not torch.equal(model(**batch).logits, expected)
            tp.unprune(model)
            assert_equal(model(**batch).logits, expected)
    assert traces() == before


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("deberta", {"talking_head": True}, "talking_head True"),
        ("deberta-v2", {"conv_kernel_size": 3}, "conv_kernel_size 3"),
        ("deberta-v2", {"position_buckets": 7}, "position_buckets 7"),
        ("deberta-v2", {"position_buckets": 80}, "position_buckets 80 for max_relative_positions 40"),
    ],
)
def test_what_cannot_be_pruned_is_refused_by_name(family: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(tp.UnsupportedModelError, match=said):
        tp.prune(tiny_model(family, "encoder", **settings), tp.Unpruned())


def test_a_repeated_last_layer_is_refused() -> None:
    model = tiny_model("deberta-v2", "token")
    model.deberta.z_steps = 2
    with pytest.raises(tp.UnsupportedModelError, match="z_steps 2"):
        tp.prune(model, tp.Unpruned())


def test_task_types_are_refused() -> None:
    model, batch = tiny_model("ernie", "sequence"), batch_of("ernie")
    batch["task_type_ids"] = torch.ones_like(batch["input_ids"])
    engine = tp.compile(model, dtype="float32")
    for call in (tp.prune(model, tp.Unpruned()), engine):
        with pytest.raises(tp.ConfigError, match="task_type_ids is given"):
            call(**batch)


def test_a_hook_on_the_task_embeddings_keeps_a_model_off_the_native_kernels() -> None:
    model = tiny_model("ernie", "sequence")
    model.ernie.embeddings.task_type_embeddings.register_forward_hook(lambda *_: None)
    assert "has forward hooks" in tp.compile(model, dtype="float32").explain()
