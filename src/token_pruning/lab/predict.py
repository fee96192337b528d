"""Labelling the texts of a file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from token_pruning.checkpoint import read_checkpoint
from token_pruning.errors import ConfigError, DataError
from token_pruning.lab.data import load_unlabelled
from token_pruning.lab.evaluation import predict
from token_pruning.lab.files import try_file, write_standard_output, write_text
from token_pruning.lab.heads import head_kind
from token_pruning.lab.options import BudgetOptions, InferenceOptions, option
from token_pruning.lab.training.features import collator, output_names, tokenize
from token_pruning.lab.training.load import load_float32, load_tokenizer, other_architecture
from token_pruning.runtime.prune import set_budget


@dataclass(frozen=True, kw_only=True)
class PredictOptions(InferenceOptions, BudgetOptions):
    """Labelling one file.

    Raises:
        ConfigError: for a value that is not allowed, or a budget of a dense model.
    """

    restore: str = option(help="checkpoint", flags=("--restore", "--restore-file"), metavar="CKPT")
    input: Path = option(help="one or two text columns, or one text per line (.txt)")
    output: Path | None = option(None, help="where to write; missing folders are made (default: standard output)")
    dense: bool = option(False, help="leave the checkpoint's pruning off")

    def __post_init__(self) -> None:
        """Check everything that needs no file."""
        super().__post_init__()
        if self.dense and self.budget is not None:
            raise ConfigError("give either --budget or --dense")


def predict_file(options: PredictOptions) -> None:
    """Write one JSON object per text, what :func:`answers` gives.

    The texts are those of a file that :func:`token_pruning.lab.data.load_unlabelled` reads; the checkpoint has a
    sequence-classification or regression head. A file is written whole or not at all.

    Raises:
        TokenPruningError: for a bad checkpoint, file or value.
    """
    if options.output is not None:
        try_file("--output", options.output)
    else:
        write_standard_output("")  # says that it is closed before the work starts
    checkpoint = read_checkpoint(options.restore)
    if (other := other_architecture(checkpoint)) is not None:
        raise ConfigError(
            f"{options.restore} is {other}; only sequence-classification and regression models can predict"
        )
    if not options.dense and checkpoint.config.get("prune_mode") is None:
        raise ConfigError(
            f"{checkpoint.path / 'config.json'}: prune_mode is missing: the checkpoint is dense; --dense predicts with "
            "it as it is"
        )
    pruner = None if options.dense else checkpoint.pruner()
    examples = load_unlabelled(options.input)
    tokenizer = load_tokenizer(checkpoint)
    model = load_float32(checkpoint)
    if torch.cuda.is_available():
        model.to("cuda")
    if pruner is not None:
        checkpoint.prune(model, pruner)
        if options.budget is not None:
            set_budget(model, options.budget)
    features = tokenize(tokenizer, examples, model, options.max_length)
    examples.note.say()
    collate = collator(tokenizer, options.bf16)
    found = predict(model, features, collate, batch_size=options.batch_size, bf16=options.bf16)
    rows = answers(torch.from_numpy(found.logits), model.config, options.restore)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if options.output is None:
        write_standard_output(text)
    else:
        write_text(options.output, text)


def answers(logits: torch.Tensor, config: Any, name: str) -> list[dict[str, Any]]:
    """What a head says about each text.

    Args:
        logits: ``[texts, outputs]`` float32.
        config: the model's; ``problem_type`` and the number of outputs say what they mean.
        name: the checkpoint, for messages.

    Returns:
        Of a classifier ``label`` and ``probability``; of a multi-label one ``labels``, those whose probability is above
        a half, and ``probabilities``, of every label; of a regression ``score``, or of one with several outputs
        ``scores``, by name, or as a list where the outputs have no names.

    Raises:
        DataError: if a logit is NaN or infinite.
        ConfigError: if two labels or scores have one name.
    """
    bad = (~logits.isfinite().all(-1)).nonzero().flatten().tolist()
    if bad:
        raise DataError(
            f"{name}: the model's outputs are NaN or infinite for {len(bad)} of {len(logits)} texts, first for text "
            f"{bad[0] + 1}; nothing was written"
        )
    kind = head_kind(config.problem_type, logits.shape[1])
    if kind == "score":
        return [{"score": score} for score in logits[:, 0].tolist()]
    names = output_names(config)
    if kind != "classes" and len(set(names)) < len(names):
        raise ConfigError(f"{name}: id2label names two outputs alike: {', '.join(names)}; each needs its own name")
    if kind == "classes":
        probability, label = logits.softmax(-1).max(-1)
        return [
            {"label": names[number], "probability": chance}
            for number, chance in zip(label.tolist(), probability.tolist(), strict=True)
        ]
    if kind == "scores":
        unnamed = names == [f"LABEL_{number}" for number in range(len(names))]
        return [{"scores": row if unnamed else dict(zip(names, row, strict=True))} for row in logits.tolist()]
    rows = [dict(zip(names, row, strict=True)) for row in logits.sigmoid().tolist()]
    return [{"labels": [label for label, chance in row.items() if chance > 0.5], "probabilities": row} for row in rows]
