"""A method and a family of somebody else's, as the pages in docs/ show them, through everything a user can do."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import token_pruning as tp
from tests.pages import blocks
from tests.tiny import POSITIONS, VOCABULARY, assert_close, assert_equal, outputs, ragged_batch, tiny_model

LENGTHS = [12, 30, 7, 21]
pytestmark = pytest.mark.usefixtures("nothing_stays_registered")


def defined_by(page: str, longest: int) -> dict[str, Any]:
    """What the page's first block defines: all there is to write."""
    code, *_ = blocks(page, "python")
    assert len([line for line in code.splitlines() if line.strip()]) < longest
    names: dict[str, Any] = {"__name__": "somebody_elses"}
    exec(code, names)
    return names


def roformer(auto: Any = hf.AutoModelForSequenceClassification, **overrides: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "num_labels": 3, "embedding_size": 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = hf.RoFormerConfig(**{**sizes, "initializer_range": 0.3, **overrides})
        return auto.from_config(config).eval()


def everything(model: Any, pruner: tp.Pruner, folder: Path) -> None:
    """Prune, record, count, train a step, save, load, compile, calibrate, and take it all off again."""
    batch = ragged_batch(LENGTHS)
    with torch.no_grad():
        dense = model(**batch).logits
        tp.prune(model, pruner)
        with tp.record(model) as trace:
            found = model(**batch).logits
    assert (trace.ffn_lengths[-1] < torch.tensor(LENGTHS)).all()
    assert tp.count_flops(model, trace).relative < 0.95

    model.save_pretrained(folder)
    loaded = tp.from_pretrained(folder)
    with torch.no_grad():
        assert_close(loaded(**batch).logits, found, 1e-5)
    assert_close(tp.compile(model, dtype="float32")(**batch).logits, found)

    tp.unprune(model)
    with torch.no_grad():
        assert_equal(model(**batch).logits, dense)
    calibration = tp.calibrate(model, ragged_batch([9, 14, 22, 30] * 10, seed=1), target_flops=0.7)
    assert abs(calibration.chosen.relative_flops - 0.7) < 0.05
    with torch.no_grad():
        assert_close(tp.compile(model, dtype="float32")(**batch).logits, model(**batch).logits)

    tp.unprune(model)
    tp.prune(model, pruner).train()
    model(**batch, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if p.requires_grad and "pooler" not in name]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    tp.unprune(model)


def test_the_method_of_the_page(tmp_path: Path) -> None:
    method = defined_by("docs/add-a-method.md", 40)["AttentionMass"]
    everything(tiny_model(), method(mass=0.7), tmp_path)
    with pytest.raises(tp.ConfigError, match="mass is 2"):
        method(mass=2)


def test_the_method_keeps_the_fewest_tokens_that_hold_the_mass() -> None:
    method = defined_by("docs/add-a-method.md", 40)["AttentionMass"]
    model = tp.prune(tiny_model(), method(mass=0.6))
    with tp.record(model) as trace, torch.no_grad():
        model(**ragged_batch(LENGTHS))
    record = trace.passes[0].layers[1]
    assert record.scores is not None and record.kept_rows is not None
    for sequence in range(len(LENGTHS)):
        rows = (record.entering.sequence_ids == sequence).nonzero().flatten()
        kept = record.kept_rows[record.entering.sequence_ids[record.kept_rows] == sequence]
        scores = record.scores[rows].sort(descending=True).values
        fewest = int((scores.cumsum(0) < 0.6 * scores.sum()).sum()) + 1
        assert len(kept) in (fewest, fewest + 1)  # the first token stays besides


def test_the_family_of_the_page(tmp_path: Path) -> None:
    defined_by("docs/add-a-family.md", 70)
    everything(roformer(), tp.TopK(token_keep_rate=0.3, keep_all_layers=1), tmp_path)


@pytest.mark.parametrize(
    "auto", [hf.AutoModel, hf.AutoModelForSequenceClassification, hf.AutoModelForTokenClassification,
             hf.AutoModelForQuestionAnswering, hf.AutoModelForMaskedLM],
)  # fmt: skip
def test_the_family_is_the_dense_model_and_its_own_reference(auto: Any) -> None:
    defined_by("docs/add-a-family.md", 70)
    model, batch = roformer(auto), ragged_batch(LENGTHS)
    left = ragged_batch(LENGTHS, left=True)
    pruner = tp.TopK(token_keep_rate=0.3, keep_all_layers=1)

    def states(batch: Any) -> dict[str, torch.Tensor]:
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            found = outputs(model(**batch))
        return {name: x[mask] if x.shape[:2] == mask.shape else x for name, x in found.items()}

    dense = states(batch)
    tp.prune(model, tp.Unpruned())
    for name, value in states(batch).items():
        assert_close(value, dense[name], 1e-5, name)
    tp.unprune(model)
    tp.prune(model, pruner, execution="masked")
    reference = states(batch)
    tp.unprune(model)
    tp.prune(model, pruner)
    for name, value in states(batch).items():
        assert_close(value, reference[name], 1e-5, name)
    for name, value in states(left).items():
        assert_close(value, reference[name], 1e-5, f"{name} with padding on the left")


@torch.no_grad()
def test_the_family_says_how_keys_turn() -> None:
    family = defined_by("docs/add-a-family.md", 70)["RoFormer"](roformer(hf.AutoModel))
    layer, rows, positions = family.layers[1], torch.randn(3, 32), torch.tensor([0, 7, 2])
    _, turned, _ = family.project(layer, rows, positions, None)
    _, standing, _ = family.project(layer, rows, 0 * positions, None)
    assert family.can_guess_keys and (turned - standing)[1:].abs().max() > 0.1
    assert_close(family.turned(layer, standing, positions), turned)
    assert_close(family.turned(layer, turned, positions, back=True), standing)


def test_the_family_refuses_what_it_cannot_do() -> None:
    defined_by("docs/add-a-family.md", 70)
    with pytest.raises(tp.UnsupportedModelError, match="rotary_value"):
        tp.prune(roformer(rotary_value=True), tp.Unpruned())
