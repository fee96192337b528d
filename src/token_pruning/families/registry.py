"""The families this package knows, and how to find a model's."""

from typing import Any

from token_pruning.errors import UnsupportedModelError
from token_pruning.families.base import Family, ModelShape
from token_pruning.families.bert import BERT, ROBERTA
from token_pruning.families.distilbert import DISTILBERT

FAMILIES: tuple[Family, ...] = (BERT, ROBERTA, DISTILBERT)


def supported_model_types() -> list[str]:
    """The values of ``config.model_type`` that can be pruned, sorted."""
    return sorted(model_type for family in FAMILIES for model_type in family.model_types)


def family_of(config: Any) -> Family:
    """The adapter for a model's config.

    Raises:
        UnsupportedModelError: if there is none, or the model is a decoder.
    """
    model_type = getattr(config, "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            if getattr(config, "is_decoder", False):
                raise UnsupportedModelError(
                    f"model type {model_type!r} as a decoder cannot be pruned; only encoders can"
                )
            return family
    raise UnsupportedModelError(
        f"model type {model_type!r} is not supported; supported are {', '.join(supported_model_types())}"
    )


def shape_of(config: Any) -> ModelShape:
    """A model's sizes from its config.

    Raises:
        UnsupportedModelError: see :func:`family_of`.
    """
    return family_of(config).shape(config)
