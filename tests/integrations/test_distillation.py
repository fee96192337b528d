"""Models of sentence-transformers trained to give what they gave unpruned."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from torch import nn

import token_pruning as tp
from tests.integrations.test_sentence_transformers import embedder, ranker
from tests.integrations.test_sentence_transformers import home as home  # a fixture
from tests.integrations.test_sentence_transformers import texts as some_texts
from tests.tiny import tiny_model
from token_pruning.budget import comparison, distillation, holding
from token_pruning.budget.examples import as_batch
from token_pruning.budget.holding import CalibratedHolder
from token_pruning.budget.queries import drawn_queries
from token_pruning.integrations.sentence_transformers.distilling import RankingLoss, VectorLoss, neighbours
from token_pruning.runtime.adapters import adapter_of
from token_pruning.runtime.prune import attachment_of, is_pruned

TEXTS = some_texts(160, 40, seed=3)
PAIRS = [(query, passage) for query in some_texts(30, 8, seed=1) for passage in some_texts(6, seed=len(query))]
SHORT: dict[str, Any] = {"examples": 48, "learning_rate": 1e-4, "batch_size": 16, "progress": False}


@pytest.fixture(autouse=True)
def _quick_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is slow in a search left out."""
    monkeypatch.setattr(comparison, "further_rules", lambda *_: [])


def vectors_of(model: Any) -> Any:
    return model.encode(TEXTS[:40], normalize_embeddings=True)


def test_an_embedding_model_comes_nearer_to_what_it_was(home: Path, tmp_path: Path) -> None:
    model = embedder(home)
    found = tp.distill(model, some_texts(400, 40, seed=3), 0.5, epochs=4, **{**SHORT, "examples": 100})
    assert found.calibration is not None
    assert found.divergence < found.divergence_before
    assert found.relative_flops == pytest.approx(0.5, abs=0.02)
    assert not any(isinstance(value, nn.Parameter) for value in attachment_of(model).token_pruner.parameters())

    model.save_pretrained(str(tmp_path / "E"))
    loaded = tp.from_pretrained(tmp_path / "E")
    assert vectors_of(loaded) == pytest.approx(vectors_of(model), abs=1e-6)
    stock = SentenceTransformer(str(tmp_path / "E"), device="cpu")
    tp.unprune(model)
    assert vectors_of(model) == pytest.approx(vectors_of(stock), abs=1e-6)
    card = (tmp_path / "E" / "README.md").read_text(encoding="utf-8")
    assert not any(text in card for text in TEXTS if len(text) > 9)


def test_a_reranker_comes_nearer_to_what_it_was(home: Path, tmp_path: Path) -> None:
    model = ranker(home)
    with torch.no_grad():  # scores that differ
        model[0].model.classifier.weight.mul_(20)
    dense, untrained = copy.deepcopy(model), copy.deepcopy(model)
    found = tp.distill(model, PAIRS, 0.5, epochs=4, **SHORT)
    assert found.relative_flops == pytest.approx(0.5, abs=0.02)
    assert found.calibration is not None
    tp.prune(untrained, found.calibration.pruner)
    kept = PAIRS[:40]
    wanted, before, scores = (each.predict(kept, activation_fn=nn.Identity()) for each in (dense, untrained, model))
    assert np.square(scores - wanted).mean() < np.square(before - wanted).mean()
    assert np.corrcoef(wanted, scores)[0, 1] > 0.8
    model.save_pretrained(str(tmp_path / "R"))
    assert tp.from_pretrained(tmp_path / "R").predict(kept) == pytest.approx(model.predict(kept), abs=1e-6)


def test_the_same_seed_gives_the_same_weights(home: Path) -> None:
    runs = []
    for seed in (1, 1, 2):
        model = embedder(home)
        tp.distill(model, TEXTS, 0.6, seed=seed, **SHORT)
        runs.append(vectors_of(model))
    assert (runs[0] == runs[1]).all() and (runs[0] != runs[2]).any()


