"""Models of sentence-transformers trained for several budgets at once."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import token_pruning as tp
from tests.integrations.test_distillation import PAIRS, SHORT, TEXTS
from tests.integrations.test_distillation import _quick_search as _quick_search  # a fixture
from tests.integrations.test_sentence_transformers import embedder, ranker
from tests.integrations.test_sentence_transformers import home as home  # a fixture
from tests.integrations.test_sentence_transformers import texts as some_texts
from token_pruning.budget import elastic_holding
from token_pruning.budget.distillation import Course
from token_pruning.budget.elastic_holding import ElasticHolder
from token_pruning.budget.fitting import outputs_in_parts
from token_pruning.runtime.prune import attachment_of, hugging_face_model

BUDGETS = [0.65, 0.5]


@pytest.fixture(autouse=True)
def _few_refits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is one for every entry of the table."""
    monkeypatch.setattr(ElasticHolder, "refits", 6)


def texts_of(kind: str) -> Any:
    return PAIRS if kind == "reranker" else some_texts(400, 40, seed=3)


def model_of(kind: str, home: Path) -> Any:
    if kind == "embedder":
        return embedder(home)
    model = ranker(home)
    with torch.no_grad():  # scores that differ
        model[0].model.classifier.weight.mul_(20)
    return model


def course(model: Any, texts: Any, **changes: Any) -> Course:
    given = {"teacher": None, "examples": 100, "bf16": False, "seed": 0, "shows": False, **changes}
    return Course(model, texts, given.pop("target_flops", BUDGETS), **given)


def train(found: Course, folder: Path) -> Any:
    trainer = found.trainer(
        output_dir=str(folder), epochs=3, learning_rate=4e-4, batch_size=16, save_strategy="no", logging_strategy="no"
    )
    return found.train(trainer)


def table_of(model: Any) -> Any:
    return attachment_of(hugging_face_model(model)).token_pruner.pruner.budgets


def at(found: Course, budget: float) -> tuple[float, float]:
    """What the model costs at a budget, counted on the held-out texts, and how far it is from the dense one."""
    tp.set_budget(found.model, budget)
    with tp.record(inner := hugging_face_model(found.model)) as trace:
        outputs_in_parts(inner.eval(), found.batch)
    return tp.count_flops(inner, trace).relative, found.differs()


@pytest.mark.parametrize("kind", ["embedder", "reranker"])
def test_every_budget_is_held_and_comes_nearer(kind: str, home: Path, tmp_path: Path) -> None:
    found = course(model_of(kind, home), texts_of(kind))
    untrained = copy.copy(found)
    untrained.model = copy.deepcopy(found.model)
    result = train(found, tmp_path)
    assert result.relative_flops == pytest.approx(0.5, abs=0.02)
    before, after = ([entry.relative_flops for entry in table_of(each.model)] for each in (untrained, found))
    assert before == after and {*BUDGETS} < {*after} and min(after) == 0.5
    for budget in after:
        cost, differs = at(found, budget)
        assert cost == pytest.approx(budget, abs=0.02)
        if budget in BUDGETS:
            assert differs < at(untrained, budget)[1]
    for low, high in pairwise(after):
        assert at(found, (low + high) / 2)[0] == pytest.approx((low + high) / 2, abs=0.03)


def test_a_saved_model_has_the_table(home: Path, tmp_path: Path) -> None:
    model = embedder(home)
    tp.distill(model, TEXTS, BUDGETS, **SHORT)
    model.save_pretrained(str(tmp_path / "E"))
    loaded = tp.from_pretrained(tmp_path / "E")
    assert table_of(loaded) == table_of(model)
    for budget in (None, 0.6, 1.0):
        for each in (model, loaded):
            if budget is not None:
                tp.set_budget(each, budget)
        assert loaded.encode(TEXTS[:40]) == pytest.approx(model.encode(TEXTS[:40]), abs=1e-6)


def test_each_step_has_a_budget_of_its_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[float]] = []
    taken: list[float] = []
    stepped: list[Any] = []
    own, step = elastic_holding.set_budget, ElasticHolder.on_step_begin

    def watched(model: Any, budget: float) -> None:
        drawn[-1].append(budget)
        own(model, budget)

    def begin(self: Any, *args: Any, model: Any = None, **kwargs: Any) -> None:
        drawn.append([])
        step(self, *args, model=model, **kwargs)
        taken.append(drawn[-1][-1])
        stepped.append(tuple(attachment_of(hugging_face_model(model)).token_pruner.thresholds.tolist()))

    drawn.append([])
    monkeypatch.setattr(elastic_holding, "set_budget", watched)
    monkeypatch.setattr(ElasticHolder, "on_step_begin", begin)
    runs = []
    for seed in (1, 1, 2):
        model = embedder(home)
        drawn[:], taken[:], stepped[:] = [[]], [], []
        tp.distill(model, TEXTS, BUDGETS, seed=seed, **SHORT)
        low, high = table_of(model)[0].relative_flops, table_of(model)[-1].relative_flops
        above = [budget for budget in taken if budget > low]
        assert len(stepped) == 7 and len(above) == len({*above}) < len(taken)  # some at the lowest, no other one twice
        assert all(low <= budget <= high for budget in taken) and max(taken) - min(taken) > 0.1
        assert all(each[-1] == low for each in drawn[1:])  # when the step is over
        assert len({*stepped}) > 3  # and nothing leaves at the highest
        runs.append(([*taken], {name: value.clone() for name, value in model.state_dict().items()}, table_of(model)))
    one, again, other = runs
    assert one[0] == again[0] != other[0] and one[2] == again[2] != other[2]
    assert all((value == again[1][name]).all() for name, value in one[1].items())
    assert any((value != other[1][name]).any() for name, value in one[1].items())


def test_a_calibrated_model_is_trained_for_its_budgets(home: Path) -> None:
    model = embedder(home)
    tp.calibrate(model, TEXTS, BUDGETS)
    before = table_of(model)
    tp.set_budget(model, 0.65)
    teacher = embedder(home)
    found = tp.distill(model, TEXTS, teacher=teacher, **SHORT)
    assert found.calibration is None and found.relative_flops == pytest.approx(before[0].relative_flops, abs=0.05)
    after = table_of(model)
    assert [each.relative_flops for each in after] == [each.relative_flops for each in before] and after != before


@pytest.mark.parametrize(
    ("calibrated_for", "target_flops", "message"),
    [
        (
            BUDGETS,
            0.5,
            "target_flops is 0.5; this model is pruned for several budgets already, and is trained for these",
        ),
        (BUDGETS, BUDGETS, r"target_flops is \[0.65, 0.5\]; this model is pruned for several budgets already"),
        (0.5, BUDGETS, r"target_flops is \[0.65, 0.5\]; this model is pruned for one already, and is trained for one"),
        (None, [], "target_flops is empty"),
        (None, [0.5, 0.01], "target_flops is 0.01; the lowest that can be reached"),
        (None, [0.5, 0.5], "target_flops names 0.5 twice"),
    ],
)
def test_budgets_that_are_refused(home: Path, calibrated_for: Any, target_flops: Any, message: str) -> None:
    model = embedder(home)
    if calibrated_for is not None:
        tp.calibrate(model, TEXTS, calibrated_for)
    with pytest.raises(tp.ConfigError, match=message):
        tp.distill(model, TEXTS, target_flops, **SHORT)
