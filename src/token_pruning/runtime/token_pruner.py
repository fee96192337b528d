"""What pruning adds to a model: the method, and the tensors it decides by."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from token_pruning.errors import ConfigError
from token_pruning.families import ModelShape, Reads
from token_pruning.pruners import FixedThreshold, Pruner
from token_pruning.ragged import Layout, PackedTokens, drop
from token_pruning.runtime.roles import protected


class TokenPruner(nn.Module):
    """What :func:`token_pruning.prune` adds to a model as ``model.token_pruner``: the method and its thresholds.

    Attributes:
        pruner: the method.
        thresholds: ``[layers]`` float32, or None: a parameter where thresholds are learned, else a buffer.
        vocabulary_scores: ``[vocabulary]`` float32, or None: what the vocabulary threshold is compared with.
        probe_weights: those of :class:`token_pruning.Probes`, float32, or None.
        map_weights: those of :class:`token_pruning.DepartureMaps`, float32, or None.
        context_down: of :class:`token_pruning.LinearContext`, float32, or None.
        context_up: likewise.
        correction_weights: those of :class:`token_pruning.Correction`, float32, or None.
        attachment: what pruning put on the model; None in an engine.

    All tensors stay float32 when the model is cast to half precision, since rounding them would change decisions.
    """

    thresholds: Tensor | None
    vocabulary_scores: Tensor | None
    probe_weights: Tensor | None
    map_weights: Tensor | None
    context_down: Tensor | None
    context_up: Tensor | None
    correction_weights: Tensor | None

    def __init__(self, pruner: Pruner, num_layers: int, device: torch.device) -> None:
        """Start from the method's initial thresholds."""
        super().__init__()
        self.attachment: Any = None
        given = {
            "vocabulary_scores": None if pruner.vocabulary is None else pruner.vocabulary.scores,
            "probe_weights": None if pruner.probes is None else pruner.probes.weights,
            "map_weights": None if pruner.maps is None else pruner.maps.weights,
            "context_down": None if pruner.context is None else pruner.context.down,
            "context_up": None if pruner.context is None else pruner.context.up,
            "correction_weights": None if pruner.correction is None else pruner.correction.weights,
        }
        for name, tensor in given.items():
            with torch.inference_mode(False):  # a parameter made in that mode could never be trained
                own = None if tensor is None else tensor.detach().to(device, torch.float32, copy=True)
            self.register_buffer(name, own)
        for name, layers in (
            ("prune_layers", pruner.prune_layers),
            ("probe_layers", pruner.probes and pruner.probes.layers),
            ("map_layers", pruner.maps and pruner.maps.layers),
            ("context_layers", pruner.context and pruner.context.layers),
        ):
            for layer in layers or ():
                if layer > num_layers:
                    raise ConfigError(f"{name} names layer {layer}; the model has {num_layers} layers")
        self.pruner = pruner
        self.num_layers = num_layers
        initial = pruner.initial_thresholds(num_layers)
        if initial is None:
            self.thresholds = None
            return
        with torch.inference_mode(False):
            values = torch.tensor(initial, dtype=torch.float32, device=device)
            if pruner.learned:
                self.thresholds = nn.Parameter(values)
                return
        self.register_buffer("thresholds", values, persistent=pruner.stores_thresholds)

    @property
    def current(self) -> "TokenPruner":
        """Itself; of a wrapper such as PEFT's for ``modules_to_save``, the one that counts just now."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokenPruner":
        """A copy; one that is made alone, as PEFT does, belongs to the same model."""
        if self.attachment is not None and id(self.attachment.model) not in memo:
            memo.setdefault(id(self.attachment), self.attachment)
        copied: TokenPruner = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        def keep_dtype(tensor: Tensor) -> Tensor:
            result: Tensor = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.fit_vocabulary()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.follow_tensors()

    def follow_tensors(self) -> None:
        """Let the method, and so ``config.json``, say what was loaded into its tensors."""
        pruner, loaded, scores = self.pruner, self.thresholds, self.vocabulary_scores
        changed: dict[str, Any] = {}
        if isinstance(pruner, FixedThreshold) and pruner.thresholds and loaded is not None and not loaded.is_meta:
            values = torch.tensor(pruner.thresholds, dtype=torch.float32).tolist()
            if loaded.tolist() != values:
                changed["thresholds"] = tuple(loaded.tolist())
        for name, tensors in (
            ("vocabulary", {"scores": scores}),
            ("probes", {"weights": self.probe_weights}),
            ("maps", {"weights": self.map_weights}),
            ("context", {"down": self.context_down, "up": self.context_up}),
            ("correction", {"weights": self.correction_weights}),
        ):
            setting = getattr(pruner, name)
            if setting is not None and not any(tensor is None or tensor.is_meta for tensor in tensors.values()):
                # Two names of one memory would not go through to other processes.
                own = {key: tensor.detach().clone() for key, tensor in tensors.items() if tensor is not None}
                changed[name] = replace(setting, **own)
        if changed:
            self.pruner = replace(pruner, **changed)
            if self.attachment is not None:
                self.attachment.describe()

    def fit_vocabulary(self) -> None:
        """Follow a vocabulary that may have been resized: new entries score the mean, as unknown ones do."""
        scores, gate = self.vocabulary_scores, self.pruner.vocabulary
        if scores is None or gate is None or self.attachment is None:
            return
        more = self.attachment.base.get_input_embeddings().num_embeddings - len(scores)
        if more:
            mean = scores[scores.isfinite()].mean()
            self.vocabulary_scores = torch.cat([scores[: len(scores) + more], mean.expand(max(0, more))])
            self.pruner = replace(self.pruner, vocabulary=replace(gate, scores=self.vocabulary_scores))

    @property
    def soft(self) -> bool:
        """Whether the next forward pass masks softly instead of removing tokens."""
        return self.training and self.pruner.learned

    def dropping_layers(self) -> list[bool]:
        """Where the method can drop anything with the thresholds there are now, first layer first.

        Attention received is never negative, so nothing is below a threshold of zero; a probe may say anything. One
        device synchronisation.
        """
        pruner, thresholds, layers = self.pruner, self.thresholds, range(1, self.num_layers + 1)
        drops = [pruner.prunes(layer, self.num_layers) for layer in layers]
        if thresholds is None or type(pruner).keep is not FixedThreshold.keep:
            return drops
        return [
            can and (threshold > 0 or self.probe(layer) is not None)
            for layer, can, threshold in zip(layers, drops, thresholds.tolist(), strict=True)
        ]

    def check_fit(self, shape: ModelShape, reads: Reads) -> None:
        """Hold the linear settings against the model.

        Raises:
            ConfigError: for weights of another hidden size, number of layers or size of keys, a correction where no
                single vector is read, or as :meth:`check_maps`.
        """
        for name, tensor in (
            ("probe", self.probe_weights), ("map", self.map_weights), ("correction", self.correction_weights),
            ("context down", self.context_down),
        ):  # fmt: skip
            if tensor is not None and tensor.shape[-1] != shape.hidden_size + 1:
                raise ConfigError(
                    f"{name} weights are for hidden size {tensor.shape[-1] - 1}; the model's is {shape.hidden_size}"
                )
        wanted = [shape.num_layers, 2 * shape.key_size]
        if self.context_up is not None and [*self.context_up.shape[:2]] != wanted:
            raise ConfigError(
                f"context up weights are {[*self.context_up.shape]}; the model has {wanted[0]} layers with {wanted[1]} "
                "numbers of keys and values"
            )
        if self.correction_weights is not None and reads == "all":
            raise ConfigError("correction is for one vector of a text; this model's outputs read all last states")
        self.check_maps(reads)

    def check_maps(self, reads: Reads) -> None:
        """See that every token that may leave has a map, with the thresholds there are now and at other budgets.

        Raises:
            ConfigError: for a layer that tokens may leave after without a map.
        """
        if self.pruner.departed != "map" or reads == "first":
            return
        needed = [layer for layer, drops in enumerate(self.dropping_layers(), start=1) if drops]
        if isinstance(self.pruner, FixedThreshold):
            for budget in self.pruner.budgets or ():
                needed += [layer for layer, threshold in enumerate(budget.thresholds, start=1) if threshold > 0]
        needed += [0] if self.pruner.has_gate else []
        missing = sorted({*needed} - {*self.departure_maps})
        if missing:
            raise ConfigError(
                f"departed is 'map', but map_layers lacks {missing[0]}, "
                + ("where tokens may leave" if missing[0] else "for tokens that never enter")
            )

    def probe(self, layer: int) -> Tensor | None:
        """What says a token's worth in a layer (1-based), ``[hidden + 1]``; None where attention does."""
        probes = self.pruner.probes
        row = None if probes is None else probes.row(layer)
        return None if row is None or self.probe_weights is None else self.probe_weights[row]

    @property
    def departure_maps(self) -> dict[int, Tensor]:
        """By the layer after whose attention a token left, ``[hidden, hidden + 1]`` each."""
        if self.pruner.maps is None or self.map_weights is None:
            return {}
        return dict(zip(self.pruner.maps.layers, self.map_weights, strict=True))

    def enter(self, tokens: PackedTokens) -> tuple[Layout, Tensor | None, Tensor | None]:
        """Drop the tokens that the vocabulary threshold keeps out of the first layer.

        Args:
            tokens: the valid tokens.

        Returns:
            The tokens that enter, and the rows of ``tokens`` that do and that do not, int64; None for both where
            nothing can be dropped.

        Raises:
            ConfigError: where ids are needed and missing.
        """
        threshold = self.pruner.vocabulary_threshold
        if not threshold:
            return tokens.layout, None, None
        if tokens.ids is None:
            raise ConfigError(
                f"vocabulary_threshold is {threshold:g}, which needs input_ids; inputs_embeds will not do"
            )
        assert self.vocabulary_scores is not None
        enters = self.vocabulary_scores[tokens.ids] >= threshold
        stays = protected(tokens, self.pruner)
        if stays is not None:
            enters = enters | stays
        return drop(tokens.layout, enters.index_fill(0, tokens.layout.first_rows, 1))

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return repr(self.pruner)