def test_a_calibrated_model_keeps_its_cost_and_its_dropout(home: Path) -> None:
    model = embedder(home)
    model.eval()
    own = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    tp.calibrate(model, TEXTS, target_flops=0.55)
    pruner = attachment_of(model).token_pruner.pruner
    found = tp.distill(model, TEXTS, **SHORT)
    assert found.calibration is None
    assert found.relative_flops == pytest.approx(0.55, abs=0.05)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == own and max(own) > 0
    assert not model.training
    now = attachment_of(model).token_pruner.pruner
    assert now.config().keys() == pruner.config().keys()
    assert (now.departed, now.protect, now.vocabulary_threshold) == (
        pruner.departed, pruner.protect, pruner.vocabulary_threshold,
    )  # fmt: skip


@pytest.mark.parametrize("rate", [2e-4, 0.5])
def test_training_that_does_harm_says_so(rate: float, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = tp.distill(embedder(home), TEXTS, 0.6, epochs=2, **SHORT | {"learning_rate": rate})
    harmed = found.divergence > found.divergence_before
    assert harmed is (rate == 0.5)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == harmed
    assert all(f"{found.divergence:.4f}" in each and f"{found.divergence_before:.4f}" in each for each in said)


def test_maps_and_corrections_learn(home: Path) -> None:
    model = embedder(home)
    weights = torch.randn(1, 32, 33) * 0.1
    correction = torch.cat([torch.eye(32), torch.zeros(32, 1)], 1)
    method = tp.FixedThreshold(
        thresholds=[0.0, 0.9, 0.0], scoring_mode="relative", departed="map",
        maps=tp.DepartureMaps([2], weights), correction=tp.Correction(correction),
    )  # fmt: skip
    tp.prune(model, method)
    teacher = embedder(home)
    found = tp.distill(model, TEXTS, teacher=teacher, **SHORT)
    assert found.divergence < found.divergence_before
    token_pruner = attachment_of(model).token_pruner
    for tensor, said, first in (
        (token_pruner.map_weights, token_pruner.pruner.maps.weights, weights),
        (token_pruner.correction_weights, token_pruner.pruner.correction.weights, correction),
    ):
        assert (tensor == said).all() and (tensor != first).any() and not tensor.requires_grad


@pytest.mark.parametrize("departed", ["survivors", "state"])
def test_context_learns(home: Path, departed: Any, tmp_path: Path) -> None:
    """And is a buffer before and afterwards, which the weights of what was saved have."""
    model, teacher = embedder(home), embedder(home)
    rng = torch.Generator().manual_seed(0)
    context = tp.LinearContext(
        [0, 1, 3], torch.randn(3, 5, 33, generator=rng) / 6, torch.randn(3, 64, 6, generator=rng) / 5**0.5
    )
    gate = tp.VocabularyGate(torch.rand(200, generator=rng), 0.2)
    method = tp.FixedThreshold(
        thresholds=[0.5, 0.5, 0.0], scoring_mode="relative", departed=departed, vocabulary=gate, context=context
    )
    tp.prune(model, method)
    token_pruner = attachment_of(model).token_pruner
    buffers = {name for name, _ in token_pruner.named_buffers()}
    found = tp.distill(model, TEXTS, teacher=teacher, epochs=2, **SHORT)
    assert found.divergence < found.divergence_before
    assert attachment_of(model).token_pruner is token_pruner
    assert {name for name, _ in token_pruner.named_buffers()} == buffers and not [*token_pruner.parameters()]
    learned = token_pruner.pruner.context
    assert learned is not None and learned.layers == (0, 1, 3)
    for tensor, said, first in (
        (token_pruner.context_down, learned.down, context.down),
        (token_pruner.context_up, learned.up, context.up),
    ):
        assert type(tensor) is torch.Tensor and not tensor.requires_grad and tensor.dtype == torch.float32
        assert torch.equal(tensor, said) and tensor.shape == first.shape
    down, up = learned.down - context.down, learned.up - context.up
    assert (down[:2].abs().amax((1, 2)) > 0).all() and (up.abs().amax((1, 2)) > 0).all()
    assert (down[2] == 0).all()  # after the last layer nobody attends to anybody
    assert torch.equal(token_pruner.vocabulary_scores, gate.scores)
    fast = tp.compile(model, dtype="float32")
    assert vectors_of(fast) == pytest.approx(vectors_of(model), abs=1e-4)
    model.save_pretrained(str(tmp_path))
    assert vectors_of(tp.from_pretrained(tmp_path)) == pytest.approx(vectors_of(model), abs=1e-6)


def test_a_calibrated_model_with_context_is_distilled(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "received_rules", lambda *_: [])
    model = embedder(home)
    found = tp.distill(model, some_texts(400, 40, seed=3), 0.6, **{**SHORT, "examples": 100})
    assert found.calibration is not None and "as context" in found.calibration.chosen.rule
    assert found.relative_flops == pytest.approx(0.6, abs=0.02)
    first, learned = found.calibration.pruner.context, attachment_of(model).token_pruner.pruner.context
    assert first is not None and learned is not None and learned.layers == first.layers
    assert not torch.equal(learned.up, first.up) and not torch.equal(learned.down, first.down)
    assert not [*attachment_of(model).token_pruner.parameters()]


def test_vectors_are_compared_as_written_out() -> None:
    torch.manual_seed(0)
    found, wanted = torch.randn(6, 7), torch.randn(6, 7)
    loss = VectorLoss(lambda features: {"sentence_embedding": features["rows"]})
    labels = torch.cat([wanted[:3], wanted[3:]], 1)
    value = float(loss([{"rows": found[:3]}, {"rows": found[3:]}], labels))

    def cosine(x: Any, y: Any) -> float:
        return float(x @ y / x.norm() / y.norm())

    total = sum(1 - cosine(x, y) for x, y in zip(found, wanted, strict=True)) / 6
    for i in range(6):
        for j in range(6):
            if i != j:
                dense = cosine(wanted[i], wanted[j])
                total += (cosine(wanted[i], found[j]) - dense) ** 2 / 6 / 2
                total += (cosine(found[i], found[j]) - dense) ** 2 / 6 / 2
    assert value == pytest.approx(total, rel=1e-4)
    one = float(loss([{"rows": found[:1]}], wanted[:1]))
    assert one == pytest.approx(1 - cosine(found[0], wanted[0]), rel=1e-5)


def test_near_texts_are_learned_together() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 16, generator=generator)
    vectors = torch.cat([centres, 3 * centres + 0.01 * torch.randn(40, 16, generator=generator)])
    pairs = neighbours(vectors)
    assert sorted(pairs.flatten().tolist()) == list(range(80))
    assert all(other == one + 40 for one, other in pairs.tolist())
    assert sorted(neighbours(torch.ones(31, 4)).flatten().tolist()) != []
    assert len(neighbours(torch.ones(31, 4))) == 15


