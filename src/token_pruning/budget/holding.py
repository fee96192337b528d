"""Keeping a budget while weights are trained: thresholds follow what the weights make of importance."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, ProgressCallback

from token_pruning.budget.examples import Batch
from token_pruning.budget.fitting import (
    Fit,
    fit_to_budget,
    in_parts,
    outputs_of,
    profile_of,
    prunable_layers,
)
from token_pruning.budget.ridge import Ridge
from token_pruning.budget.schedules import Schedule, named_schedule
from token_pruning.pruners import FixedThreshold, Probes
from token_pruning.pruners.budgets import DROP_EVERYTHING
from token_pruning.ragged import Layout
from token_pruning.runtime.loop import PackedLoop
from token_pruning.runtime.prune import attachment_of, hugging_face_model, prunable, set_thresholds

logger = logging.getLogger(__name__)

_REFIT_TOKENS, _FEWEST = 5000, 64  # of the held-out texts that each but the last is fitted to, and texts
_PENALTY = 1e-3  # of a probe's change


class BudgetHolder(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keeps a hard stage at its budget: thresholds are fitted to held-out training examples again and again.

    Attributes:
        refits: how often over a training.
    """

    refits = 30

    def __init__(self, batch: Mapping[str, Tensor], target: float, schedule: Schedule | None, bf16: bool) -> None:
        """Nothing is fitted yet.

        Args:
            batch: held-out training examples, one padded batch.
            target: relative FLOPs.
            schedule: where tokens leave; None for what the model's own thresholds do when the hard stage begins.
            bf16: whether the model is run in bfloat16 autocast.
        """
        self.batch, self.target, self.schedule, self.bf16 = batch, target, schedule, bf16

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on with the schedule that a killed run has found."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        schedule = saved["attributes"]["schedule"] if isinstance(saved, dict) else None
        if self.schedule is None and schedule is not None:
            self.schedule = Schedule(schedule["name"], tuple(schedule["weights"]))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        schedule = None if self.schedule is None else asdict(self.schedule)
        return {"args": {"target": self.target}, "attributes": {"schedule": schedule}}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Fit at the beginning, and from then on at even distances."""
        token_pruner = attachment_of(model).token_pruner
        learns = token_pruner.thresholds is not None and token_pruner.thresholds.requires_grad
        if token_pruner.soft or (learns and state.global_step > 0):
            return
        if learns:
            # Before a run's first step the Trainer has the model in evaluation mode, where nothing is soft: a soft
            # stage starts from fitted thresholds, which say nothing yet of where tokens should leave.
            schedule = self.schedule
            self.fit(model)
            self.schedule = schedule
            return
        every = max(1, ceil(state.max_steps / self.refits))
        if self.schedule is None or state.global_step % every == 0:
            self.fit(model)

    def fit(self, model: Any) -> Fit:
        """Set the model's thresholds to what costs the budget on the held-out examples."""
        with self.evaluating(model):
            fit = self._fit_thresholds(model)
            if fit is None:
                logger.warning(
                    "no token leaves early enough for a budget of %g; from now on they leave as late as it allows",
                    self.target,
                )
                self.schedule = named_schedule("drain", prunable_layers(model))
                fit = self._fit_thresholds(model)
        assert fit is not None  # everything after the first layer reaches every budget that check_target lets pass
        set_thresholds(model, fit.thresholds)
        return fit

    def _where(self, model: Any) -> Schedule | None:
        """The schedule, which the model's own thresholds say at first; None where no token leaves."""
        if self.schedule is None:
            self.schedule = where_tokens_leave(model, self.batch)
        return self.schedule if any(self.schedule.weights) else None

    def _fit_thresholds(self, model: Any) -> Fit | None:
        """With tokens leaving where they do; None where none does, or not early enough for the budget."""
        schedule = self._where(model)
        return None if schedule is None else fit_to_budget(model, self.batch, schedule, self.target)

    def finish(self, model: Any) -> Fit | None:
        """Fit once more, when training is over."""
        return self.fit(model)

    @contextmanager
    def evaluating(self, model: Any) -> Iterator[None]:
        """Inside, the model is evaluated as it is trained, perhaps in autocast, and its method has what was learned."""
        attachment_of(model).token_pruner.follow_tensors()
        training = model.training
        model.eval()
        try:
            with torch.autocast(attachment_of(model).model.device.type, torch.bfloat16, enabled=self.bf16):
                yield
        finally:
            model.train(training)


def where_tokens_leave(model: Any, batch: Batch) -> Schedule:
    """The schedule of a model's thresholds; its weights are all 0 where no token leaves.

    At full strength everything leaves where the first tokens do now, so that it also serves lower budgets: the more
    leaves in each layer, the fewer layers have anything left.
    """
    found = profile_of(model, batch)
    first = next((weight for weight in found.weights if weight), 1.0)
    return Schedule(found.name, tuple(weight / first for weight in found.weights))


