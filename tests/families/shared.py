"""What the tests of families have in common: models, batches, and comparisons at valid tokens."""

from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor

import token_pruning as tp
from tests.tiny import (
    EVERY_FAMILY,
    LONGEST,
    MORE_HEADS,
    assert_close,
    outputs,
    pruned,
    ragged_batch,
    same_survivors,
    tiny_config,
    tiny_model,
)
from token_pruning.families import shape_of

ALL_HEADS = {name: auto for name, auto in MORE_HEADS.items() if name != "regression"}
ALL_HEADS["next_sentence"] = hf.AutoModelForNextSentencePrediction
CASES = [
    (family, head)
    for family in EVERY_FAMILY
    for head, auto in ALL_HEADS.items()
    if type(tiny_config(family)) in auto._model_mapping
]
_POOLING_OTHERWISE = (("eurobert", "sequence"), ("modernbert", "multiple_choice"))
READING_FIRST = [
    (family, head)
    for family, head in CASES
    if head in ("sequence", "multiple_choice", "next_sentence") and (family, head) not in _POOLING_OTHERWISE
]
PRUNERS: dict[str, tp.Pruner] = {
    "relative": tp.RelativeThreshold(token_threshold=0.4),
    "topk": tp.TopK(token_keep_rate=0.3),
    "fixed": tp.FixedThreshold(final_token_threshold=1.1, scoring_mode="relative", summary_tokens="segment"),
}


def model_of(family: str, head: str, **settings: Any) -> Any:
    """A tiny model whose biases and norms are not what Hugging Face starts them with, zeros and ones."""
    if head == "next_sentence":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = ALL_HEADS[head].from_config(tiny_config(family, **settings)).eval()
    else:
        model = tiny_model(family, head, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


kept_model = cache(model_of)
"""For tests that leave the model as they found it."""


def without_dropout(family: str) -> dict[str, Any]:
    """Settings."""
    return {name: 0.0 for name in tiny_config(family).to_dict() if "dropout" in name}


def batch_of(family: str, head: str = "encoder", lengths: tuple[int, ...] = (), **options: Any) -> dict[str, Tensor]:
    """Ragged, with sequences of one token, of two and of as many as the model takes, in two segments.

    Token types are given where there are any. For multiple choice the sequences are choices of two examples, or of one.
    """
    lengths = lengths or (30, 1, LONGEST[family], 2)
    batch = ragged_batch(lengths, family=family, **options)
    for row, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        tokens = row[mask]
        tokens[len(tokens) // 2] = tokens[-1]  # the separator
        row[mask] = tokens
    if tiny_config(family).to_dict().get("type_vocab_size", 0) > 1:
        batch["token_type_ids"] = batch["input_ids"] % 2
    if head != "multiple_choice":
        return batch
    return {name: x.view(1 + (len(lengths) % 2 == 0), -1, x.shape[1]) for name, x in batch.items()}


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
        largest = value.abs().max().item() if value.numel() else 0.0
        assert_close(actual[name], value, relative * max(1.0, largest), f"{message} {name}")


def zero_thresholds(model: Any) -> tp.Pruner:
    layers = shape_of(model.config).num_layers
    return tp.FixedThreshold(thresholds=[0.0] * layers, scoring_mode="relative")


def assert_dense(model: Any, batch: dict[str, Tensor], relative: float = 2e-5) -> None:
    """Nothing dropped is Hugging Face's own model."""
    with torch.no_grad():
        expected = valid(model(**batch), batch)
    zeros = zero_thresholds(model)
    for pruner, execution in ((tp.Unpruned(), "packed"), (zeros, "packed"), (zeros, "masked")):
        output, _ = run(model, pruner, batch, execution)
        assert_same(valid(output, batch), expected, relative, f"{pruner} {execution}")


def assert_packed_equals_masked(model: Any, batch: dict[str, Tensor], pruner: tp.Pruner) -> tuple[Any, tp.Trace]:
    """With real drops; what is returned is the packed run's."""
    packed, trace = run(model, pruner, batch)
    masked, masked_trace = run(model, pruner, batch, "masked")
    assert same_survivors(trace, masked_trace)
    left = trace.ffn_lengths[-1].sum() / batch["attention_mask"].sum()
    assert 0.02 < left < 0.9, f"{left} left"
    assert_same(valid(packed, batch), valid(masked, batch), 2e-5)
    return packed, trace
