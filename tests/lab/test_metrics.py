import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from token_pruning.errors import ConfigError, DataError
from token_pruning.lab.data.tasks import GLUE_TASKS, Task
from token_pruning.lab.metrics import compute_metrics

Array = npt.NDArray[Any]
CUSTOM = Task(name="custom", folder="", hub_name="", labels=("a", "b", "c"), best_metric="accuracy")
SCORES = Task(name="custom", folder="", hub_name="", labels=None, best_metric="combined_score")


def logits(classes: list[int], count: int) -> Array:
    """Logits whose largest is at ``classes``, all negative, so that only their order can tell."""
    return -5.0 + np.eye(count, dtype=np.float32)[classes]


@pytest.mark.parametrize("name", ["RTE", "SST2", "QNLI", "MNLI"])
def test_accuracy(name: str) -> None:
    task = GLUE_TASKS[name]
    result = compute_metrics(task, logits([0, 1, 1, 0, 1], task.num_labels), np.array([0, 1, 0, 0, 0]))
    assert result == {"accuracy": pytest.approx(3 / 5)}


@pytest.mark.parametrize("name", ["MRPC", "QQP"])
def test_accuracy_and_f1(name: str) -> None:
    # positives: 2 found, 1 missed, 2 too many: precision 1/2, recall 2/3, F1 4/7
    result = compute_metrics(GLUE_TASKS[name], logits([1, 1, 0, 1, 1, 0], 2), np.array([1, 1, 1, 0, 0, 0]))
    assert result == {
        "accuracy": pytest.approx(1 / 2),
        "f1": pytest.approx(4 / 7),
        "combined_score": pytest.approx((1 / 2 + 4 / 7) / 2),
    }


def test_f1_without_positives() -> None:
    result = compute_metrics(GLUE_TASKS["MRPC"], logits([0, 0], 2), np.array([0, 0]))
    assert result == {"accuracy": 1.0, "f1": 0.0, "combined_score": 0.5}


def test_macro_f1() -> None:
    # a: precision 1, recall 1/2, F1 2/3; b: precision 1/2, recall 1, F1 2/3; c: F1 1
    result = compute_metrics(CUSTOM, logits([0, 1, 1, 2], 3), np.array([0, 0, 1, 2]))
    assert result == {"accuracy": pytest.approx(3 / 4), "f1": pytest.approx(7 / 9)}
    result = compute_metrics(CUSTOM, logits([0, 0, 1], 3), np.array([0, 0, 0]))  # c unseen; b F1 0, a 4/5
    assert result == {"accuracy": pytest.approx(2 / 3), "f1": pytest.approx(2 / 5)}


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_correlations_by_hand(shape: tuple[int, ...]) -> None:
    # deviations from the means: (-1.5, -.5, 1.5, .5) and (-2, -1, 3, 0); the ranks agree
    predictions = np.array([1.0, 2.0, 4.0, 3.0], dtype=np.float32).reshape(shape)
    result = compute_metrics(GLUE_TASKS["STSB"], predictions, np.array([0.0, 1.0, 5.0, 2.0]))
    pearson = 8 / np.sqrt(5 * 14)
    assert result == {
        "pearson": pytest.approx(pearson),
        "spearmanr": pytest.approx(1.0),
        "combined_score": pytest.approx((pearson + 1.0) / 2),
    }


def test_correlations_against_numpy() -> None:
    generator = np.random.default_rng(0)
    labels = np.round(generator.uniform(0, 5, 50), 1)  # with ties
    predictions = np.round(labels + generator.normal(0, 1, 50), 1)

    def ranks(values: Array) -> Array:
        return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])

    assert len(set(labels)) < 50
    result = compute_metrics(SCORES, predictions, labels)
    pearson = np.corrcoef(predictions, labels)[0, 1]
    spearman = np.corrcoef(ranks(predictions), ranks(labels))[0, 1]
    assert 0.5 < spearman < 0.99
    assert result["pearson"] == pytest.approx(pearson, abs=1e-12)
    assert result["spearmanr"] == pytest.approx(spearman, abs=1e-12)
    assert result["combined_score"] == pytest.approx((pearson + spearman) / 2, abs=1e-12)


@pytest.mark.parametrize(
    ("predictions", "labels"),
    [([2.0, 2.0, 2.0], [0.0, 1.0, 2.0]), ([0.0, 1.0, 2.0], [3.0, 3.0, 3.0]), ([1.0], [2.0])],
)
def test_constants_correlate_with_nothing(predictions: list[float], labels: list[float]) -> None:
    result = compute_metrics(GLUE_TASKS["STSB"], np.array(predictions), np.array(labels))
    assert result == {"pearson": 0.0, "spearmanr": 0.0, "combined_score": 0.0}


def test_nearly_constant_predictions_do_not_warn() -> None:
    predictions = np.array([1.0, 1.0, 1.0 + 2**-50])
    result = compute_metrics(GLUE_TASKS["STSB"], predictions, np.array([0.0, 0.0, 5.0]))
    assert result["spearmanr"] == pytest.approx(1.0)
    assert np.isfinite(result["pearson"])


def test_results_are_plain_floats() -> None:
    for task, predictions in ((CUSTOM, logits([0, 1], 3)), (SCORES, np.array([0.5, 1.0], dtype=np.float16))):
        result = compute_metrics(task, predictions, np.array([1, 0]))
        assert {type(value) for value in result.values()} == {float}
        assert task.best_metric in result
    assert all(task.best_metric in compute_metrics(task, *sample(task)) for task in GLUE_TASKS.values())


def sample(task: Task) -> tuple[Array, Array]:
    predictions = np.zeros((2, task.num_labels))
    predictions[1, -1] = 1.0
    return predictions, np.array([0, 1])


@pytest.mark.parametrize(
    ("task", "predictions", "labels", "message"),
    [
        (CUSTOM, np.zeros((2, 2)), np.array([0, 1]), r"predictions \[2, 2\] and labels \[2\]; allowed: \[N, 3\] and"),
        (CUSTOM, np.zeros(2), np.array([0, 1]), r"predictions \[2\] and labels \[2\]"),
        (CUSTOM, np.zeros((3, 3)), np.array([0, 1]), r"predictions \[3, 3\] and labels \[2\]"),
        (CUSTOM, np.zeros((0, 3)), np.array([]), r"predictions \[0, 3\] and labels \[0\]"),
        (SCORES, np.zeros((2, 2)), np.array([0.0, 1.0]), r"predictions \[2, 2\] and labels \[2\]; allowed: \[N\] and"),
        (CUSTOM, np.zeros((2, 3)), np.array([0, 3]), "a label is 3; allowed: 0 to 2"),
        (CUSTOM, np.zeros((2, 3)), np.array([-1, 0]), "a label is -1; allowed: 0 to 2"),
        (SCORES, np.zeros(2), np.array([0.0, np.nan]), "a label is nan; allowed: finite numbers"),
        (SCORES, np.array([np.nan, 1.0, np.inf]), np.arange(3.0), "2 of 3 predictions are NaN or infinite"),
        (CUSTOM, np.full((2, 3), np.nan), np.array([0, 1]), "2 of 2 predictions are NaN or infinite"),
    ],
)
def test_what_does_not_fit(task: Task, predictions: Array, labels: Array, message: str) -> None:
    with pytest.raises(DataError, match=message):
        compute_metrics(task, predictions, labels)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ConfigError, match=r"pip install token-pruning\[train\]"):
        compute_metrics(CUSTOM, logits([0], 3), np.array([0]))
