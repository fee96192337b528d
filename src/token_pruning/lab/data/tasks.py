"""What a task is, what a split holds, and the seven GLUE tasks."""

import os
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

from token_pruning.errors import ConfigError, DataError


@dataclass(frozen=True)
class Task:
    """One classification or regression task over a text or a pair of texts.

    ``labels`` are the names in the order of their ids, ``None`` for regression. ``best_metric`` is the key of
    :func:`token_pruning.lab.metrics.compute_metrics`' result that picks the best model (larger is better).
    The fields after it say where the official GLUE files and the hub's dataset keep things; tasks that are not
    GLUE leave them as they are.
    """

    name: str
    folder: str
    hub_name: str
    labels: tuple[str, ...] | None
    best_metric: str
    text_columns: tuple[str, ...] = ()
    label_column: str = "label"
    file_labels: tuple[str, ...] | None = None
    hub_text_columns: tuple[str, ...] = ()
    train_file: str = "train.tsv"
    short_train_rows: bool = False
    validation_files: tuple[tuple[str, str], ...] = (("validation", "dev.tsv"),)

    @property
    def num_labels(self) -> int:
        """The number of outputs of a model for this task: the number of labels, 1 for regression."""
        return 1 if self.labels is None else len(self.labels)

    @property
    def is_regression(self) -> bool:
        """Whether the labels are numbers to be predicted, not classes."""
        return self.labels is None


@dataclass
class Note:
    """What was taken for what in a file, in one line; empty for examples that come from no file."""

    text: str = ""
    said: bool = False

    def say(self) -> None:
        """Print it on standard error, once, and in the first of several processes only."""
        if self.text and not self.said and int(os.environ.get("RANK", "0")) == 0:
            print(self.text, file=sys.stderr, flush=True)
        self.said = True


@dataclass(frozen=True)
class TextExamples:
    """One split: ``first`` and, for pairs, ``second`` texts, and labels (class ids, or floats for regression).

    Lists are of one length; ``labels`` is ``None`` where they are not known. ``note`` tells how a file was read.
    Unequal lengths raise :class:`~token_pruning.errors.DataError`.
    """

    first: list[str]
    second: list[str] | None
    labels: list[int] | list[float] | None
    note: Note = field(default_factory=Note, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, column in (("second", self.second), ("labels", self.labels)):
            if column is not None and len(column) != len(self.first):
                raise DataError(f"examples: {name} has {len(column)} entries, first has {len(self.first)}")

    def __len__(self) -> int:
        return len(self.first)

    def select(self, indices: Iterable[int]) -> "TextExamples":
        """The examples at ``indices``, in that order."""
        chosen = [int(index) for index in indices]
        labels: list[int] | list[float] | None = self.labels
        if labels is not None:
            labels = [labels[index] for index in chosen]
        return TextExamples(
            first=[self.first[index] for index in chosen],
            second=None if self.second is None else [self.second[index] for index in chosen],
            labels=labels,
            note=self.note,
        )

    def sample(self, count: int, seed: int) -> "TextExamples":
        """At most ``count`` in random order, but pairs with the same first text together: they make a ranking."""
        groups: dict[str | int, list[int]] = {}
        for number, first in enumerate(self.first):
            groups.setdefault(number if self.second is None else first, []).append(number)
        order = list(groups.values())
        random.Random(seed).shuffle(order)
        return self.select([number for group in order for number in group][:count])


@dataclass(frozen=True)
class TaskData:
    """A task with its splits.

    ``validation`` has one entry, ``"validation"``, but for MNLI: ``"validation_matched"`` and
    ``"validation_mismatched"``.
    """

    task: Task
    train: TextExamples | None
    validation: dict[str, TextExamples]

    def say(self) -> None:
        """Say once how each file was read; commands do when nothing can be refused any more."""
        for examples in (self.train, *self.validation.values()):
            if examples is not None:
                examples.note.say()


_SENTENCES = ("sentence1", "sentence2")
_BINARY = ("0", "1")

GLUE_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="RTE",
            folder="RTE",
            hub_name="rte",
            labels=("entailment", "not_entailment"),
            best_metric="accuracy",
            text_columns=_SENTENCES,
            file_labels=("entailment", "not_entailment"),
            hub_text_columns=_SENTENCES,
        ),
        Task(
            name="MRPC",
            folder="MRPC",
            hub_name="mrpc",
            labels=("not_equivalent", "equivalent"),
            best_metric="combined_score",
            text_columns=("#1 String", "#2 String"),
            label_column="Quality",
            file_labels=_BINARY,
            hub_text_columns=_SENTENCES,
        ),
        Task(
            name="STSB",
            folder="STS-B",
            hub_name="stsb",
            labels=None,
            best_metric="combined_score",
            text_columns=_SENTENCES,
            label_column="score",
            hub_text_columns=_SENTENCES,
        ),
        Task(
            name="SST2",
            folder="SST-2",
            hub_name="sst2",
            labels=("negative", "positive"),
            best_metric="accuracy",
            text_columns=("sentence",),
            file_labels=_BINARY,
            hub_text_columns=("sentence",),
        ),
        Task(
            name="QNLI",
            folder="QNLI",
            hub_name="qnli",
            labels=("entailment", "not_entailment"),
            best_metric="accuracy",
            text_columns=("question", "sentence"),
            file_labels=("entailment", "not_entailment"),
            hub_text_columns=("question", "sentence"),
        ),
        Task(
            name="QQP",
            folder="QQP",
            hub_name="qqp",
            labels=("not_duplicate", "duplicate"),
            best_metric="combined_score",
            text_columns=("question1", "question2"),
            label_column="is_duplicate",
            file_labels=_BINARY,
            short_train_rows=True,
            hub_text_columns=("question1", "question2"),
        ),
        Task(
            name="MNLI",
            folder="MNLI",
            hub_name="mnli",
            labels=("entailment", "neutral", "contradiction"),
            best_metric="accuracy",
            text_columns=_SENTENCES,
            label_column="gold_label",
            file_labels=("entailment", "neutral", "contradiction"),
            hub_text_columns=("premise", "hypothesis"),
            validation_files=(
                ("validation_matched", "dev_matched.tsv"),
                ("validation_mismatched", "dev_mismatched.tsv"),
            ),
        ),
    )
}
"""The seven GLUE tasks by name, labels in the hub's order (the one published checkpoints use)."""


def glue_task(name: str) -> Task:
    """The GLUE task called ``name``, in any case, with or without the hyphen (``stsb``, ``STS-B``).

    An unknown name raises :class:`~token_pruning.errors.ConfigError`.
    """
    task = GLUE_TASKS.get(name.strip().upper().replace("-", "").replace("_", ""))
    if task is None:
        raise ConfigError(f"unknown task {name!r}; allowed: {', '.join(GLUE_TASKS)}")
    return task
