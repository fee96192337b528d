"""I-BERT and LTP checkpoints in float mode: RoBERTa under other names, with the quantiser's buffers beside the weights.

The paper's starting points are such checkpoints (``kssteven/ibert-roberta-base``).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from token_pruning.errors import CheckpointError

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


def ltp_thresholds(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Thresholds that the published LTP code learned, or None.

    It stores each layer's offset from ``final_token_threshold · l / L``, counting ``l`` from 0.
    """
    offsets: dict[int, float] = {}
    for name, tensor in weights.items():
        if match := re.search(r"\.layer\.(\d+)\.attention\.self\.pruner\.keep_threshold$", name):
            offsets[int(match[1])] = float(tensor)
    final = config.get("final_token_threshold", (config.get("prune_kwargs") or {}).get("final_token_threshold"))
    if not offsets or not isinstance(final, int | float):
        return None
    return tuple(final * layer / len(offsets) + offset for layer, offset in sorted(offsets.items()))
