"""What pruning adds to a model: the method, and the tensors it decides by."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from token_pruning.errors import ConfigError
from token_pruning.pruners import FixedThreshold, Pruner
from token_pruning.ragged import Layout, PackedTokens, drop


class TokenPruner(nn.Module):
    """What :func:`token_pruning.prune` adds to a model as ``model.token_pruner``: the method and its thresholds.

    Attributes:
        pruner: the method.
        thresholds: ``[layers]`` float32, or None: a parameter where thresholds are learned, else a buffer.
        vocabulary_scores: ``[vocabulary]`` float32, or None: what the vocabulary threshold is compared with.
        attachment: what pruning put on the model; None in an engine.

    Both tensors stay float32 when the model is cast to half precision, since rounding them would change decisions.
    """

    thresholds: Tensor | None
    vocabulary_scores: Tensor | None

    def __init__(self, pruner: Pruner, num_layers: int, device: torch.device) -> None:
        """Start from the method's initial thresholds."""
        super().__init__()
        self.attachment: Any = None
        gate = pruner.vocabulary
        with torch.inference_mode(False):  # a parameter made in that mode could never be trained
            scores = None if gate is None else gate.scores.to(device, torch.float32, copy=True)
        self.register_buffer("vocabulary_scores", scores)
        for layer in pruner.prune_layers or ():
            if layer > num_layers:
                raise ConfigError(f"prune_layers names layer {layer}; the model has {num_layers} layers")
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
        self._follow_tensors()

    def _follow_tensors(self) -> None:
        """Let the method, and so ``config.json``, say what was loaded into its tensors."""
        pruner, loaded, scores = self.pruner, self.thresholds, self.vocabulary_scores
        changed: dict[str, Any] = {}
        if isinstance(pruner, FixedThreshold) and pruner.thresholds and loaded is not None and not loaded.is_meta:
            values = torch.tensor(pruner.thresholds, dtype=torch.float32).tolist()
            if loaded.tolist() != values:
                changed["thresholds"] = tuple(loaded.tolist())
        if pruner.vocabulary is not None and scores is not None and not scores.is_meta:
            changed["vocabulary"] = replace(pruner.vocabulary, scores=scores)
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

        Importance is never negative, so nothing is below a threshold of zero. One device synchronisation.
        """
        layers = range(1, self.num_layers + 1)
        drops = [self.pruner.prunes(layer, self.num_layers) for layer in layers]
        if self.thresholds is None or type(self.pruner).keep is not FixedThreshold.keep:
            return drops
        return [can and threshold > 0 for can, threshold in zip(drops, self.thresholds.tolist(), strict=True)]

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
        return drop(tokens.layout, enters.index_fill(0, tokens.layout.first_rows, True))

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return repr(self.pruner)
