"""The vocabulary threshold that a training run starts with."""

import random
from dataclasses import replace
from typing import Any

from token_pruning.budget.examples import as_batch
from token_pruning.budget.fitting import default_keep_rate
from token_pruning.budget.vocabulary import EXAMPLES, describe, token_ids, vocabulary_gate
from token_pruning.families import padding_id
from token_pruning.lab.training.budget import HELD_OUT_EXAMPLES
from token_pruning.lab.training.plan import TrainPlan
from token_pruning.pruners import Pruner
from token_pruning.runtime.prune import prunable


def with_vocabulary_gate(
    pruner: Pruner,
    plan: TrainPlan,
    model: Any,
    tokenizer: Any,
    features: list[dict[str, Any]],
    texts: list[dict[str, Any]] | None,
) -> Pruner:
    """The method with its vocabulary gate.

    How many tokens enter is printed.

    Args:
        pruner: the plan's, with the threshold of the checkpoint if that has one.
        plan: the keep rate, or the lowest budget, that it follows from. Scores found in its checkpoint are kept; for
            one budget so is what a checkpoint with thresholds has or does not have.
        model: the checkpoint's, not pruned.
        tokenizer: for the line that is printed.
        features: the training examples, tokenized.
        texts: those whose cost is held to the budget, where they are not training examples.

    Returns:
        The method, without a threshold where all tokens enter.
    """
    options = plan.options
    keep_rate = options.vocabulary_keep_rate
    kept = (pruner.vocabulary_threshold is not None or plan.start_is_learned) and not options.elastic
    if keep_rate is None and (kept or options.target_flops is None):
        return pruner
    some = random.Random(options.seed).sample(features, min(len(features), EXAMPLES))
    if keep_rate is None:
        budget = options.budget
        assert budget is not None
        with prunable(model):
            batch = as_batch((texts or some)[:HELD_OUT_EXAMPLES], padding_id(model.config))
            keep_rate = default_keep_rate(model, batch, budget)
    if keep_rate == 1:
        gate = None if pruner.vocabulary is None or options.elastic else pruner.vocabulary.at(0.0)
        return replace(pruner, vocabulary=gate)
    gate = (pruner.vocabulary or vocabulary_gate(model, some)).keeping(token_ids(texts or some), keep_rate)
    if plan.first_process and gate.threshold:
        print(describe(gate, texts or some, tokenizer))
    return replace(pruner, vocabulary=gate)
