"""Labelling the texts of a file."""

import json
import sys
from pathlib import Path

import torch

from token_pruning.checkpoint import load_model, read_checkpoint
from token_pruning.errors import ConfigError, DataError
from token_pruning.lab.data import load_unlabelled
from token_pruning.lab.evaluation import predict
from token_pruning.lab.files import write_text
from token_pruning.lab.training.features import collator, tokenize
from token_pruning.lab.training.load import load_tokenizer, other_architecture


def predict_file(
    restore: str,
    source: Path,
    target: Path | None,
    *,
    batch_size: int = 32,
    max_length: int = 128,
    bf16: bool = False,
    dense: bool = False,
) -> None:
    """Write one JSON object per text: label and probability, or a regression's score.

    Args:
        restore: a checkpoint with a sequence-classification or regression head.
        source: one or two text columns (CSV, TSV, JSON, JSONL), or one text per line (TXT).
        target: where to write, whole or not at all; standard output if None.
        batch_size: texts per forward pass.
        max_length: longer texts are truncated; tokens.
        bf16: bfloat16 autocast.
        dense: leave the checkpoint's pruning off.

    Raises:
        TokenPruningError: for a bad checkpoint, file or value.
    """
    checkpoint = read_checkpoint(restore)
    if (other := other_architecture(checkpoint)) is not None:
        raise ConfigError(f"{restore} is {other}; only sequence-classification and regression models can predict")
    pruner = None if dense else checkpoint.pruner()
    examples = load_unlabelled(source)
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint)
    if torch.cuda.is_available():
        model.to("cuda")
    if pruner is not None:
        checkpoint.prune(model, pruner)
    features = tokenize(tokenizer, examples, model, max_length)
    logits = torch.from_numpy(
        predict(model, features, collator(tokenizer, bf16), batch_size=batch_size, bf16=bf16).logits
    )
    if logits.shape[1] == 1:
        rows = [{"score": score} for score in logits[:, 0].tolist()]
    else:
        probability, label = logits.softmax(-1).max(-1)
        names = model.config.id2label
        rows = [
            {"label": names[number], "probability": chance}
            for number, chance in zip(label.tolist(), probability.tolist(), strict=True)
        ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if target is None:
        sys.stdout.write(text)
        return
    try:
        write_text(target, text)
    except OSError as error:
        raise DataError(f"{target} cannot be written: {error}") from None
