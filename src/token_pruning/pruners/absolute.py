"""Absolute thresholds: a token leaves when its importance is below its layer's threshold (Learned Token Pruning)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from token_pruning.checks import number
from token_pruning.errors import ConfigError
from token_pruning.pruners.base import LayerTokens, Pruner
from token_pruning.pruners.budgets import Budget, as_json, checked_budgets


@dataclass(frozen=True, kw_only=True)
class FixedThreshold(Pruner):
    """Thresholds that are never trained: the manual baseline, and the hard stage after thresholds were learned.

    Token ``i`` leaves after layer ``l``'s attention iff ``s_i < θ_l`` (arXiv 2107.00910, equation 3), in training as
    in inference.

    Args:
        final_token_threshold: the last layer's threshold; layer ``l`` of ``L`` gets ``final_token_threshold · l / L``.
        thresholds: one threshold per layer instead, first layer first.
        budgets: thresholds for other costs, which rise (:class:`token_pruning.pruners.Budget`), for
            :func:`token_pruning.set_budget`; None for none. :func:`token_pruning.calibrate` makes them.

    Raises:
        ConfigError: for a value that is not a finite number, a negative ``final_token_threshold``, or budgets that do
            not rise, or have a vocabulary threshold where there is no gate.
    """

    prune_mode: ClassVar[str] = "absolute_threshold"
    required: ClassVar[tuple[str, ...]] = ("final_token_threshold", "thresholds")

    final_token_threshold: float = 0.01
    thresholds: Sequence[float] | None = None
    budgets: Sequence[Budget] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check the configuration."""
        super().__post_init__()
        number("final_token_threshold", self.final_token_threshold, low=0)
        if self.thresholds is not None:
            if isinstance(self.thresholds, str) or not isinstance(self.thresholds, Sequence):
                raise ConfigError(f"thresholds is {self.thresholds!r}; it must be a list with one number per layer")
            values = tuple(number(f"thresholds[{i}]", value) for i, value in enumerate(self.thresholds))
            object.__setattr__(self, "thresholds", values)
        if self.budgets is not None:
            budgets = checked_budgets("budgets", self.budgets)
            if self.vocabulary is None and any(budget.vocabulary_threshold for budget in budgets):
                raise ConfigError("budgets has a vocabulary_threshold, but the model has no vocabulary scores")
            object.__setattr__(self, "budgets", budgets)

    def initial_thresholds(self, num_layers: int) -> Sequence[float]:
        """The given thresholds, or the linear rule."""
        if self.thresholds is None:
            return [self.final_token_threshold * layer / num_layers for layer in range(1, num_layers + 1)]
        if len(self.thresholds) != num_layers:
            raise ConfigError(f"thresholds has {len(self.thresholds)} values; the model has {num_layers} layers")
        for i, budget in enumerate(self.budgets or ()):
            if len(budget.thresholds) != num_layers:
                raise ConfigError(
                    f"budgets[{i}] has {len(budget.thresholds)} thresholds; the model has {num_layers} layers"
                )
        return self.thresholds

    @property
    def stores_thresholds(self) -> bool:
        """The linear rule needs no tensor: an edit of ``config.json`` then decides."""
        return self.thresholds is not None

    def at(self, budget: Budget) -> "FixedThreshold":
        """The same method with a budget's thresholds."""
        gate = None if self.vocabulary is None else self.vocabulary.at(budget.vocabulary_threshold)
        return replace(self, thresholds=budget.thresholds, vocabulary=gate)

    @property
    def has_gate(self) -> bool:
        """Whether a vocabulary threshold keeps tokens out, now or at another budget."""
        return super().has_gate or any(budget.vocabulary_threshold for budget in self.budgets or ())

    def config(self) -> dict[str, Any]:
        """See :meth:`Pruner.config`."""
        return {**super().config(), "budgets": None if self.budgets is None else as_json(self.budgets)}

    def keep(self, tokens: LayerTokens) -> Tensor:
        """``s_i >= θ_l``."""
        assert tokens.threshold is not None
        return tokens.scores >= tokens.threshold


@dataclass(frozen=True, kw_only=True)
class LearnedThreshold(FixedThreshold):
    """Learned Token Pruning's soft stage (arXiv 2107.00910, section 3.3): thresholds are trained with the weights.

    Like dropout it follows the model's mode. In training nothing is removed; each layer's output is multiplied by
    ``m_i = σ((s_i − θ_l) / T)``, with ``m = 1`` for the first token, which is never pruned. In evaluation tokens are
    removed as by :class:`FixedThreshold`.

    Args:
        temperature: ``T``.

    Raises:
        ConfigError: for a temperature that is not above 0, besides :class:`FixedThreshold`'s.
    """

    learned: ClassVar[bool] = True

    temperature: float = 1e-3

    def __post_init__(self) -> None:
        """Check the configuration."""
        super().__post_init__()
        number("temperature", self.temperature, above=0)
        object.__setattr__(self, "budgets", None)  # what was fitted to others is nothing beside trained thresholds

    @property
    def stores_thresholds(self) -> bool:
        """Trained values exist nowhere else."""
        return True

    def config(self) -> dict[str, Any]:
        """Without ``thresholds``: the trained ones are saved with the weights."""
        values = super().config()
        values["threshold_temperature"] = values.pop("temperature")
        return {**values, "thresholds": None}

    def soft_mask(self, tokens: LayerTokens) -> Tensor:
        """``m_i`` in (0, 1], ``[tokens.layout.total]`` float32, differentiable in the scores and the threshold."""
        assert tokens.threshold is not None
        mask = ((tokens.scores - tokens.threshold) / self.temperature).sigmoid()
        return mask.index_fill(0, tokens.layout.first_rows, 1.0)
