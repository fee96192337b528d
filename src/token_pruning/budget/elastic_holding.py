"""Keeping several budgets at once while weights are trained."""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from token_pruning.budget.examples import Batch
from token_pruning.budget.fitting import CLOSE_ENOUGH, Fit, fit_profile, fit_to_budget
from token_pruning.budget.holding import CalibratedHolder, where_tokens_leave
from token_pruning.budget.schedules import Schedule
from token_pruning.pruners import FixedThreshold
from token_pruning.pruners.budgets import Budget, as_json, checked_budgets
from token_pruning.runtime.prune import attachment_of, hugging_face_model, set_budget

_AT_LOWEST = 0.3  # of the steps


class ElasticHolder(CalibratedHolder):
    """The same for a model that is pruned for several budgets: each step takes one of them, drawn at random.

    Three steps in ten take the lowest, which is the hardest, and the others more often a low one than a high one.
    So one set of weights serves them all (as in LengthDrop, arXiv 2010.07003, and slimmable networks, 1812.08928).
    Between two steps the model is at the lowest: that is what is saved and evaluated.
    """

    refits = 10  # each fits as many times as the table has entries

    def __init__(
        self, model: Any, dense: Any, batch: Batch, bf16: bool, seed: int, schedule: Schedule | None = None
    ) -> None:
        """Take down where tokens leave at each budget.

        Args:
            model: pruned for several budgets.
            dense: see :class:`CalibratedHolder`.
            batch: see :class:`CalibratedHolder`.
            bf16: see :class:`CalibratedHolder`.
            seed: of the budgets that are drawn.
            schedule: where tokens leave at every budget; None for what the model's own thresholds do at each.
        """
        self.table = tuple(_pruner_of(model).budgets or ())
        lowest = self.table[0].relative_flops
        set_budget(model, lowest)
        super().__init__(model, dense, batch, lowest, bf16)
        self.seed = seed
        self.given = self.schedule = schedule
        self.strengths: list[float | None] = [None] * len(self.table)
        self.schedules: list[Schedule] | None = None
        if schedule is not None:
            nothing = Schedule("nothing", (0.0,) * len(schedule.weights))
            self.schedules = [*[schedule] * (len(self.table) - 1), nothing]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Go on with the schedules, probes and thresholds that a killed run had."""
        super().on_train_begin(args, state, control, model=model)
        saved = state.stateful_callbacks.get(type(self).__name__)
        found = saved["attributes"] if isinstance(saved, dict) else {}
        if self.given is not None:
            self.schedule = self.given
        elif found.get("schedules") is not None:
            self.schedules = [Schedule(each["name"], tuple(each["weights"])) for each in found["schedules"]]
        if found.get("schedules") is not None:
            self.strengths = found["strengths"]
            self._keep(model, checked_budgets("budgets", found["budgets"]))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        found = super().state()
        schedules = None if self.schedules is None else [asdict(each) for each in self.schedules]
        found["attributes"] |= {"schedules": schedules, "strengths": self.strengths, "budgets": as_json(self.table)}
        return found

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Fit as often as for one budget; then draw this step's."""
        super().on_step_begin(args, state, control, model=model)
        low, high = self.table[0].relative_flops, self.table[-1].relative_flops
        drawn = random.Random(f"{self.seed} {state.global_step}").random()  # the same in a run that goes on
        above = max(0.0, (drawn - _AT_LOWEST) / (1 - _AT_LOWEST))
        set_budget(hugging_face_model(model), low + (high - low) * above**2)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Back to the lowest budget."""
        set_budget(hugging_face_model(model), self.target)

    def fit(self, model: Any) -> Fit | None:  # type: ignore[override]
        """Fit probes, then each budget's thresholds; the model is left at the lowest budget."""
        inner = hugging_face_model(model)
        set_budget(inner, self.target)
        fit = super().fit(model)
        if self.schedules is None:
            self.schedules = [self._at(model, budget, where_tokens_leave) for budget in self.table]
        table = []
        for place, (budget, schedule) in enumerate(zip(self.table, self.schedules, strict=True)):
            found = fit if place == 0 else None
            if place > 0 and sum(schedule.weights) > 0:
                run = partial(_fit_again, schedule=schedule, target=budget.relative_flops, before=self.strengths[place])
                found = self._at(model, budget, run)
            self.strengths[place] = None if found is None else found.strength
            table.append(budget if found is None else replace(budget, thresholds=found.thresholds))
        self._keep(model, table)
        return fit

    def _at(self, model: Any, budget: Budget, run: Callable[..., Any]) -> Any:
        """What a function says of the model at a budget, in evaluation mode, and of the batch."""
        inner = hugging_face_model(model)
        set_budget(inner, budget.relative_flops)
        with self.evaluating(model):
            return run(inner, self.batch)

    def _keep(self, model: Any, table: Sequence[Budget]) -> None:
        inner = hugging_face_model(model)
        self.table = tuple(table)
        attachment_of(inner).token_pruner.pruner = replace(_pruner_of(inner), budgets=self.table)
        set_budget(inner, self.target)


def _fit_again(model: Any, batch: Batch, schedule: Schedule, target: float, before: float | None) -> Fit | None:
    """A fit as strong as the one before, where that still costs as much: one pass in place of several."""
    if before is not None:
        fit = fit_profile(model, batch, schedule, before)
        if abs(fit.relative_flops - target) <= CLOSE_ENOUGH:
            return fit
    return fit_to_budget(model, batch, schedule, target)


def _pruner_of(model: Any) -> FixedThreshold:
    pruner = attachment_of(model).token_pruner.pruner
    assert isinstance(pruner, FixedThreshold)
    return pruner
