"""Labelling the texts of a file."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from token_pruning.checkpoint import load_model, read_checkpoint
from token_pruning.errors import ConfigError
from token_pruning.lab.data import load_unlabelled
from token_pruning.lab.evaluation import predict
from token_pruning.lab.files import try_file, write_standard_output, write_text
from token_pruning.lab.options import InferenceOptions, option
from token_pruning.lab.training.features import collator, tokenize
from token_pruning.lab.training.load import load_tokenizer, other_architecture


@dataclass(frozen=True, kw_only=True)
class PredictOptions(InferenceOptions):
    """Labelling one file.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    restore: str = option(help="checkpoint", flags=("--restore", "--restore-file"), metavar="CKPT")
    input: Path = option(help="one or two text columns, or one text per line (.txt)")
    output: Path | None = option(None, help="where to write; missing folders are made (default: standard output)")
    dense: bool = option(False, help="leave the checkpoint's pruning off")


def predict_file(options: PredictOptions) -> None:
    """Write one JSON object per text: label and probability, or a regression's score.

    The texts are those of a CSV, TSV, JSON or JSONL file with one or two text columns, or the lines of a TXT file; the
    checkpoint has a sequence-classification or regression head. A file is written whole or not at all.

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
    pruner = None if options.dense else checkpoint.pruner()
    examples = load_unlabelled(options.input)
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint)
    if torch.cuda.is_available():
        model.to("cuda")
    if pruner is not None:
        checkpoint.prune(model, pruner)
    features = tokenize(tokenizer, examples, model, options.max_length)
    collate = collator(tokenizer, options.bf16)
    found = predict(model, features, collate, batch_size=options.batch_size, bf16=options.bf16)
    logits = torch.from_numpy(found.logits)
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
    if options.output is None:
        write_standard_output(text)
    else:
        write_text(options.output, text)
