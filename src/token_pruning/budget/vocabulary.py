"""Dropping tokens before the first layer, by what their vocabulary entries are worth.

Attention in the first layers says little about which tokens matter. In later layers it says it well, but by then the
tokens have been paid for. What it says depends mostly on the token itself, though: its mean for each vocabulary entry,
a table made once from a few thousand examples, is known before anything is computed. Tokens whose entry's score is
below the ``vocabulary_threshold`` never enter the model's layers. The others keep their positions.
"""

from typing import Any

import torch
from torch import Tensor

from token_pruning.budget.examples import Examples, as_batch, as_rows
from token_pruning.errors import ConfigError
from token_pruning.families import padding_id
from token_pruning.pruners import VocabularyGate
from token_pruning.runtime.prune import is_pruned, prunable, record

EXAMPLES = 5000  # enough to know a vocabulary by

_BATCH_SIZE = 64
_PRIOR_EXAMPLES = 5.0
_PRIOR_SCORE = 1.0  # the mean of all scores, by their definition


def vocabulary_gate(model: Any, examples: Examples, keep_rate: float = 1.0) -> VocabularyGate:
    """What each vocabulary entry is worth: its tokens' mean importance in the upper half of a model's layers.

    Scores are those of scoring mode ``"relative"``, whose mean over a sequence is 1. An entry's mean counts five more
    tokens with a score of 1, so that rare entries need more evidence to be dropped; entries not seen have a score of 1.
    Entries that begin or end an example are the tokenizer's special tokens, which heads and segments need: infinite.

    Args:
        model: a supported model that is not pruned, with any head.
        examples: tokenized texts, as for :func:`token_pruning.calibrate`; the more the better, up to some thousands.
        keep_rate: the fraction of the examples' tokens that the gate lets into the first layer; above 0, at most 1.

    Returns:
        The gate: a setting of every method, and an argument of :func:`token_pruning.calibrate`.

    Raises:
        ConfigError: for no examples, a keep rate outside its range, or a model that is pruned.
    """
    if is_pruned(model):
        raise ConfigError(f"this {type(model).__name__} is pruned already; call unprune(model) first")
    rows = as_rows(examples)
    if not rows:
        raise ConfigError("no examples were given; vocabulary scores are means over examples' tokens")
    size = model.get_input_embeddings().num_embeddings
    sums, counts = (torch.zeros(size, dtype=torch.float64, device="cpu") for _ in range(2))
    special: set[int] = set()
    ordered = sorted(rows, key=lambda example: len(example["input_ids"]))
    with torch.inference_mode(), prunable(model):
        for start in range(0, len(ordered), _BATCH_SIZE):
            batch = as_batch(ordered[start : start + _BATCH_SIZE], padding_id(model.config))
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
            with record(model) as trace:
                model(**inputs)
            [done] = trace.passes
            ids = batch["input_ids"].flatten()
            layers = range(len(done.layers) // 2 + 1, len(done.layers) + 1)
            for layer in layers:
                scores, places = done.layers[layer].scores, done.layers[layer].entering.indices
                assert scores is not None
                sums.index_add_(0, ids[places.cpu()], scores.double().cpu() / len(layers))
            tokens = ids[done.valid.indices.cpu()]
            counts.index_add_(0, tokens, torch.ones(len(tokens), dtype=torch.float64, device="cpu"))
            ends = done.valid.cu_seqlens.long().cpu()
            special.update(tokens[ends[:-1]].tolist(), tokens[ends[1:] - 1].tolist())
    scores = (sums + _PRIOR_EXAMPLES * _PRIOR_SCORE) / (counts + _PRIOR_EXAMPLES)
    scores[sorted(special)] = torch.inf
    return VocabularyGate(scores.float()).keeping(token_ids(rows), keep_rate)


def token_ids(examples: Examples) -> Tensor:
    """All tokens of examples, ``[tokens]`` int64, padding left out."""
    batch = as_batch(examples, 0)
    return batch["input_ids"][batch["attention_mask"].bool()]


def describe(gate: VocabularyGate, examples: Examples, tokenizer: Any) -> str:
    """One line: how many of the examples' tokens enter the first layer, and which of the others there are most of."""
    ids = token_ids(examples)
    left_out, counts = torch.unique(ids[gate.scores[ids] < gate.threshold], return_counts=True)
    most = tokenizer.convert_ids_to_tokens(left_out[counts.argsort(descending=True)[:10]].tolist())
    return (
        f"{1 - int(counts.sum()) / len(ids):.1%} of the tokens enter the first layer: vocabulary "
        f"threshold {gate.threshold:.4f}; most frequent of the others: {' '.join(most)}"
    )
