"""One checkpoint for several budgets: what each costs, what is between, where the table is kept, and the engine."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import token_pruning as tp
from tests.budget.test_search import calibrated, pairs, relative_flops, texts
from tests.integrations.test_sentence_transformers import PAIRS, embedder, furthest, ranker
from tests.integrations.test_sentence_transformers import texts as words
from tests.tiny import tiny_model
from tests.workspace import write_transformers
from token_pruning.budget import elastic
from token_pruning.budget.comparison import _divided
from token_pruning.budget.schedules import Drain
from token_pruning.pruners import Budget
from token_pruning.pruners.budgets import DROP_EVERYTHING, at_budget
from token_pruning.runtime.prune import attachment_of

TABLE = [
    {"relative_flops": 0.4, "thresholds": [0.9, 0.8, 0.7]},
    {"relative_flops": 0.6, "thresholds": [0.5, 0.8, 0.0]},
    {"relative_flops": 1.0, "thresholds": [0.0, 0.0, 0.0]},
]


def by_table(**settings: Any) -> Any:
    pruner = tp.FixedThreshold(
        thresholds=[0.9, 0.8, 0.7], scoring_mode="relative", budgets=[Budget(**entry) for entry in TABLE], **settings
    )
    return tp.prune(tiny_model(layers=3), pruner)


def state(model: Any) -> tuple[list[float], float | None]:
    token_pruner = attachment_of(model).token_pruner
    assert token_pruner.pruner.thresholds == pytest.approx(token_pruner.thresholds.tolist())
    return token_pruner.thresholds.tolist(), token_pruner.pruner.vocabulary_threshold


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(**batch)
    found: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return found


# What is fitted.


def fitted_to(examples: dict[str, Tensor], kind: str, *, given: bool) -> dict[str, Tensor]:
    """The examples that thresholds are quantiles of."""
    count = len(examples["input_ids"])
    groups = torch.arange(count) % 24 if kind == "reranker" else torch.arange(count)
    parts = _divided(groups, 0.5 if given or kind == "reranker" else 0.7, seed=0)
    return {name: tensor[parts[0 if given else 1]] for name, tensor in examples.items()}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("classifier", {}),
        ("mean", {}),
        ("reranker", {}),
        ("classifier", {"search": [Drain("drain", (0.5, 0.5))]}),
        ("mean", {"summary_tokens": "segment"}),
        ("classifier", {"max_tokens": 24}),
    ],
)
def test_every_budget_costs_what_it_says_and_more_keeps_more(kind: str, options: dict[str, Any]) -> None:
    examples = pairs(24, 0) if kind == "reranker" else texts(80, 0)
    asked = [0.7, 0.6] if kind == "reranker" else [0.7, 0.35, 0.5]  # in any order
    model, found = calibrated(kind, examples, asked, **options)
    assert [fit.relative_flops for fit in found.fits] == pytest.approx(sorted(asked), abs=0.015)
    assert found.fits[0] is found.chosen and all(fit.divergence is not None for fit in found.fits)
    assert len({fit.rule for fit in found.fits}) == 1
    pruner = attachment_of(model).token_pruner.pruner
    assert pruner is found.pruner and state(model)[0] == pytest.approx(found.chosen.thresholds)
    assert pruner.correction is None and {*asked} <= {budget.relative_flops for budget in pruner.budgets}
    for fit in found.fits:  # each is taken as it was fitted
        tp.set_budget(model, min(asked, key=lambda budget: abs(budget - fit.relative_flops)))
        assert state(model) == (pytest.approx(fit.thresholds), fit.vocabulary_threshold)
    top = pruner.budgets[-1].relative_flops
    costs, budgets = [], [min(asked) + 0.03 * step for step in range(round((1 - min(asked)) / 0.03))]
    batch = fitted_to(examples, kind, given=bool(options.keys() & {"search", "summary_tokens"}))
    for budget in budgets:
        tp.set_budget(model, budget)
        costs.append(relative_flops(model, batch))
    assert costs == sorted(costs)
    assert costs == pytest.approx([min(budget, top) for budget in budgets], abs=0.02)


@pytest.mark.parametrize("kind", ["classifier", "mean", "tagger"])
def test_the_highest_budget_is_the_dense_model(kind: str) -> None:
    model, found = calibrated(kind, texts(80, 0), [0.6, 0.4])
    batch = texts(20, 9)
    found_by = []
    for budget in (1, found.pruner.budgets[-1].relative_flops, 0.4):
        tp.set_budget(model, budget)
        with tp.record(model) as trace:
            found_by.append(logits(model, batch))
        assert torch.equal(trace.ffn_lengths[0], trace.input_lengths) == (budget != 0.4)
    tp.unprune(model)
    valid = ... if kind == "classifier" else batch["attention_mask"].bool()
    dense = logits(model, batch)[valid]
    for pruned in found_by[:2]:
        assert (pruned[valid] - dense).abs().max() < 1e-5


def test_a_budget_that_needs_no_pruning_has_no_fit() -> None:
    _, found = calibrated("classifier", texts(80, 0), [0.99, 0.5])
    assert len(found.fits) == 1 and found.pruner.budgets[-1].relative_flops < 0.99
    model, found = calibrated("classifier", texts(80, 0), [0.99])
    assert len(found.fits) == len(found.pruner.budgets) == 1
    tp.set_budget(model, 0.99)
    assert relative_flops(model, texts(20, 9)) == pytest.approx(0.745, abs=0.02)


def test_what_drops_nothing_drops_nothing_where_probes_decide() -> None:
    model, found = calibrated("classifier", texts(80, 0), 0.99)
    assert "probe" in found.chosen.rule
    with tp.record(model) as trace:
        logits(model, texts(20, 9))
    assert all(bool((kept == trace.input_lengths).all()) for kept in trace.attention_lengths)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "target_flops is empty; it must be a budget or a list of budgets"),
        ([0.5, 0.5], "target_flops names 0.5 twice"),
        ([0.5, 1.5], "target_flops is 1.5; it must be a finite number > 0 and <= 1"),
        ([0.5, "a"], "target_flops is 'a'; it must be a finite number"),
        ([0.5, 0.01], "target_flops is 0.01; the lowest that can be reached with these examples is"),
        ("0.5", "target_flops is '0.5'; it must be a finite number"),
    ],
)
def test_budgets_are_checked_one_by_one(targets: Any, message: str) -> None:
    model = tiny_model(layers=3)
    with pytest.raises(tp.ConfigError) as raised:
        tp.calibrate(model, texts(40, 0), targets)
    assert str(raised.value).startswith(message)
    tp.prune(model, tp.Unpruned())  # which says that it is whole


# What is between.


def test_between_two_budgets_thresholds_are_linear_and_what_is_no_quantile_keeps_more() -> None:
    low = Budget(0.4, [1.0, 0.8, 0.5, -DROP_EVERYTHING, DROP_EVERYTHING], 0.6)
    high = Budget(0.6, [0.5, 0.8, 0.0, -2.0, 0.7], 0.2)
    found = at_budget([low, high], 0.45)
    assert found.thresholds == pytest.approx((0.875, 0.8, 0.0, -DROP_EVERYTHING, 0.7))
    assert found.vocabulary_threshold == pytest.approx(0.5) and found.relative_flops == 0.45
    assert at_budget([low, high], 0.4) is low
    assert at_budget([low, high], 0.6) is at_budget([low, high], 1) is high


@pytest.mark.parametrize("budget", [0.39, 1.01, 0, -1, "0.5", None, True, float("nan")])
def test_a_budget_outside_is_refused_with_the_range(budget: Any) -> None:
    model = by_table()
    before = state(model)
    with pytest.raises(tp.ConfigError) as raised:
        tp.set_budget(model, budget)
    assert str(raised.value) == f"budget is {budget!r}; it must be a finite number >= 0.4 and <= 1"
    assert state(model) == before


@pytest.mark.parametrize("method", [tp.TopK(token_keep_rate=0.5), tp.FixedThreshold(thresholds=[0.1] * 3)])
def test_a_model_for_one_budget_is_refused(method: tp.Pruner) -> None:
    model = tp.prune(tiny_model(layers=3), method)
    for each in (model, tp.compile(model, "float32")):
        with pytest.raises(tp.ConfigError, match="this model is not pruned for several budgets"):
            tp.set_budget(each, 0.5)
    with pytest.raises(tp.ConfigError, match="is not pruned"):
        tp.set_budget(tp.unprune(model), 0.5)


def test_trained_thresholds_have_no_table() -> None:
    assert tp.LearnedThreshold(budgets=[Budget(**entry) for entry in TABLE]).budgets is None


# Where it is kept.


def test_a_checkpoint_keeps_its_budgets_and_the_one_it_is_at(tmp_path: Path) -> None:
    model, found = calibrated("mean", texts(80, 0), [0.7, 0.4])
    batch = texts(20, 9)
    assert any(budget.vocabulary_threshold for budget in found.pruner.budgets)
    for budget in (0.5, 1.0, 0.4):
        tp.set_budget(model, budget)
        expected = logits(model, batch)
        model.save_pretrained(tmp_path)
        loaded = tp.from_pretrained(tmp_path)
        assert torch.equal(logits(loaded, batch), expected)
        assert attachment_of(loaded).token_pruner.pruner.budgets == found.pruner.budgets
        tp.set_budget(loaded, 0.6)
        tp.set_budget(model, 0.6)
        assert torch.equal(logits(loaded, batch), logits(model, batch))
    tp.unprune(model)
    assert not hasattr(model.config, "budgets")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "budgets is 3; it must be a list of budgets"),
        ([], "budgets is []; it must be a list of budgets"),
        ("abc", "budgets is 'abc'; it must be a list of budgets"),
        ([0.5], "budgets[0] is 0.5; it must be an object with relative_flops, thresholds and perhaps vocabulary_thr"),
        ([{"relative_flops": 0.5}], "budgets[0] is {'relative_flops': 0.5}; it must be an object with"),
        ([{**TABLE[0], "more": 1}], "budgets[0] is {'relative_flops': 0.4, 'thresholds': [0.9, 0.8, 0.7], 'more': 1}"),
        ([{**TABLE[0], "relative_flops": "a"}], "budgets[0]: relative_flops is 'a'; it must be a finite number > 0"),
        ([{**TABLE[0], "thresholds": 0.1}], "budgets[0]: thresholds is 0.1; it must be a list with one number per l"),
        ([{**TABLE[0], "thresholds": [0.1, None, 0]}], "budgets[0]: thresholds[1] is None; it must be a finite num"),
        ([{**TABLE[0], "thresholds": [0.1]}], "budgets[0] has 1 thresholds; the model has 3 layers"),
        ([{**TABLE[0], "vocabulary_threshold": -1}], "budgets[0]: vocabulary_threshold is -1; it must be a finite"),
        ([{**TABLE[0], "vocabulary_threshold": 1}], "budgets has a vocabulary_threshold, but the model has no vocab"),
        (TABLE[::-1], "budgets has the relative_flops [1.0, 0.6, 0.4]; they must rise"),
        ([TABLE[0], TABLE[0]], "budgets has the relative_flops [0.4, 0.4]; they must rise"),
    ],
)
def test_a_malformed_table_is_one_sentence(value: Any, message: str, tmp_path: Path) -> None:
    by_table().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    assert config["budgets"] == [{**entry, "vocabulary_threshold": 0.0} for entry in TABLE]
    file.write_text(json.dumps({**config, "budgets": value}), encoding="utf-8")
    with pytest.raises(tp.ConfigError) as raised:
        tp.from_pretrained(tmp_path)
    assert str(raised.value).startswith(f"{file}: {message}") and "\n" not in str(raised.value)


def test_a_layer_where_tokens_leave_at_another_budget_needs_its_map() -> None:
    maps = tp.DepartureMaps([1, 2], torch.zeros(2, 32, 33))
    pruner = tp.FixedThreshold(
        thresholds=[0.5, 0.5, 0.0], scoring_mode="relative", departed="map", maps=maps, budgets=TABLE
    )
    with pytest.raises(tp.ConfigError, match="departed is 'map', but map_layers lacks 3, where tokens may leave"):
        tp.prune(tiny_model(head="encoder", layers=3), pruner, reads="mean")


# The engine.


@pytest.mark.parametrize(
    ("kind", "kernels"), [("classifier", "native"), ("mean", "native"), ("tagger", "native"), ("mean", "torch")]
)
def test_an_engine_at_a_budget_is_the_model_at_it(kind: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels == "torch":
        monkeypatch.setenv("TOKEN_PRUNING_KERNELS", "torch")
    model, _ = calibrated(kind, texts(48, 0), [0.75, 0.4])
    batch = texts(20, 9)
    tp.set_budget(model, 1.0)  # where no gate needs the embeddings
    engine = tp.compile(model, "float32")
    first: dict[float, Tensor] = {}
    for budget in (0.4, 0.55, 0.75, 1.0, 0.55, 0.4):
        tp.set_budget(model, budget)
        engine.set_budget(budget)
        exact = logits(copy.deepcopy(model).double(), batch)  # two roundings apart, the two need not agree as well
        found = logits(engine, batch)
        assert (found - exact).abs().max() < 1e-5
        assert torch.equal(first.setdefault(budget, found), found)  # the same bits when it is switched back
        for key in ("thresholds", "vocabulary_threshold", "budgets"):
            assert getattr(engine.config, key, None) == getattr(model.config, key, None)
    with pytest.raises(tp.ConfigError, match=r"budget is 0\.2; it must be a finite number >= 0\.4 and <= 1"):
        engine.set_budget(0.2)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_of_an_engine_have_budgets_of_their_own(copied: Any) -> None:
    model, _ = calibrated("mean", texts(48, 0), [0.75, 0.4])
    engine, batch = tp.compile(model, "float32"), texts(20, 9)
    low = logits(engine, batch)
    other = copied(engine)
    other.set_budget(1.0)
    high = logits(other, batch)
    assert (high - low).abs().max() > 1e-3
    assert torch.equal(logits(engine, batch), low) and engine.config.thresholds != other.config.thresholds
    engine.set_budget(1.0)
    assert torch.equal(logits(engine, batch), high)


def test_the_highest_budget_is_no_more_than_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over windows can be a last bit above the dense model's."""
    monkeypatch.setattr(elastic, "highest_flops", lambda *_: 1.0000000000000002)
    pruner = tp.FixedThreshold(thresholds=[0.0] * 4, scoring_mode="relative")
    model = tp.prune(tiny_model(head="encoder"), pruner, reads="mean")
    assert elastic.budget_dropping_nothing(model, pruner, {}).relative_flops == 1


