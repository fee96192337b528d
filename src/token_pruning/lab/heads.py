"""What the outputs of a sequence-classification head mean, by `problem_type` and their number as in transformers."""

from typing import Literal

from token_pruning.checkpoint import Checkpoint
from token_pruning.errors import ConfigError

Head = Literal["classes", "labels", "score", "scores"]


def head_kind(problem_type: object, outputs: int) -> Head:
    """One class of several; several labels at once; one score; several scores.

    Args:
        problem_type: of ``config.json``; None where it does not say.
        outputs: how many.
    """
    if problem_type == "multi_label_classification":
        return "labels"
    if outputs == 1:
        return "score"
    return "scores" if problem_type == "regression" else "classes"


def refuse_several_answers(checkpoint: Checkpoint, flag: str = "--restore") -> None:
    """Data files, metrics and losses are for one class or one score per text.

    Raises:
        ConfigError: for a multi-label head or a regression with several outputs.
    """
    kind = head_kind(checkpoint.config.get("problem_type"), checkpoint.num_outputs)
    if kind in ("labels", "scores"):
        what = "a multi-label classifier" if kind == "labels" else "a regression"
        raise ConfigError(
            f"{flag} {checkpoint.path} is {what} with {checkpoint.num_outputs} outputs; only one class or one score "
            "per text can be trained, evaluated and analyzed; predict takes it, and calibrate with --input"
        )
