"""Images instead of texts: ViT and DeiT."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import token_pruning as tp
from tests.families.shared import PRUNERS, assert_same, run, zero_thresholds
from tests.tiny import assert_equal, outputs, pruned, same_survivors, tiny_config
from token_pruning.runtime.prune import reads_of

MODELS = {
    "vit": hf.ViTModel,
    "vit classifier": hf.ViTForImageClassification,
    "vit painter": hf.ViTForMaskedImageModeling,
    "deit": hf.DeiTModel,
    "deit classifier": hf.DeiTForImageClassification,
    "deit with a teacher": hf.DeiTForImageClassificationWithTeacher,
}
FIRST = ("vit classifier", "deit classifier")


def model_of(name: str, **settings: Any) -> Any:
    """A tiny model whose biases and norms are not what Hugging Face starts them with."""
    torch.manual_seed(0)
    model = MODELS[name](tiny_config(name.split()[0], encoder_stride=4, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape)
    return model


def images(size: int = 32, count: int = 3) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("name", MODELS)
def test_nothing_dropped_equals_hugging_face(name: str) -> None:
    model = model_of(name)
    inputs = [images(), {**images(48), "interpolate_pos_encoding": True}]
    if name.endswith("painter"):
        inputs = [{**images(), "bool_masked_pos": torch.arange(64).expand(3, -1) % 5 == 0}]
    if name == "vit":
        inputs.append({**images(), "attention_mask": (torch.arange(65) < torch.tensor([65, 20, 1])[:, None]).long()})
    for batch in inputs:
        mask = batch.get("attention_mask", torch.ones(1, 1)).bool()
        with torch.no_grad():
            expected = outputs(model(**batch))
        for pruner in (tp.Unpruned(), zero_thresholds(model)):
            actual = outputs(run(model, pruner, batch)[0])
            for found in (actual, expected):  # states of what is masked are nobody's
                if "attention_mask" in batch:
                    found["last_hidden_state"] = found["last_hidden_state"] * mask[..., None]
            assert_same(actual, expected, 2e-5)
    assert reads_of(model) == ("first" if name in FIRST else "all")


@pytest.mark.parametrize("method", PRUNERS)
@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_masked_and_images_one_by_one(name: str, method: str) -> None:
    model, batch = model_of(name), images()
    packed, trace = run(model, PRUNERS[method], batch)
    masked, masked_trace = run(model, PRUNERS[method], batch, "masked")
    assert same_survivors(trace, masked_trace)
    assert trace.ffn_lengths[-1].sum() < 0.9 * 3 * 65
    assert_same(outputs(packed), outputs(masked), 1e-5)
    for row in range(3):
        alone, _ = run(model, PRUNERS[method], {"pixel_values": batch["pixel_values"][row : row + 1]})
        assert_same(outputs(alone), {name: x[row : row + 1] for name, x in outputs(packed).items()}, 1e-5)


@pytest.mark.parametrize("method", ["relative", "learned"])
@pytest.mark.parametrize("name", ["vit classifier", "deit with a teacher"])
def test_gradients_of_packed_and_masked_are_the_same(name: str, method: str) -> None:
    found = []
    for execution in ("packed", "masked"):
        model = model_of(name)
        pruner = PRUNERS.get(method) or tp.LearnedThreshold(temperature=0.05, max_seq_length=80)
        tp.prune(model, pruner, execution=execution).train()  # type: ignore[arg-type]
        model(**images()).logits.square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    packed, masked = found
    assert_same(packed, masked, 2e-4)
    assert any("patch_embeddings" in name for name in packed)


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_flops_equal_the_products_really_computed(name: str) -> None:
    """But for those that embed the patches."""
    model = model_of(name, attn_implementation="eager")
    model.pooler = None
    embedding = 2 * 64 * 32 * (3 * 4 * 4)
    with FlopCounterMode(display=False) as dense:
        model(**images(count=1))
    tp.prune(model, PRUNERS["relative"])
    with FlopCounterMode(display=False) as counter, tp.record(model) as trace:
        model(**images(count=1))
    flops = tp.count_flops(model, trace)
    assert flops.dense == dense.get_total_flops() - embedding
    assert flops.pruned == counter.get_total_flops() - embedding
    assert flops.pruned < 0.95 * flops.dense


def test_unprune_restores_the_model() -> None:
    model = model_of("vit classifier")
    with torch.no_grad():
        expected = model(**images()).logits
        with pruned(model, PRUNERS["topk"]):
            assert not torch.equal(model(**images()).logits, expected)
        assert_equal(model(**images()).logits, expected)


def test_what_images_have_no_use_for_is_refused() -> None:
    model = model_of("vit classifier")
    with pytest.raises(tp.UnsupportedModelError, match="takes pixel_values"):
        tp.compile(model)
    with pytest.raises(tp.ConfigError, match="vocabulary has 0 entries"):
        tp.prune(model, tp.TopK(vocabulary=tp.VocabularyGate(torch.ones(9))))
    with pytest.raises(tp.ConfigError, match="pixel_values is missing"):
        tp.prune(model, tp.Unpruned())()