def test_rankings_are_compared_as_written_out() -> None:
    class Model(nn.Module):
        def preprocess(self, pairs: Any, **_: Any) -> Any:
            assert pairs == [("a", "x"), ("a", "y"), ("b", "z")]
            return {"input_ids": torch.zeros(3, 1)}

        def forward(self, features: Any) -> Any:
            return {"scores": torch.tensor([[1.0], [2.0], [0.5]])}

    labels = [torch.tensor([3.0, 1.0]), torch.tensor([1.0])]
    loss = RankingLoss(Model(), 2.0)([["a", "b"], [["x", "y"], ["z"]]], labels)
    squares = ((1 - 3) ** 2 + (2 - 1) ** 2 + (0.5 - 1) ** 2) / 4 / 3
    dense, pruned = torch.tensor([1.5, 0.5]).softmax(0), torch.tensor([0.5, 1.0]).softmax(0)
    assert float(loss) == pytest.approx(squares + float((dense * (dense / pruned).log()).sum()) / 2, rel=1e-5)


def test_probes_and_thresholds_follow_the_weights(home: Path) -> None:
    dense = embedder(home)[0].model
    pruned = copy.deepcopy(dense)
    probes = tp.Probes([1, 2], torch.randn(2, 33, generator=torch.Generator().manual_seed(0)))
    method = tp.FixedThreshold(
        thresholds=[-0.5, 0.5, 0.0], scoring_mode="relative", probes=probes, departed="survivors", prune_layers=[1, 2]
    )
    tp.prune(pruned, method, reads="mean")
    batch = as_batch(adapter_of(model := embedder(home)).tokenized(model, some_texts(64, 40), whole=False), 0)
    holder = CalibratedHolder(pruned, dense, batch, 0.6, False)
    attachment = attachment_of(pruned)

    def scores() -> Any:
        with tp.record(pruned) as trace, torch.no_grad():
            pruned(**{name: batch[name] for name in ("input_ids", "attention_mask")})
        return trace.passes[0].layers[1].scores

    first = scores()
    fit = holder.fit(pruned)
    assert fit is not None and fit.relative_flops == pytest.approx(0.6, abs=0.01)
    assert scores() == pytest.approx(first, abs=2e-2)  # nothing has moved yet
    with torch.no_grad():
        for parameter in attachment.family.layers[0].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    moved = (scores() - first).square().mean()
    fit = holder.fit(pruned)
    assert fit is not None and fit.relative_flops == pytest.approx(0.6, abs=0.01)
    assert (scores() - first).square().mean() < moved / 2
    assert (attachment.token_pruner.pruner.probes.weights == attachment.token_pruner.probe_weights).all()
    kept = holder.state()["attributes"]
    assert kept["probes"] == probes.weights.tolist() and len(kept["schedule"]["weights"]) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": TEXTS[:63]}, "63 texts were given; distillation needs at least 64"),
        ({"texts": PAIRS}, r"texts\[0\] is .*; this model takes single texts"),
        ({"texts": "text"}, "texts is a str; it must be a list"),
        ({"target_flops": None}, "target_flops is missing"),
        ({"target_flops": 0.01}, "target_flops is 0.01; the lowest that can be reached"),
        ({"teacher": "R"}, "teacher is a CrossEncoder; it must be a SentenceTransformer that is not pruned"),
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": -1}, "learning_rate is -1"),
        ({"examples": 3}, "examples is 3"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_distilled(home: Path, change: dict[str, Any], message: str) -> None:
    model = embedder(home)
    given: dict[str, Any] = {"texts": TEXTS, "target_flops": 0.6, **SHORT, **change}
    if given.get("teacher") == "R":
        given["teacher"] = ranker(home)
    with pytest.raises(tp.ConfigError, match=message):
        tp.distill(model, given.pop("texts"), given.pop("target_flops"), **given)


def test_models_that_cannot_be_distilled(home: Path) -> None:
    with pytest.raises(tp.UnsupportedModelError, match=r"this is a BertForSequenceClassification. Classifiers are"):
        tp.distill(tiny_model(), TEXTS, 0.6)
    with pytest.raises(tp.ConfigError, match=r"texts\[0\] is .*; this model takes pairs"):
        tp.distill(ranker(home), TEXTS, 0.6)
    with pytest.raises(tp.UnsupportedModelError, match="this CrossEncoder has 3 outputs; distill trains those with"):
        tp.distill(CrossEncoder(str(home / "classifier"), device="cpu"), PAIRS, 0.6, **SHORT)
    model = tp.prune(embedder(home), tp.LearnedThreshold())
    with pytest.raises(tp.ConfigError, match="what calibrate leaves can hold a budget"):
        tp.distill(model, TEXTS, 0.6, **SHORT)

    tp.prune(model := embedder(home), tp.FixedThreshold(thresholds=[0.001, 0.005, 0.007]))
    with pytest.raises(tp.ConfigError, match="thresholds are in scoring mode 'mean'; what calibrate leaves is in"):
        tp.distill(model, TEXTS, **SHORT)
    with pytest.raises(tp.ConfigError, match="teacher gives vectors of 24 numbers; the model's have 32"):
        tp.distill(embedder(home, tail=False), TEXTS, 0.6, teacher=embedder(home), **SHORT)


@pytest.mark.parametrize("run", [tp.calibrate, partial(tp.distill, **SHORT)])
def test_a_ranking_needs_several_queries(run: Any, home: Path) -> None:
    pairs = [("w1 w2", passage) for passage in some_texts(70, 30)]
    with pytest.raises(tp.ConfigError, match="are of 1 queries"):
        run(ranker(home), pairs, 0.6)


def test_a_calibrated_model_that_costs_more_on_other_texts_is_trained(
    home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own calibration on a part of them; only a method that was given has to hold a budget."""
    monkeypatch.setattr(CalibratedHolder, "fit", lambda self, model: None)
    monkeypatch.setattr(distillation, "_FAR", -1.0)
    found = tp.distill(embedder(home), TEXTS, 0.6, **SHORT)
    assert found.calibration is not None
    assert "on the 48 texts that are kept out of training the calibrated model costs 0." in caplog.text


def test_a_model_that_cannot_be_trained_is_dense_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedder(home)
    before = vectors_of(model)

    def fails(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(CalibratedHolder, "fit", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        tp.distill(model, TEXTS, 0.6, **SHORT)
    assert not is_pruned(model[0].model) and (vectors_of(model) == before).all()


def test_a_model_that_truncates_its_vectors(home: Path) -> None:
    model = SentenceTransformer(modules=list(embedder(home, tail=False)), device="cpu", truncate_dim=16)
    tp.distill(model, TEXTS, 0.6, **SHORT)
    assert vectors_of(model).shape[1] == 16
    loss, labels = VectorLoss(lambda x: x), torch.randn(6, 2 * 16)
    long = [{"sentence_embedding": torch.randn(6, 32)} for _ in range(2)]
    short = [{"sentence_embedding": each["sentence_embedding"][:, :16]} for each in long]
    assert float(loss(long, labels)) == pytest.approx(float(loss(short, labels)))


def test_a_reranker_learns_from_queries_that_are_drawn_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    own = adapter_of(ranker(home))
    distilling = type(own).distilling

    def noted(self: Any, model: Any, texts: Any, *args: Any, **options: Any) -> Any:
        seen.append(texts)
        assert options["arguments"]["learning_rate"] == 1e-4  # the default of a reranker
        return distilling(self, model, texts, *args, **options)

    monkeypatch.setattr(type(own), "distilling", noted)
    tp.distill(ranker(home), PAIRS, 0.6, **SHORT | {"learning_rate": None})
    [texts] = seen
    asked = {query for query, _ in PAIRS}
    real = [pair for pair in texts if pair[0] in asked]
    assert set(real) < set(PAIRS) and texts == real + drawn_queries(real, 0) and len(texts) > 1.5 * len(real)


def test_a_rule_that_cannot_hold_the_budget_is_refused(home: Path) -> None:
    model = embedder(home)
    probes = tp.Probes([2], torch.randn(1, 33, generator=torch.Generator().manual_seed(0)))
    method = tp.FixedThreshold(thresholds=[0.0, 0.0, 0.0], scoring_mode="relative", probes=probes, prune_layers=[2])
    tp.prune(model, method)
    before = attachment_of(model).token_pruner.thresholds.tolist()
    with pytest.raises(
        tp.ConfigError, match=r"target_flops is 0.3; what this model is pruned by costs 0\.[5-9]\d+, what"
    ):
        tp.distill(model, TEXTS, 0.3, **SHORT)
    assert attachment_of(model).token_pruner.thresholds.tolist() == before


def test_refits_look_at_some_of_the_texts_and_the_last_at_all(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "_REFIT_TOKENS", 100)
    monkeypatch.setattr(holding.BudgetHolder, "refits", 3)
    seen: list[int] = []
    fit = CalibratedHolder.fit

    def watched(self: Any, model: Any) -> Any:
        seen.append(len(self.batch["input_ids"]))
        return fit(self, model)

    monkeypatch.setattr(CalibratedHolder, "fit", watched)
    tp.distill(embedder(home), some_texts(300, 40, seed=3), 0.6, **{**SHORT, "examples": 90})
    assert seen == [64] * 4 + [90]  # one before training, three during it
