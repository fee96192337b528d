"""Pruning methods, one short file each; a pruner is its own configuration."""

from token_pruning.pruners.absolute import FixedThreshold, LearnedThreshold
from token_pruning.pruners.base import LayerTokens, Pruner
from token_pruning.pruners.relative import RelativeThreshold, RisingThreshold
from token_pruning.pruners.topk import TopK
from token_pruning.pruners.unpruned import Unpruned

__all__ = [
    "FixedThreshold",
    "LayerTokens",
    "LearnedThreshold",
    "Pruner",
    "RelativeThreshold",
    "RisingThreshold",
    "TopK",
    "Unpruned",
]