def test_models_of_sentence_transformers(tmp_path: Path) -> None:
    home = write_transformers(tmp_path / "home", "encoder", layers=3, longest=64)
    queries = [word for word in words(8, 8, seed=1, shortest=4) for _ in range(6)]
    passages = list(zip(queries, words(48, 40, seed=3, shortest=20), strict=True))
    cases: list[tuple[Any, Any, Any]] = [
        (embedder(home), words(40, 40, seed=2, shortest=8), lambda model: model.encode(words(10))),
        (ranker(home), passages, lambda model: model.predict(PAIRS)),
    ]
    for number, (model, examples, run) in enumerate(cases):
        tp.calibrate(model, examples, [0.7, 0.6])
        fast = tp.compile(model, "float32")
        for budget in (0.65, 1.0, 0.6):
            tp.set_budget(model, budget)
            tp.set_budget(fast, budget)
            assert furthest(run(fast), run(model)) < 1e-5
        tp.set_budget(fast, 0.7)
        for saved, name in ((model, f"model {number}"), (fast, f"fast {number}")):
            saved.save(str(tmp_path / name))
            loaded = tp.from_pretrained(tmp_path / name)
            assert furthest(run(loaded), run(saved)) < 1e-5
            tp.set_budget(loaded, 0.65)
            tp.set_budget(fast, 0.65)
            assert furthest(run(loaded), run(fast)) < 1e-5
            tp.set_budget(fast, 0.7)
