"""The search of calibrate: its budget holds on other texts, whatever the model; what it protects, divides and says."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import token_pruning as tp
from tests.budget.test_divergence import queries_and_passages
from tests.tiny import assert_close, ragged_batch, tiny_model
from token_pruning.budget import comparison
from token_pruning.budget.comparison import _divided, likely_divergence
from token_pruning.budget.fitting import Fit, outputs_in_parts, using
from token_pruning.budget.rules import first_rules, further_rules, received_rules, spread_rules
from token_pruning.budget.schedules import schedules
from token_pruning.runtime.prune import attachment_of

SEPARATOR = 4
TARGET = 0.6
KINDS: dict[str, tuple[str, Any]] = {
    "classifier": ("sequence", None),
    "tagger": ("token", None),
    "regression": ("regression", None),
    "reranker": ("regression", None),
    "mean": ("encoder", "mean"),
    "first": ("encoder", "first"),
}


def texts(count: int, seed: int) -> dict[str, Tensor]:
    lengths = torch.randint(12, 40, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    batch = ragged_batch(lengths, seed=seed)
    ids = batch["input_ids"]
    ids[:, 0] = 3
    ids[torch.arange(count), batch["attention_mask"].sum(1) - 1] = SEPARATOR
    return batch


def pairs(queries: int, seed: int) -> dict[str, Tensor]:
    """Four passages for each query, in another order than query by query."""
    batch = queries_and_passages(queries, 4)
    ids = torch.randint(5, 200, batch["input_ids"].shape, generator=torch.Generator().manual_seed(seed))
    keep = torch.zeros_like(ids, dtype=torch.bool)
    keep[:, [0, 1, 2, 3, -1]] = True
    order = torch.arange(4 * queries).view(queries, 4).T.flatten()
    return {
        "input_ids": torch.where(keep, batch["input_ids"], ids)[order],
        "attention_mask": batch["attention_mask"][order],
    }


def calibrated(kind: str, examples: dict[str, Tensor], target: float = TARGET, **options: Any) -> tuple[Any, Any]:
    head, reads = KINDS[kind]
    model = tiny_model(head=head, layers=3)
    return model, tp.calibrate(model, examples, target, reads=reads, **options)


def relative_flops(model: Any, batch: dict[str, Tensor]) -> float:
    with torch.no_grad(), tp.record(model) as trace:
        model(**batch)
    return tp.count_flops(model, trace).relative


@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_holds_on_other_texts(kind: str) -> None:
    examples, others = (pairs(24, 0), pairs(24, 9)) if kind == "reranker" else (texts(80, 0), texts(80, 9))
    model, found = calibrated(kind, examples)
    assert found.chosen.relative_flops == pytest.approx(TARGET, abs=0.015)
    assert relative_flops(model, others) == pytest.approx(TARGET, abs=0.03)
    assert found.candidates[0] is found.chosen
    rules = {fit.rule for fit in found.candidates}
    assert any("gate" in rule for rule in rules) and any("probe" in rule for rule in rules)
    assert any(rule.startswith("attention received") for rule in rules)
    assert all(fit.divergence is not None and fit.divergence_error is not None for fit in found.candidates)
    pruner = attachment_of(model).token_pruner.pruner
    assert pruner is found.pruner and pruner.scoring_mode == "relative"
    assert (found.pruner.correction is not None) == ("corrected" in found.chosen.rule)
    assert found.pruner.correction is None or kind in ("mean", "first")


def settings(method: tp.Pruner) -> dict[str, Any]:
    """Everything about a method, tensors as lists."""
    found = {f.name: getattr(method, f.name) for f in fields(method)}
    for name, tensor in (
        ("vocabulary", "scores"),
        ("probes", "weights"),
        ("maps", "weights"),
        ("correction", "weights"),
    ):
        if found[name] is not None:
            found[name] = (repr(found[name]), getattr(found[name], tensor).tolist())
    if found["context"] is not None:
        found["context"] = (repr(found["context"]), found["context"].down.tolist(), found["context"].up.tolist())
    return found


def test_the_same_seed_gives_the_same_bits_with_or_without_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    _, silent = calibrated("mean", texts(64, 0), seed=5, progress=False)
    assert not capsys.readouterr().err
    _, shown = calibrated("mean", texts(64, 0), seed=5, progress=True)
    assert "who decides" in capsys.readouterr().err
    assert settings(silent.pruner) == settings(shown.pruner)
    assert silent.candidates == shown.candidates


def test_the_weights_and_the_mode_are_left_alone() -> None:
    model = tiny_model(head="encoder", layers=3).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tp.calibrate(model, texts(40, 0), TARGET, reads="mean")
    assert model.training and all(not parameter.grad_fn for parameter in model.parameters())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.base_model.parameters())
    tp.unprune(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_gates_every_token_enters() -> None:
    model, found = calibrated("classifier", texts(64, 0), vocabulary=False)
    assert found.pruner.vocabulary is None
    assert not any("gate" in fit.rule or fit.vocabulary_threshold for fit in found.candidates)
    assert any("probe" in fit.rule for fit in found.candidates)
    assert attachment_of(model).token_pruner.vocabulary_scores is None


def test_a_gate_is_a_gate_or_false() -> None:
    with pytest.raises(tp.ConfigError, match="vocabulary is True; it must be a VocabularyGate"):
        calibrated("classifier", texts(64, 0), vocabulary=True)


def test_where_the_caller_says_what_to_search_others_are_sorted_by_divergence() -> None:
    _, found = calibrated("classifier", texts(64, 0), search=schedules(2)[:3])
    divergences = [likely_divergence(fit) for fit in found.candidates[1:]]
    assert divergences == sorted(divergences) and len(divergences) > 2
    assert all(fit.rule == f"attention received {fit.schedule.name}" for fit in found.candidates)


def test_a_ranking_is_divided_query_by_query() -> None:
    groups = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7] * 5)
    first, second = _divided(groups, 0.7, seed=2)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(40))
    assert not set(groups[first].tolist()) & set(groups[second].tolist())
    assert len(torch.unique(groups[first])) == 5
    again, other = _divided(groups, 0.7, seed=2)[0], _divided(groups, 0.7, seed=3)[0]
    assert torch.equal(first, again) and not torch.equal(first, other)
    alone = _divided(torch.arange(40), 0.5, seed=0)
    assert sorted(torch.cat(alone).tolist()) == list(range(40)) and len(alone[0]) == 20


def test_probes_are_also_tried_after_several_layers() -> None:
    best = first_rules(5, False, ["map"])[0]
    rules = spread_rules(best, 5, (1, 2, 3, 4), pairs=False)
    assert {rule.schedule.name for rule in rules} == {
        "after 1 and 2", "after 2 and 3", "after 3 and 4", "after 1 and 2 and 3", "after 2 and 3 and 4"
    }  # fmt: skip
    assert {(rule.target, rule.gate) for rule in rules} == {
        (target, gate) for target in ("attention", "influence") for gate in (0.0, 0.25)
    }
    for rule in rules:
        assert rule.probes and rule.departed == "map" and sum(rule.schedule.weights) == pytest.approx(1)
    assert rules[0].schedule.weights == (0.5, 0.5, 0.0, 0.0, 0.0)
    _, found = calibrated("classifier", texts(64, 0))
    assert any("probe of influence after 1 and 2" in fit.rule for fit in found.candidates)


def test_every_part_of_a_search_has_whole_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    own = comparison.Comparison.part

    def part(self: Any, rows: Tensor) -> dict[str, Tensor]:
        seen.append(self.divergence.groups[rows])
        assert self.divergence.kind == "ranking"
        return own(self, rows)

    monkeypatch.setattr(comparison.Comparison, "part", part)
    monkeypatch.setattr(comparison, "_FITTING_TOKENS", 10**9)  # thresholds may be fitted to a part of a query
    calibrated("reranker", pairs(24, 0))
    assert len(seen) > 10
    for groups in seen:
        assert set(torch.unique(groups, return_counts=True)[1].tolist()) == {4}


def test_a_query_is_protected_by_whatever_is_tried_for_rankings() -> None:
    layers, departed = 5, ["state"]
    rules = first_rules(layers, True, departed)  # type: ignore[arg-type]
    assert all("first_segment" in rule.protect for rule in rules)
    assert {rule.received_from for rule in rules} == {"all", "first_segment"}
    more = further_rules(rules[0], layers, (1, 2), departed, pairs=True)  # type: ignore[arg-type]
    more += spread_rules(rules[0], layers, (1, 2), pairs=True)
    assert {(rule.probes, rule.received_from) for rule in more[-4:]} == {(True, "all"), (False, "first_segment")}
    assert {rule.target for rule in [*rules, *more]} == {"attention"}  # influence misleads there
    assert more and all("first_segment" in rule.protect for rule in more)
    model, found = calibrated("reranker", pairs(24, 0))
    assert all("first_segment" in fit.pruner.protect for fit in found.candidates)
    batch = pairs(24, 9)
    for fit in found.candidates[:3]:
        with using(model, fit.pruner), torch.no_grad(), tp.record(model) as trace:
            model(**batch)
        assert bool((trace.survived_layers[0][:3] == 3).all())


def test_a_query_may_leave_where_the_budget_is_too_small_for_it() -> None:
    batch = pairs(24, 0)
    everything = torch.arange(batch["input_ids"].shape[1])
    batch = {name: values[:, [0, 1, 1, 1, 1, *everything[2:6], -1]] for name, values in batch.items()}
    _, found = calibrated("reranker", batch, 0.45)
    assert found.chosen.relative_flops < 0.47
    assert not found.pruner.protect


def test_attention_received_is_tried_as_published() -> None:
    for rule in received_rules(schedules(4)):
        assert (rule.gate, rule.probes, rule.received_from, rule.protect, rule.departed) == (
            0,
            False,
            "all",
            (),
            "state",
        )


def test_long_texts_are_pruned_after_what_enters_is_chosen() -> None:
    for options in ({"max_tokens": 24}, {"max_tokens": 24, "chunks": True}):
        model, found = calibrated("mean", texts(48, 0), **options)
        assert (found.pruner.max_tokens, found.pruner.chunks) == (24, options.get("chunks", False))
        with torch.no_grad():
            assert model(**texts(8, 3)).last_hidden_state.isfinite().all()


def test_a_fit_gives_back_the_method_it_was_made_for() -> None:
    _, found = calibrated("mean", texts(64, 0))
    for fit in found.candidates:
        assert isinstance(fit, Fit) and fit.method is not None
        assert fit.pruner.thresholds == fit.thresholds
        for name in ("vocabulary", "probes", "maps", "context", "correction", "protect", "received_from", "departed"):
            assert getattr(fit.pruner, name) == getattr(fit.method, name)


@pytest.mark.parametrize("kind", ["mean", "reranker"])
def test_what_is_said_of_a_candidate_is_what_its_thresholds_do(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[tuple[Any, Any, Tensor, Tensor]] = []
    own = comparison.Comparison._judged

    def judge(self: Any, fit: Fit, rows: Tensor, dense: Tensor) -> Fit:
        with using(self.model, fit.pruner):
            fresh = outputs_in_parts(self.model, self.part(rows))
        found, again = own(self, fit, rows, dense), own(self, replace(fit, outputs=None), rows, dense)
        judged.append((found, again, fresh if fit.outputs is None else fit.outputs, fresh))
        return found

    monkeypatch.setattr(comparison.Comparison, "_judged", judge)
    calibrated(kind, pairs(24, 0) if kind == "reranker" else texts(80, 0))
    assert len(judged) > 10 and any(outputs is not fresh for _, _, outputs, fresh in judged)
    for found, again, outputs, fresh in judged:
        assert_close(outputs, fresh, 1e-6)
        assert found.relative_flops_held_out == pytest.approx(again.relative_flops_held_out)
        assert found.divergence == pytest.approx(again.divergence, abs=1e-6)
