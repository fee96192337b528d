"""Pruning methods, one short file each; a pruner is its own configuration. Importing a method registers it."""

from token_pruning.pruners.absolute import FixedThreshold, LearnedThreshold
from token_pruning.pruners.base import (
    LayerTokens,
    Pruner,
    check_keys,
    ignored_keys,
    method_keys,
    methods,
    pruner_from_config,
)
from token_pruning.pruners.budgets import Budget
from token_pruning.pruners.fitted import Correction, DepartureMaps, LinearContext, Probes
from token_pruning.pruners.relative import RelativeThreshold, RisingThreshold
from token_pruning.pruners.topk import TopK
from token_pruning.pruners.unpruned import Unpruned
from token_pruning.pruners.vocabulary import VocabularyGate

__all__ = [
    "Budget",
    "Correction",
    "DepartureMaps",
    "FixedThreshold",
    "LayerTokens",
    "LearnedThreshold",
    "LinearContext",
    "Probes",
    "Pruner",
    "RelativeThreshold",
    "RisingThreshold",
    "TopK",
    "Unpruned",
    "VocabularyGate",
    "check_keys",
    "ignored_keys",
    "method_keys",
    "methods",
    "pruner_from_config",
]
