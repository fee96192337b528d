"""From a checkpoint folder to its tokenizer, and to a classifier for a task."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from token_pruning.checkpoint import Checkpoint, load_model
from token_pruning.checkpoint.settings import check_has_tokenizer, foreign_errors, quiet
from token_pruning.errors import CheckpointError, ConfigError
from token_pruning.lab.data import Task, TextExamples
from token_pruning.lab.heads import refuse_several_answers
from token_pruning.lab.training.features import label_order, labelled_features

_CLASSIFIER = "ForSequenceClassification"


def other_architecture(checkpoint: Checkpoint) -> str | None:
    """None for a sequence-classification or regression model, else what ``architectures`` says it is instead."""
    architecture = str((checkpoint.config.get("architectures") or ["no model"])[0])
    return None if architecture.endswith(_CLASSIFIER) else architecture


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer. It gives no token types where the model has one type only, as in single texts.

    Raises:
        CheckpointError: if its files are missing or unreadable, it has no pad token, or tokens that the model does not
            have.
    """
    path, config = checkpoint.path, checkpoint.model_config()
    check_has_tokenizer(path)
    with (
        quiet(),
        foreign_errors(f"{path} has no tokenizer that can be loaded: its files are broken, or of a newer version"),
    ):
        if checkpoint.is_ibert:
            tokenizer: Any = transformers.RobertaTokenizerFast.from_pretrained(path)  # nosec B615  # a folder
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # nosec B615  # a folder
        entries = tokenizer.get_vocab()
        single = tokenizer(["a b", "c"], truncation=True, max_length=8)
        pairs = tokenizer(["a b", "c"], ["d", "e"], truncation=True, max_length=8)  # some bad files only show here
        tokenizer(["a b"], verbose=False)
        padding = tokenizer.pad_token_id
    _check_vocabulary(path / "tokenizer.json", entries)
    added = [number for encoded in (single, pairs) for ids in encoded["input_ids"] for number in ids]
    largest = max([*entries.values(), *added], default=-1)
    if padding is None:
        raise CheckpointError(f"{path / 'tokenizer_config.json'}: pad_token is missing; batches need one")
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and largest >= vocabulary:
        raise CheckpointError(
            f"{path}: the tokenizer has token ids up to {largest}; vocab_size is {vocabulary}, so they must be below"
        )
    if getattr(config, "type_vocab_size", None) == 1:
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    return tokenizer


def _check_vocabulary(file: Path, entries: dict[str, int]) -> None:
    """A vocabulary that is not read makes every word unknown, without a word from transformers.

    Raises:
        CheckpointError: if the tokenizer has fewer entries than its file.
    """
    if not file.exists():
        return
    with foreign_errors(f"{file} cannot be read"):
        vocabulary = json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
    if not isinstance(vocabulary, dict | list) or not 0 < len(vocabulary) <= len(entries):
        found = len(vocabulary) if isinstance(vocabulary, dict | list) else repr(vocabulary)
        raise CheckpointError(
            f"{file}: model.vocab is {found}, the tokenizer has {len(entries)} entries; it must be read whole"
        )


def load_classifier(checkpoint: Checkpoint, task: Task, *, new_head: bool = False) -> Any:
    """The checkpoint's model with a head for the task, a new one if it has none, or ``new_head`` and another task's.

    Raises:
        ConfigError: but for ``new_head``, for a multi-label head, a regression with several outputs, or another number
            of outputs than the task's.
    """
    if other_architecture(checkpoint) is None and not new_head:
        refuse_several_answers(checkpoint)
        if checkpoint.num_outputs != task.num_labels:
            wanted = "is a regression" if task.is_regression else f"has {task.num_labels} classes"
            outputs = "1 output" if checkpoint.num_outputs == 1 else f"{checkpoint.num_outputs} outputs"
            raise ConfigError(f"{checkpoint.path} has {outputs}; task {task.name} {wanted}: they must agree")
    labels = task.labels
    head: dict[str, Any] = {"num_labels": task.num_labels}
    if labels is not None and not label_order(checkpoint.label_names() or [], labels):
        head["id2label"] = dict(enumerate(labels))
        head["label2id"] = {label: number for number, label in enumerate(labels)}
    # Said outright: a checkpoint of another task may name another.
    head["problem_type"] = "regression" if task.is_regression else "single_label_classification"
    return load_float32(
        checkpoint, model_class=transformers.AutoModelForSequenceClassification, new_head=new_head, **head
    )


def load_float32(checkpoint: Checkpoint, **arguments: Any) -> Any:
    """:func:`token_pruning.checkpoint.load_model` in float32, whatever the checkpoint's weights are stored in.

    Sums of a training's small steps, and of scores that decide, need it; autocast (``--bf16``) is asked for.
    """
    model: Any = load_model(checkpoint, dtype=torch.float32, **arguments)
    model.config.output_attentions = model.config.output_hidden_states = False  # nothing here reads them
    return model


def load_split(checkpoint: Checkpoint, task: Task, examples: TextExamples, max_length: int) -> tuple[Any, Any, Any]:
    """A checkpoint's dense model and tokenizer, and a task's examples tokenized and labelled for them.

    Raises:
        TokenPruningError: for a bad checkpoint, or a ``max_length`` beyond the model's positions.
    """
    tokenizer = load_tokenizer(checkpoint)
    model = load_classifier(checkpoint, task)
    return model, tokenizer, labelled_features(tokenizer, examples, task, model, max_length)
