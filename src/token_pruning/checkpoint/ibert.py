"""I-BERT and LTP checkpoints in float mode: RoBERTa under other names, with the quantiser's buffers beside the weights.

The paper's starting points are such checkpoints (``kssteven/ibert-roberta-base``).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from token_pruning.checks import number
from token_pruning.errors import CheckpointError, ConfigError

IBERT_MODEL_TYPES = ("ibert", "ltp", "pibert")

_QUANTISER = re.compile(
    r"(_integer|scaling_factor|\.x_min|\.x_max|_activation\.\w+|_act\.\w+|\.act_\w+|\.shift|position_ids|"
    r"\.pruner\.\w+|\.(softmax|activation)\.(act|n|const|coeff)\w*)$"
)


def as_roberta_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """An I-BERT or LTP ``config.json`` as RoBERTa's, pruning keys kept."""
    dropped = {"quant_mode", "force_dequant", "prune_kwargs"}
    architectures = [re.sub(r"^(IBert|LTP|PIBert)", "Roberta", name) for name in config.get("architectures") or []]
    return {
        **{key: value for key, value in config.items() if key not in dropped},
        "model_type": "roberta",
        "architectures": architectures or ["RobertaModel"],
    }


def as_roberta_weights(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """I-BERT's weights under RoBERTa's names, without the quantiser's buffers.

    Raises:
        CheckpointError: if there are no I-BERT weights, or integer ones.
    """
    converted = {
        re.sub(r"^(ibert|ltp|pibert)\.", "roberta.", name): tensor
        for name, tensor in weights.items()
        if not _QUANTISER.search(name)
    }
    for name, tensor in converted.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: weight {name} is {tensor.dtype}; only float-mode I-BERT checkpoints load")
    if not any("encoder.layer." in name for name in converted):
        raise CheckpointError(f"{path} has no encoder layers under I-BERT's names (ibert.encoder.layer.…)")
    return converted


def ltp_thresholds(weights: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> tuple[float, ...] | None:
    """Thresholds that the published LTP code learned, or None.

    It stores each layer's offset from ``final_token_threshold · l / L``, counting ``l`` from 0.

    Raises:
        ConfigError: for a ``final_token_threshold`` or ``prune_kwargs`` that is not allowed.
        CheckpointError: for offsets that are not one number each, or not of the layers 0, 1 and so on.
    """
    offsets: dict[int, Tensor] = {}
    for name, tensor in weights.items():
        if match := re.search(r"\.layer\.(\d+)\.attention\.self\.pruner\.keep_threshold$", name):
            offsets[int(match[1])] = tensor
    if not offsets:
        return None
    if sorted(offsets) != list(range(len(offsets))) or any(tensor.numel() != 1 for tensor in offsets.values()):
        shapes = {layer: list(tensor.shape) for layer, tensor in sorted(offsets.items())}
        raise CheckpointError(f"{path}: keep_threshold has shapes {shapes}; each layer must have one number")
    file, more = path / "config.json", config.get("prune_kwargs") or {}
    if not isinstance(more, Mapping):
        raise ConfigError(f"{file}: prune_kwargs is {more!r}; it must be an object")
    final = config.get("final_token_threshold", more.get("final_token_threshold"))
    if final is None:
        return None
    final = number(f"{file}: final_token_threshold", final, low=0)
    return tuple(final * layer / len(offsets) + offset.item() for layer, offset in sorted(offsets.items()))
