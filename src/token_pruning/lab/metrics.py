"""The metrics of GLUE, and accuracy and F1 for other tasks."""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from token_pruning.errors import ConfigError, DataError
from token_pruning.lab.data.tasks import GLUE_TASKS, Task


def compute_metrics(task: Task, predictions: npt.NDArray[Any], labels: npt.NDArray[Any]) -> dict[str, float]:
    """The metrics of ``task`` over N examples, each from 0 to 1 (correlations from -1 to 1).

    ``predictions`` are logits [N, C], or [N] or [N, 1] for regression; ``labels`` are class ids or scores [N].
    The result's keys are

    * RTE, SST2, QNLI, MNLI: ``accuracy``;
    * MRPC, QQP: ``accuracy``, ``f1`` (of class 1) and ``combined_score``, their mean;
    * regression: ``pearson``, ``spearmanr`` and ``combined_score``, their mean; a correlation is 0 where
      predictions or labels are constant;
    * other classification: ``accuracy`` and ``f1``, the mean over the classes seen in labels or predictions.

    Shapes that do not fit, predictions that are not finite and labels out of range raise
    :class:`~token_pruning.errors.DataError`; scikit-learn or SciPy missing raises
    :class:`~token_pruning.errors.ConfigError`.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if task.labels is None and predictions.ndim == 2 and predictions.shape[1] == 1:
        predictions = predictions[:, 0]
    expected = labels.shape if task.labels is None else (*labels.shape, task.num_labels)
    if labels.ndim != 1 or not len(labels) or predictions.shape != expected:
        wanted = "[N]" if task.labels is None else f"[N, {task.num_labels}]"
        raise DataError(
            f"metrics of {task.name}: predictions {list(predictions.shape)} and labels {list(labels.shape)}; "
            f"allowed: {wanted} and [N] with N of 1 or more"
        )
    if not np.isfinite(predictions).all():
        count = len(labels) - int(np.isfinite(predictions.reshape(len(labels), -1)).all(axis=1).sum())
        raise DataError(f"metrics of {task.name}: {count} of {len(labels)} predictions are NaN or infinite")
    if task.labels is None:
        wrong, allowed = ~np.isfinite(labels), "finite numbers"
    else:
        wrong, allowed = ~np.isin(labels, np.arange(task.num_labels)), f"0 to {task.num_labels - 1}"
    if wrong.any():
        raise DataError(f"metrics of {task.name}: a label is {labels[wrong][0]}; allowed: {allowed}")
    try:
        if task.labels is None:
            return _regression(predictions.astype(np.float64), labels.astype(np.float64))
        return _classification(task, predictions.argmax(axis=1), labels)
    except ImportError as error:
        raise ConfigError(f"metrics need scikit-learn and SciPy ({error}): pip install token-pruning[train]") from None


def _classification(task: Task, predicted: npt.NDArray[Any], labels: npt.NDArray[Any]) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score

    result = {"accuracy": float(accuracy_score(labels, predicted))}
    if task.name in ("MRPC", "QQP"):
        result["f1"] = float(f1_score(labels, predicted, average="binary", pos_label=1, zero_division=0.0))
        result["combined_score"] = (result["accuracy"] + result["f1"]) / 2
    elif task.name not in GLUE_TASKS:
        result["f1"] = float(f1_score(labels, predicted, average="macro", zero_division=0.0))
    return result


def _regression(predicted: npt.NDArray[np.float64], labels: npt.NDArray[np.float64]) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    pearson = spearman = 0.0
    if predicted.min() < predicted.max() and labels.min() < labels.max():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SciPy's on inputs that are all but constant
            pearson = float(np.nan_to_num(pearsonr(predicted, labels).statistic))
            spearman = float(np.nan_to_num(spearmanr(predicted, labels).statistic))
    return {"pearson": pearson, "spearmanr": spearman, "combined_score": (pearson + spearman) / 2}
