"""What every pruning method is: a frozen configuration with one decision per layer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from token_pruning.checks import choice, number, positive_integer, whole_number
from token_pruning.errors import ConfigError
from token_pruning.pruners.fitted import (
    DEPARTED,
    PROTECTED,
    RECEIVED_FROM,
    Correction,
    Departed,
    DepartureMaps,
    LinearContext,
    Probes,
    Protected,
    ReceivedFrom,
)
from token_pruning.pruners.importance import SCORING_MODES, ScoringMode
from token_pruning.pruners.summary import SUMMARY_TOKENS, SummaryTokens
from token_pruning.pruners.vocabulary import VocabularyGate
from token_pruning.ragged.layout import Layout


@dataclass(frozen=True)
class LayerTokens:
    """What a pruner sees of one layer.

    Attributes:
        layer: 1 for the first layer.
        num_layers: number of layers of the model.
        layout: the tokens that entered the layer, packed.
        scores: importance scores, ``[layout.total]`` float32; in a layer with a probe what the probe says.
        input_lengths: tokens of each sequence that entered the first layer, ``[batch]`` int64.
        threshold: this layer's threshold as a float32 scalar, or None for methods without thresholds.
        summaries: ``[layout.total]`` bool, True for a summary token, which stays whatever is decided; None where there
            are none.
        protected: ``[layout.total]`` bool, True for a token that stays whatever is decided, besides first ones; None
            where there are none.
    """

    layer: int
    num_layers: int
    layout: Layout
    scores: Tensor
    input_lengths: Tensor
    threshold: Tensor | None
    summaries: Tensor | None = None
    protected: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Pruner(ABC):
    """The base of every method.

    A method is a dataclass whose fields are its configuration (and its keys in ``config.json``), with a
    ``prune_mode``, and :meth:`keep`. Subclassing registers it under its ``prune_mode``, by which checkpoints and the
    command line know it. The first token of a sequence is kept whatever :meth:`keep` says: heads read it.

    Args:
        scoring_mode: what divides received attention, see :func:`token_pruning.pruners.importance.normalizer`.
        max_seq_length: that divisor in ``"mean"`` mode, and the length "padded" FLOPs are counted for; tokens.
        summary_tokens: whether what is dropped lives on as summary tokens (:mod:`token_pruning.pruners.summary`):
            ``"none"``, ``"shared"`` (one per sequence) or ``"segment"`` (one for each sentence of a pair). The soft
            stage drops nothing, so it has none.
        prune_layers: the layers (1-based) at which tokens may leave; None for all that the method has. Where the
            arithmetic saved is small, as for a single sequence on a GPU, each pruning layer costs more than it saves.
        protect: which tokens never leave, besides the first: ``"separators"``, and ``"first_segment"``, the first text
            of a pair, such as a reranker's query.
        received_from: whose attention counts as importance: that of ``"all"`` tokens, of the ``"first_segment"`` (but
            for the first token and separators), or of the ``"first"`` token. Its mean over a sequence is 1 for each;
            less with ``context``, which receives some.
        departed: what a token that left counts as where all last states are read or pooled: its ``"state"`` when it
            left; nothing, ``"survivors"`` alone count; or ``"map"``, what ``maps`` makes of its state.
        max_tokens: of a longer text only so many tokens enter: its first and last, and evenly spaced spans of eight; of
            a pair the first text whole. None for no limit but the model's.
        chunks: all of a longer text enters instead, in windows of ``max_tokens``, and all of them are pooled together.
        vocabulary: which tokens never enter the first layer (``vocabulary_threshold`` in ``config.json``, the scores
            beside the weights); None for none.
        probes: in which layers a probe says what tokens are worth, not attention (``probe_layers`` in ``config.json``,
            the weights beside the model's); None for none.
        maps: see ``departed`` (``map_layers`` in ``config.json``).
        context: the keys and values that tokens which left go on giving (``context_layers`` in ``config.json``); None
            for none: those that stay attend to one another alone.
        correction: what is made of the pooled vector of a text that lost tokens; None for nothing.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    prune_mode: ClassVar[str]
    learned: ClassVar[bool] = False
    """Whether thresholds are trained: if so, a model in training mode masks softly and removes nothing."""
    required: ClassVar[tuple[str, ...]] = ()
    """Keys of which ``config.json`` must have one, since no default is right for all."""

    scoring_mode: ScoringMode = "mean"
    max_seq_length: int = 128
    summary_tokens: SummaryTokens = "none"
    prune_layers: Sequence[int] | None = None
    protect: Sequence[Protected] = ()
    received_from: ReceivedFrom = "all"
    departed: Departed = "state"
    max_tokens: int | None = None
    chunks: bool = False
    vocabulary: VocabularyGate | None = None
    probes: Probes | None = None
    maps: DepartureMaps | None = None
    context: LinearContext | None = None
    correction: Correction | None = None

    def __init_subclass__(cls, *, registered: bool = True, **kwargs: Any) -> None:
        """Register the method, unless it is not for checkpoints."""
        super().__init_subclass__(**kwargs)
        if "__repr__" not in cls.__dict__:
            cls.__repr__ = Pruner.__repr__  # type: ignore[method-assign]  # else dataclass writes one
        if registered:
            (_LEARNED if cls.learned else _METHODS)[cls.prune_mode] = cls

    def __repr__(self) -> str:
        """What differs from the defaults, which are many."""
        shown = [(f, repr(getattr(self, f.name))) for f in fields(self) if f.repr]
        changed = [f"{f.name}={value}" for f, value in shown if value != _default(f)]
        return f"{type(self).__qualname__}({', '.join(changed)})"

    def __post_init__(self) -> None:
        """Check the configuration."""
        choice("scoring_mode", self.scoring_mode, SCORING_MODES)
        positive_integer("max_seq_length", self.max_seq_length)
        choice("summary_tokens", self.summary_tokens, SUMMARY_TOKENS)
        for name, kind in _TENSOR_SETTINGS.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ConfigError(f"{name} is {value!r}; it must be a {kind.__name__}")
        self._check_roles()
        if self.prune_layers is not None:
            if isinstance(self.prune_layers, str) or not isinstance(self.prune_layers, Sequence):
                raise ConfigError(f"prune_layers is {self.prune_layers!r}; it must be a list of layers, the first is 1")
            layers = [positive_integer(f"prune_layers[{i}]", layer) for i, layer in enumerate(self.prune_layers)]
            object.__setattr__(self, "prune_layers", tuple(sorted(set(layers))))

    def _check_roles(self) -> None:
        if isinstance(self.protect, str) or not isinstance(self.protect, Sequence):
            raise ConfigError(f"protect is {self.protect!r}; it must be a list of {', '.join(PROTECTED)}")
        protect = {choice(f"protect[{i}]", role, PROTECTED) for i, role in enumerate(self.protect)}
        object.__setattr__(self, "protect", tuple(sorted(protect)))
        choice("received_from", self.received_from, RECEIVED_FROM)
        choice("departed", self.departed, DEPARTED)
        if self.max_tokens is not None:
            whole_number("max_tokens", self.max_tokens, low=_FEWEST_TOKENS, high=2**31 - 1)
        if not isinstance(self.chunks, bool):
            raise ConfigError(f"chunks is {self.chunks!r}; it must be true or false")
        if self.chunks and self.max_tokens is None:
            raise ConfigError("chunks is true, but max_tokens, the size of a window, is missing")
        if self.departed == "map" and self.maps is None:
            raise ConfigError(
                "departed is 'map', but there are no maps of what left: token_pruning.calibrate makes them"
            )
        if self.context is not None and self.summary_tokens != "none":
            raise ConfigError(
                f"summary_tokens is {self.summary_tokens!r}; with context it must be none: what left is attended to "
                "one by one"
            )
        if self.probes is not None and self.summary_tokens != "none":
            raise ConfigError(
                f"summary_tokens is {self.summary_tokens!r}; with probes it must be none: summaries are weighted by "
                "attention received"
            )

    @abstractmethod
    def keep(self, tokens: LayerTokens) -> Tensor:
        """Which tokens stay after this layer's attention: ``[tokens.layout.total]`` bool."""

    def checked_keep(self, tokens: LayerTokens) -> Tensor:
        """:meth:`keep`, held to its contract.

        Raises:
            ValueError: if what it returns is not ``[tokens.layout.total]`` bool.
        """
        keep = self.keep(tokens)
        if keep.shape != tokens.scores.shape or keep.dtype != torch.bool:
            raise ValueError(
                f"{type(self).__name__}.keep returned {keep.dtype} of shape {list(keep.shape)}; it must be torch.bool "
                f"of shape {list(tokens.scores.shape)}, one for each token of the layer"
            )
        return keep

    def compared(self, tokens: LayerTokens) -> tuple[Tensor, Tensor | None]:
        """What :meth:`keep` decides by, for who asks why (:func:`token_pruning.explain`).

        Returns:
            A value of each token, and what it leaves below, ``[tokens.layout.total]`` float32 each; None for the second
            where there is no such number.
        """
        threshold = tokens.threshold
        return tokens.scores, None if threshold is None else threshold.expand_as(tokens.scores)

    def prunes(self, layer: int, num_layers: int) -> bool:
        """Whether anything can be dropped at ``layer`` (1-based); where not, no importance is computed."""
        return self.prune_layers is None or layer in self.prune_layers

    def initial_thresholds(self, num_layers: int) -> Sequence[float] | None:
        """One threshold per layer to start from, or None for methods without thresholds."""
        return None

    @property
    def stores_thresholds(self) -> bool:
        """Whether thresholds must be saved as a tensor, because the configuration does not determine them."""
        return self.learned

    @property
    def vocabulary_threshold(self) -> float | None:
        """The score below which tokens never enter the first layer; None if all enter."""
        return None if self.vocabulary is None else self.vocabulary.threshold or None

    @property
    def has_gate(self) -> bool:
        """Whether tokens may be kept out of the first layer."""
        return self.vocabulary_threshold is not None

    def context_cuts(self, num_layers: int) -> tuple[int, ...]:
        """Where tokens that leave are attended to still in a later layer; 0 for those that never enter the first."""
        return () if self.context is None else tuple(layer for layer in self.context.layers if layer < num_layers)

    def config(self) -> dict[str, Any]:
        """The keys of ``config.json`` that describe this method; a value of None means that the key must be absent."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TENSOR_SETTINGS}
        values["vocabulary_threshold"] = self.vocabulary_threshold
        values["probe_layers"] = None if self.probes is None else list(self.probes.layers)
        values["map_layers"] = None if self.maps is None else list(self.maps.layers)
        values["context_layers"] = None if self.context is None else list(self.context.layers)
        for name, default in _LEFT_OUT.items():
            if values[name] == default:
                values[name] = None
        for name in ("prune_layers", "protect"):
            if values[name] is not None:
                values[name] = list(values[name])
        return {"prune_mode": self.prune_mode, "masking_mode": "soft" if self.learned else "hard", **values}


def _default(field: Field[Any]) -> str | None:
    """A field's default as it is written; None for one without."""
    if field.default_factory is not MISSING:
        return repr(field.default_factory())
    return None if field.default is MISSING else repr(field.default)


_FEWEST_TOKENS = 16  # of max_tokens: the first, the last and a span between them
# Settings whose tensors stand beside the model's weights.
_TENSOR_SETTINGS = {
    "vocabulary": VocabularyGate,
    "probes": Probes,
    "maps": DepartureMaps,
    "context": LinearContext,
    "correction": Correction,
}
# Defaults that config.json is not filled with.
_LEFT_OUT = {"summary_tokens": "none", "protect": (), "received_from": "all", "departed": "state", "chunks": False}
# Fields that go by another name in config.json; transformers would take "temperature" for a generation setting.
_OTHER_KEYS = {
    "temperature": "threshold_temperature",
    "vocabulary": "vocabulary_threshold",
    "probes": "probe_layers",
    "maps": "map_layers",
    "context": "context_layers",
}
# What a setting does not go without, as small as can be.
_COMPANIONS: dict[str, dict[str, Any]] = {
    "budgets": {"vocabulary": VocabularyGate(torch.zeros(1, device="cpu"))},
    "chunks": {"max_tokens": _FEWEST_TOKENS},
    "departed": {"maps": DepartureMaps([0], torch.zeros(1, 1, 2, device="cpu"))},
}
_METHODS: dict[str, type[Pruner]] = {}
_LEARNED: dict[str, type[Pruner]] = {}


def methods() -> dict[str, type[Pruner]]:
    """The methods there are by their ``prune_mode``, those of other packages included once these are imported."""
    return dict(_METHODS)


def method_keys() -> set[str]:
    """Every key of ``config.json`` that belongs to a method."""
    names = {f.name for cls in (*_METHODS.values(), *_LEARNED.values()) for f in fields(cls)} - {"correction"}
    return {"prune_mode", "masking_mode", *(_OTHER_KEYS.get(name, name) for name in names)}


def ignored_keys(config: Mapping[str, Any]) -> list[str]:
    """Keys that belong to methods, but to none of ``config``'s ``prune_mode``: they change nothing."""
    mode = config["prune_mode"]
    classes = [cls for cls in (_METHODS.get(mode), _LEARNED.get(mode)) if cls is not None]
    own = {_OTHER_KEYS.get(f.name, f.name) for cls in classes for f in fields(cls)}
    names = method_keys() - own - {"prune_mode", "masking_mode"}
    return sorted(key for key in names if config.get(key) is not None)


def check_keys(keys: Mapping[str, Any]) -> None:
    """Check some keys of ``config.json`` before the others are known: each must be right for one of the methods.

    Args:
        keys: those given; with a ``prune_mode`` only its method counts.

    Raises:
        ConfigError: for the first value that no method allows.
    """
    mode = keys.get("prune_mode")
    if mode is not None:
        choice("prune_mode", mode, _METHODS)
    if keys.get("vocabulary_threshold") is not None:
        number("vocabulary_threshold", keys["vocabulary_threshold"], low=0)
    classes = list(_METHODS.values()) if mode is None else [_METHODS[mode]]
    for name, value in keys.items():
        wrong = [_problem(cls, name, value) for cls in classes if name in {f.name for f in fields(cls)}]
        if wrong and None not in wrong:
            raise ConfigError(str(wrong[0]))


def _problem(cls: type[Pruner], name: str, value: Any) -> ConfigError | None:
    """What a method says of one value, with its defaults for all others that it can do with."""
    if any(f.default is MISSING and f.default_factory is MISSING for f in fields(cls)):
        return None
    try:
        cls(**{name: value, **_COMPANIONS.get(name, {})})
    except ConfigError as error:
        return error
    return None


def pruner_from_config(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor] = MappingProxyType({}),
    *,
    learned: bool = False,
    temperature: float | None = None,
) -> Pruner:
    """The method that ``config.json``'s keys name.

    Args:
        config: the keys; others are ignored, as are those with a value of None.
        tensors: those found beside the weights, by their names in
            :class:`token_pruning.runtime.token_pruner.TokenPruner`; a list of thresholds in the config wins.
        learned: the method that trains the thresholds, where there is one.
        temperature: its temperature, instead of the config's.

    Raises:
        ConfigError: for a missing or unknown ``prune_mode``, or a key that is missing or has a value that is not
            allowed.
    """
    config = {key: value for key, value in config.items() if value is not None}
    if "prune_mode" not in config:
        raise ConfigError(f"prune_mode is missing; it must be one of {', '.join(_METHODS)}")
    mode = choice("prune_mode", config["prune_mode"], _METHODS)
    choice("masking_mode", config.get("masking_mode", "hard"), ("soft", "hard"))
    cls = (_LEARNED.get(mode) if learned else None) or _METHODS[mode]
    names = [f.name for f in fields(cls) if f.name not in _TENSOR_SETTINGS]
    values = {name: config[name] for name in names if name in config}
    if "thresholds" in tensors and "thresholds" in names:
        values.setdefault("thresholds", tuple(tensors["thresholds"].reshape(-1).tolist()))
    if cls.required and not any(values.get(key) not in (None, [], ()) for key in cls.required):
        raise ConfigError(f"{cls.required[0]} is missing; prune_mode {mode!r} needs it")
    if "vocabulary_scores" in tensors:
        values["vocabulary"] = VocabularyGate(tensors["vocabulary_scores"], config.get("vocabulary_threshold", 0.0))
    elif config.get("vocabulary_threshold"):
        raise ConfigError(
            f"vocabulary_threshold is {config['vocabulary_threshold']!r}, but the model has no vocabulary scores to "
            "compare with it: make them with vocabulary_gate(model, examples)"
        )
    for name, kind in (("probe", Probes), ("map", DepartureMaps)):
        layers, weights = config.get(f"{name}_layers"), tensors.get(f"{name}_weights")
        if weights is None and layers is not None:
            raise ConfigError(f"{name}_layers is {layers!r}, but the model has no weights token_pruner.{name}_weights")
        if weights is not None and layers is None:
            raise ConfigError(f"the model has weights token_pruner.{name}_weights, but {name}_layers is missing")
        if weights is not None and layers is not None:
            values[f"{name}s"] = kind(layers, weights)
    values |= _context(config.get("context_layers"), tensors)
    if "correction_weights" in tensors:
        values["correction"] = Correction(tensors["correction_weights"])
    if cls.learned:
        values["temperature"] = config.get("threshold_temperature", 1e-3) if temperature is None else temperature
    return cls(**values)


def _context(layers: Any, tensors: Mapping[str, Tensor]) -> dict[str, LinearContext]:
    """The context that a checkpoint has."""
    missing = [name for name in ("context_down", "context_up") if name not in tensors]
    if len(missing) == 2 and layers is None:
        return {}
    if layers is None:
        raise ConfigError("the model has weights token_pruner.context_…, but context_layers is missing")
    if missing:
        raise ConfigError(f"context_layers is {layers!r}, but the model has no weights token_pruner.{missing[0]}")
    return {"context": LinearContext(layers, tensors["context_down"], tensors["context_up"])}