class CalibratedHolder(BudgetHolder):
    """The same for a calibrated model that learns from the dense one: its probes follow the weights, too.

    A probe says of a token's state what it said of the dense model's state of that token. Where a vocabulary gate alone
    decides there is nothing to follow: what it lets in depends on no weights.
    """

    def __init__(
        self, model: Any, dense: Any, batch: Batch, target: float, bf16: bool, schedule: Schedule | None = None
    ) -> None:
        """Take down where tokens leave.

        Args:
            model: calibrated.
            dense: what it was calibrated from, not pruned; None where probes stay as they are.
            batch: held-out texts, one padded batch.
            target: relative FLOPs.
            bf16: whether the model is run in bfloat16 autocast.
            schedule: see :class:`BudgetHolder`.
        """
        super().__init__(_some(batch), target, schedule, bf16)
        self.dense, self.whole = dense, batch
        self.pruner = attachment_of(model).token_pruner.pruner
        self._said: list[dict[int, Tensor]] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Go on with the schedule and from the probes that a killed run began with."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, dict):
            self.schedule = self._said = None  # what was fitted to the checkpoint
        super().on_train_begin(args, state, control)
        probes = saved["attributes"]["probes"] if isinstance(saved, dict) else None
        if probes is not None and self.pruner.probes is not None:
            weights = torch.tensor(probes, dtype=torch.float32)
            self.pruner = replace(self.pruner, probes=replace(self.pruner.probes, weights=weights))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        found = super().state()
        probes = self.pruner.probes
        found["attributes"]["probes"] = None if probes is None else probes.weights.tolist()
        return found

    def fit(self, model: Any) -> Fit | None:  # type: ignore[override]
        """Fit probes, then thresholds; None where there are none to fit, or none reach the budget."""
        inner = hugging_face_model(model)
        with self.evaluating(model):
            if self._where(inner) is not None and self.pruner.probes is not None and self.dense is not None:
                self._fit_probes(inner)
            fit = self._fit_thresholds(inner)
        if fit is not None:
            set_thresholds(inner, fit.thresholds)
        return fit

    def finish(self, model: Any) -> Fit | None:
        """Fit to all of the held-out texts, when training is over."""
        self.batch, self._said = self.whole, None
        return self.fit(model)

    def _fit_probes(self, model: Any) -> None:
        """By least squares on what is missing of what they said at first, so that few texts change little."""
        if self._said is None:
            assert isinstance(self.pruner, FixedThreshold) and self.pruner.thresholds is not None
            first = self.pruner.probes
            assert first is not None
            everything = [-DROP_EVERYTHING] * len(self.pruner.thresholds)
            with prunable(self.dense, replace(self.pruner, thresholds=everything), attachment_of(model).reads):
                self._said = [
                    {
                        layer: layout.grid(_said(states, first.weights[first.layers.index(layer)]))
                        for layer, (layout, states) in seen.items()
                    }
                    for seen in _probed_states(self.dense, self.batch)
                ]
        token_pruner = attachment_of(model).token_pruner
        probes, own = token_pruner.pruner.probes, token_pruner.probe_weights
        assert probes is not None and own is not None
        ridges = {layer: Ridge() for layer in probes.layers}
        for seen, said in zip(_probed_states(model, self.batch), self._said, strict=True):
            for layer, (layout, states) in seen.items():
                wanted = said[layer].flatten()[layout.indices]
                now = _said(states, own[probes.layers.index(layer)])
                ridges[layer].add(states, (wanted - now)[:, None])
        own += torch.stack([ridge.solve(_PENALTY)[0] for ridge in ridges.values()]).to(own)
        token_pruner.pruner = replace(token_pruner.pruner, probes=Probes(probes.layers, own.clone()))


def _some(batch: Batch) -> dict[str, Tensor]:
    """The first texts: as many as have 5,000 tokens, at least 64. More would take longer than the training."""
    tokens = batch["attention_mask"].sum(1).cumsum(0)
    count = max(_FEWEST, int((tokens <= _REFIT_TOKENS).sum()))
    return {name: values[:count] for name, values in batch.items()}


class Bar(ProgressCallback):  # type: ignore[misc]
    """A bar, and no dictionaries."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Say nothing."""


class _Probed(PackedLoop):
    """Keeps the states that probes see."""

    def __init__(self, *args: Any, passes: "list[_Probed]", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[int, tuple[Layout, Tensor]] = {}
        passes.append(self)

    def states(self, number: int, rows: Tensor) -> Tensor:
        found = super().states(number, rows)
        self.seen[number] = (self.decisions.entering(number), found.float())
        return found


def _probed_states(model: Any, batch: Batch) -> Iterator[dict[int, tuple[Layout, Tensor]]]:
    """By layer, the tokens that a probe sees and their states ``[tokens, dim]``, a part of the batch at a time."""
    passes: list[_Probed] = []
    with attachment_of(model).looping(partial(_Probed, passes=passes)):
        for part in in_parts(batch):
            outputs_of(model, part)
            [done] = passes
            passes.clear()
            yield done.seen


def _said(states: Tensor, probe: Tensor) -> Tensor:
    probe = probe.to(states)
    return states @ probe[:-1] + probe[-1]
