"""Inference engines: a pruned or unpruned model made as fast as a CPU allows."""

from token_pruning.engine.compiled import Engine, compile

__all__ = ["Engine", "compile"]
