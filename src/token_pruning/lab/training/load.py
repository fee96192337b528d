"""From a checkpoint folder to its tokenizer, and to a classifier for a task."""

import logging
from typing import Any

import transformers

from token_pruning.checkpoint import Checkpoint, load_model
from token_pruning.errors import CheckpointError, ConfigError
from token_pruning.lab.data import Task, TextExamples
from token_pruning.lab.heads import refuse_several_answers
from token_pruning.lab.training.features import label_order, labelled_features

_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")
_CLASSIFIER = "ForSequenceClassification"

logger = logging.getLogger(__name__)


def other_architecture(checkpoint: Checkpoint, nothing: str = "no model") -> str | None:
    """None for a sequence-classification or regression model, else what the checkpoint is instead.

    Args:
        checkpoint: whose ``architectures`` counts.
        nothing: what one without is called.
    """
    architecture = str((checkpoint.config.get("architectures") or [nothing])[0])
    return None if architecture.endswith(_CLASSIFIER) else architecture


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: if its files are missing or unreadable.
    """
    if not any((checkpoint.path / name).exists() for name in _VOCABULARIES):  # transformers would make an empty one
        raise CheckpointError(f"{checkpoint.path} has no tokenizer: none of {', '.join(_VOCABULARIES)}")
    try:
        if checkpoint.is_ibert:
            return transformers.RobertaTokenizerFast.from_pretrained(checkpoint.path)
        return transformers.AutoTokenizer.from_pretrained(checkpoint.path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint.path} has no tokenizer that can be loaded: {reason}") from None


def load_classifier(checkpoint: Checkpoint, task: Task, *, new_head: bool = False) -> Any:
    """The checkpoint's model with a head for the task, a new one if it has none, or ``new_head`` and another task's.

    Raises:
        ConfigError: but for ``new_head``, for a multi-label head, a regression with several outputs, or another number
            of outputs than the task's.
    """
    other = other_architecture(checkpoint, "none")
    if other is None and not new_head:
        refuse_several_answers(checkpoint)
        if checkpoint.num_outputs != task.num_labels:
            wanted = "is a regression" if task.is_regression else f"has {task.num_labels} classes"
            outputs = "1 output" if checkpoint.num_outputs == 1 else f"{checkpoint.num_outputs} outputs"
            raise ConfigError(f"{checkpoint.path} has {outputs}; task {task.name} {wanted}: they must agree")
    if other is not None:
        logger.warning("%s has no classification head (%s): a new one is trained", checkpoint.path, other)
    labels = task.labels
    head: dict[str, Any] = {"num_labels": task.num_labels}
    if labels is not None and not label_order(checkpoint.label_names() or [], labels):
        head["id2label"] = dict(enumerate(labels))
        head["label2id"] = {label: number for number, label in enumerate(labels)}
    # Said outright: a checkpoint of another task may name another.
    head["problem_type"] = "regression" if task.is_regression else "single_label_classification"
    return load_model(
        checkpoint, model_class=transformers.AutoModelForSequenceClassification, new_head=new_head, **head
    )


def load_split(checkpoint: Checkpoint, task: Task, examples: TextExamples, max_length: int) -> tuple[Any, Any, Any]:
    """A checkpoint's dense model and tokenizer, and a task's examples tokenized and labelled for them.

    Raises:
        TokenPruningError: for a bad checkpoint, or a ``max_length`` beyond the model's positions.
    """
    tokenizer = load_tokenizer(checkpoint)
    model = load_classifier(checkpoint, task)
    return model, tokenizer, labelled_features(tokenizer, examples, task, model, max_length)
