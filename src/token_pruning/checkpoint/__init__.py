"""Checkpoints: ``config.json`` and weights, and those of I-BERT and LTP."""

from token_pruning.checkpoint.loading import (
    Checkpoint,
    from_pretrained,
    load_model,
    read_checkpoint,
)

__all__ = ["Checkpoint", "from_pretrained", "load_model", "read_checkpoint"]
