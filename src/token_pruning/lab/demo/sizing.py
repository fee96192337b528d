"""How much of the demo's data this machine can train on in a few minutes; seconds, steps and texts in, texts out."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from token_pruning.lab.data import TaskData, TextExamples

BATCH_SIZE = 32
EPOCHS = {"dense": 3, "soft": 2, "hard": 1}
PASSES = 3  # timed passes of each model, after one that warms up
_SECONDS = 345.0  # what is aimed at: under six minutes
_SECONDS_FOR_ALL = 400.0  # what is waited for where nothing need be left out
_FIXED_SECONDS = 25.0  # imports, loading, writing, the report
_FEWEST_TEXTS = 640  # to train on, before epochs are saved instead: 32 of each label
_FLOOR = 320  # the same, however slow the machine: fewer would say nothing
_FEWEST_VALIDATION_TEXTS = 200
_FEWER_EPOCHS = ({"dense": 2, "soft": 1, "hard": 1}, {"dense": 1, "soft": 1, "hard": 1})
# A step and an evaluated batch, in dense training steps.
_STEP = {"dense": 1.0, "soft": 1.75, "hard": 1.0}
_EVALUATED = 0.3


@dataclass(frozen=True)
class Size:
    """How much is trained and evaluated.

    Attributes:
        train_texts: of the training set, for every stage.
        validation_texts: of the validation set.
        epochs: of each stage, by its name.
        step_seconds: a dense training step here, on 32 texts.
    """

    train_texts: int
    validation_texts: int
    epochs: dict[str, int]
    step_seconds: float

    def stage_seconds(self, stage: str) -> float:
        """What a stage is expected to take, with an evaluation after every epoch and one at the end."""
        epochs = self.epochs[stage]
        evaluated = (epochs + 1) * self.validation_texts * _EVALUATED
        return (epochs * self.train_texts * _STEP[stage] + evaluated) / BATCH_SIZE * self.step_seconds

    @property
    def comparison_seconds(self) -> float:
        """What timing the stages' models side by side is expected to take."""
        passes = len(self.epochs) * (PASSES + 1)
        return passes * self.validation_texts * _EVALUATED / BATCH_SIZE * self.step_seconds

    @property
    def seconds(self) -> float:
        """What the whole demo is expected to take."""
        return _FIXED_SECONDS + sum(map(self.stage_seconds, self.epochs)) + self.comparison_seconds


def choose_size(step_seconds: float, train_texts: int, validation_texts: int) -> Size:
    """All there is if that takes a few minutes; else as many texts as do, of fewer epochs where these are too few.

    Args:
        step_seconds: a dense training step, on 32 texts.
        train_texts: how many there are.
        validation_texts: the same.
    """
    everything = Size(train_texts, validation_texts, EPOCHS, step_seconds)
    if everything.seconds <= _SECONDS_FOR_ALL:
        return everything
    for epochs in (EPOCHS, *_FEWER_EPOCHS):
        full = Size(train_texts, validation_texts, epochs, step_seconds)
        part = min(1.0, (_SECONDS - _FIXED_SECONDS) / (full.seconds - _FIXED_SECONDS))
        validated = min(validation_texts, max(_FEWEST_VALIDATION_TEXTS, int(part * validation_texts)))
        evaluation = Size(0, validated, epochs, step_seconds).seconds
        training = Size(train_texts, 0, epochs, step_seconds).seconds - _FIXED_SECONDS
        trained_on = min(train_texts, int(train_texts * (_SECONDS - evaluation) / training))
        if trained_on >= _FEWEST_TEXTS:
            break
    return Size(min(train_texts, max(_FLOOR, trained_on)), validated, epochs, step_seconds)


class Pace:
    """What is left of a demo, by what was expected and how long the stages so far have taken."""

    def __init__(self, size: Size) -> None:
        """Nothing is done yet."""
        self.size = size
        self.expected = self.measured = 0.0

    def took(self, stage: str, seconds: float) -> None:
        """A stage is done."""
        self.expected += self.size.stage_seconds(stage)
        self.measured += seconds

    def left(self, stage: str | None = None) -> float:
        """Seconds from the beginning of a stage to the end, or for None from the end of the last one."""
        names = list(self.size.epochs)
        stages = sum(map(self.size.stage_seconds, names[names.index(stage) :])) if stage is not None else 0.0
        speed = self.measured / self.expected if self.expected else 1.0
        return speed * (stages + self.size.comparison_seconds)


def describe(size: Size, train_texts: int) -> str:
    """What was chosen and why, on one line.

    Args:
        size: the choice.
        train_texts: how many there are.
    """
    step = f"{size.step_seconds:.2f}" if size.step_seconds < 10 else f"{size.step_seconds:.0f}"
    epochs = "" if size.epochs == EPOCHS else f", {' + '.join(map(str, size.epochs.values()))} epochs"
    return (
        f"about {step} s a step here: training on {size.train_texts:,} of {train_texts:,} texts"
        f"{epochs}, about {duration(size.seconds)}"
    )


def duration(seconds: float) -> str:
    """Minutes and tens of seconds: "5 minutes 40 s"."""
    minutes, rest = divmod(10 * round(seconds / 10), 60)
    parts = [f"{minutes} minute{'s' if minutes > 1 else ''}"] if minutes else []
    return " ".join([*parts, f"{rest} s"] if rest or not minutes else parts)


def sized(data: TaskData, size: Size) -> TaskData:
    """The task with as many texts as were chosen, its labels in the same proportions."""
    assert data.train is not None
    validation = {name: _some(examples, size.validation_texts) for name, examples in data.validation.items()}
    return TaskData(data.task, _some(data.train, size.train_texts), validation)


def _some(examples: TextExamples, count: int) -> TextExamples:
    return examples.select(stratified(examples.labels or [0] * len(examples), count))


def stratified(labels: Sequence[Any], count: int) -> list[int]:
    """``count`` places at random, in ascending order, each label's in proportion; the same ones every time.

    Each label's examples are spread evenly over 0 to 1, and the lowest ``count`` of all are taken.
    """
    totals, seen = Counter(labels), Counter[Any]()
    places = list(range(len(labels)))
    random.Random(0).shuffle(places)
    rank = {}
    for place in places:
        rank[place] = (seen[labels[place]] + 0.5) / totals[labels[place]]
        seen[labels[place]] += 1
    return sorted(sorted(places, key=rank.__getitem__)[:count])
