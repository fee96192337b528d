"""Encoder Transformers that drop the tokens they do not need.

import token_pruning as tp
tp.prune(model, tp.LearnedThreshold(final_token_threshold=0.01))
with tp.record(model) as trace:
    model(**batch)
"""

from token_pruning import interrupts as _interrupts  # noqa: F401 - before what takes long
from token_pruning.budget.calibration import Calibration, calibrate
from token_pruning.budget.distillation import Distilled, distill
from token_pruning.budget.schedules import Schedule
from token_pruning.budget.vocabulary import vocabulary_gate
from token_pruning.checkpoint import from_pretrained
from token_pruning.engine import Engine, compile
from token_pruning.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    TokenPruningError,
    UnsupportedModelError,
)
from token_pruning.integrations import LIBRARIES as _LIBRARIES  # noqa: F401 - their models are known now
from token_pruning.integrations.export import export
from token_pruning.pruners import (
    Correction,
    DepartureMaps,
    FixedThreshold,
    LearnedThreshold,
    LinearContext,
    Probes,
    Pruner,
    RelativeThreshold,
    RisingThreshold,
    TopK,
    Unpruned,
    VocabularyGate,
)
from token_pruning.pruners.importance import convert_scores
from token_pruning.runtime.explanation import Explanation, explain
from token_pruning.runtime.flops import Flops, count_flops
from token_pruning.runtime.prune import freeze_thresholds, prune, record, set_budget, set_thresholds, unprune
from token_pruning.runtime.regularize import regularize
from token_pruning.runtime.trace import Trace

__version__ = "0.2.0"

__all__ = [
    "Calibration",
    "CheckpointError",
    "ConfigError",
    "Correction",
    "DataError",
    "DepartureMaps",
    "Distilled",
    "Engine",
    "Explanation",
    "FixedThreshold",
    "Flops",
    "LearnedThreshold",
    "LinearContext",
    "Probes",
    "Pruner",
    "RelativeThreshold",
    "RisingThreshold",
    "Schedule",
    "TokenPruningError",
    "TopK",
    "Trace",
    "Unpruned",
    "UnsupportedModelError",
    "VocabularyGate",
    "calibrate",
    "compile",
    "convert_scores",
    "count_flops",
    "distill",
    "explain",
    "export",
    "freeze_thresholds",
    "from_pretrained",
    "prune",
    "record",
    "regularize",
    "set_budget",
    "set_thresholds",
    "unprune",
    "vocabulary_gate",
]
