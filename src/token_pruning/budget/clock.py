"""A budget in milliseconds: what a batch of the examples takes in the engine, on this machine."""

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from token_pruning.budget.comparison import Comparison
from token_pruning.budget.examples import Batch, model_inputs, part_of
from token_pruning.budget.fitting import Fit, highest_flops, lowest_flops, using
from token_pruning.engine import compile as make_engine
from token_pruning.errors import ConfigError
from token_pruning.pruners import Pruner, Unpruned
from token_pruning.runtime.prune import attachment_of

_OPTIONS = ("dtype", "threads")  # of an engine; what is read a pruned model knows
_MOST_BATCHES = 32
_ROUNDS = 7
_LEAST_SECONDS = 0.4  # that each of the two engines is timed for
_TRIES = 4
_NEAR = 0.93  # times the milliseconds asked for: faster than that leaves quality unused
_AIM = 0.97  # times the milliseconds asked for, so that noise seldom carries a result beyond them


class Clock:
    """Times engines on batches of the examples.

    Attributes:
        dense_ms: milliseconds of a batch with nothing pruned.
    """

    def __init__(self, model: Any, batch: Batch, batch_size: int, options: Mapping[str, Any], seed: int) -> None:
        """Compile the dense model, and time it.

        Args:
            model: pruned; it is timed with other methods than its own.
            batch: the examples, of which some are taken at random.
            batch_size: how many make a batch.
            options: for :func:`token_pruning.compile`.
            seed: of the choice.

        Raises:
            ConfigError: for options that an engine does not have.
        """
        if not isinstance(options, Mapping) or not {*options} <= {*_OPTIONS}:
            raise ConfigError(f"engine is {options!r}; it must be a dictionary of {', '.join(_OPTIONS)}")
        self._model, self._options = model, dict(options)
        generator = torch.Generator("cpu").manual_seed(seed)
        order = torch.randperm(len(batch["input_ids"]), generator=generator, device="cpu")
        chosen = torch.split(order[: _MOST_BATCHES * batch_size], batch_size)
        cpu = torch.device("cpu")
        self._batches = [model_inputs(part_of(batch, rows), cpu) for rows in chosen if len(rows) == batch_size]
        template = attachment_of(model).token_pruner.pruner
        self._dense = self._compiled(Unpruned(max_tokens=template.max_tokens, chunks=template.chunks))
        self.dense_ms = self._medians(self._dense)[0]

    def measure(self, pruner: Pruner) -> float:
        """Milliseconds of a batch with a pruning method: the median of rounds in turn with the dense model."""
        self.dense_ms, found = self._medians(self._dense, self._compiled(pruner))
        return found

    def _compiled(self, pruner: Pruner) -> Any:
        with using(self._model, pruner):
            return make_engine(self._model, **self._options)

    def _medians(self, *engines: Any) -> list[float]:
        """The engines take turns, so that whatever slows the machine down slows all of them."""
        for engine in engines:
            self._round(engine)  # the first calls also take memory
        rounds: list[list[float]] = []
        while len(rounds) < _ROUNDS or sum(map(sum, rounds)) < _LEAST_SECONDS * len(engines):
            rounds.append([self._round(engine) for engine in engines])
        return [1000 * median(times) / len(self._batches) for times in zip(*rounds, strict=True)]

    def _round(self, engine: Any) -> float:
        began = time.perf_counter()
        for batch in self._batches:
            engine(**batch)
        return time.perf_counter() - began


def within_milliseconds(comparison: Comparison, clock: Clock, target_ms: float) -> tuple[list[Fit], float]:
    """The dearest budget whose batches take no more than ``target_ms``, and what is best for it.

    Args:
        comparison: the examples.
        clock: on the same model.
        target_ms: milliseconds of a batch.

    Returns:
        The fits, the best first, and the milliseconds of that one.

    Raises:
        ConfigError: where even the lowest budget takes longer.
    """
    model, fitting = comparison.model, comparison.part(comparison.fitting)
    lowest = lowest_flops(model, fitting, comparison.plan.allowed[0])
    line = _Line(highest_flops(model, fitting), lowest, clock.dense_ms)
    target = line.budget(target_ms)
    for _ in range(2):  # any rule tells what a budget takes; a search for the best one is a matter of minutes
        quick = comparison.quick(target)
        if quick is None:
            break
        target = line.through(quick.relative_flops, clock.measure(quick.pruner)).budget(_AIM * target_ms)
    best: tuple[list[Fit], float] | None = None
    taken = 0.0
    for _ in range(_TRIES):
        fits = comparison.search(target)
        taken = clock.measure(fits[0].pruner)
        if taken <= target_ms:
            best = fits, taken
            if taken >= _NEAR * target_ms or target >= line.highest:
                break
        elif target <= lowest:
            break
        target = line.through(fits[0].relative_flops, taken).budget(_AIM * target_ms)
    if best is None:
        raise ConfigError(
            f"target_ms is {target_ms:g}; pruned to relative FLOPs {target:.3f}, where {lowest:.3f} is the lowest that "
            f"can be reached, a batch takes {taken:.3g} ms on this machine, and {clock.dense_ms:.3g} ms unpruned"
        )
    return best


class _Line:
    """Milliseconds as they grow with relative FLOPs: a straight line through the dense model and one that is pruned."""

    def __init__(self, highest: float, lowest: float, dense_ms: float) -> None:
        self.highest, self.lowest, self._dense_ms = highest, lowest, dense_ms
        self._slope = dense_ms / highest  # until something pruned is measured

    def through(self, flops: float, milliseconds: float) -> "_Line":
        """With a point that was measured."""
        if flops < self.highest - 0.01 and milliseconds < self._dense_ms:
            self._slope = (self._dense_ms - milliseconds) / (self.highest - flops)
        return self

    def budget(self, milliseconds: float) -> float:
        """The relative FLOPs that take so long, no less than can be reached."""
        wanted = self.highest - (self._dense_ms - milliseconds) / self._slope
        return min(self.highest, max(self.lowest, wanted))
