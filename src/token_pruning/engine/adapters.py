"""LoRA and its like (PEFT's adapters), merged into the weights they adapt."""

import copy
import sys
from typing import Any


def with_merged_adapters(model: Any) -> Any:
    """The model without adapters, computing the same up to rounding.

    Args:
        model: a Hugging Face model, whose linear layers and embeddings may be PEFT's.

    Returns:
        The same model where it has no adapters, or one of a kind that cannot be merged; else a copy.
    """
    if "peft" not in sys.modules:  # then nothing of it can be in the model
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return model
    merged = copy.deepcopy(model)
    for name, module in list(merged.named_modules()):
        if not isinstance(module, BaseTunerLayer):
            continue
        try:
            _merge(module)
        except (NotImplementedError, ValueError, RuntimeError):  # what PEFT says of a kind that does not merge
            return model
        parent, _, last = name.rpartition(".")
        setattr(merged.get_submodule(parent), last, module.get_base_layer())
    return merged


def _merge(layer: Any) -> None:
    """Put what the active adapters add into the base layer's weights; adapters that are off add nothing."""
    if layer.disable_adapters:
        if layer.merged:
            layer.unmerge()
    elif names := [name for name in layer.active_adapters if name not in layer.merged_adapters]:
        layer.merge(safe_merge=True, adapter_names=names)
