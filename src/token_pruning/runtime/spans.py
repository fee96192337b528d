"""The loss of question answering heads, over a sequence's own tokens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForQuestionAnsweringLoss


def answers_with_spans(model: nn.Module) -> bool:
    """Whether a model is one of transformers' own with a question answering head."""
    cls = type(model)
    return cls.__module__.startswith("transformers.models.") and cls.__name__.endswith("ForQuestionAnswering")


def with_span_loss(forward: Callable[..., Any], config: Any, options: dict[str, Any]) -> Any:
    """A question answering model's output, with a loss that does not depend on how a batch is padded.

    transformers' own takes the softmax over padding too, where a pruned model has no states.

    Args:
        forward: gives the output.
        config: the model's.
        options: the forward's arguments; a position outside the sequence's own tokens counts for nothing.
    """
    starts, ends = options.get("start_positions"), options.get("end_positions")
    if starts is None or ends is None:
        return forward(**options)
    as_dict = options.get("return_dict")
    others = {n: x for n, x in options.items() if n not in ("start_positions", "end_positions", "return_dict")}
    output = forward(**others, return_dict=True)
    logits, positions = [output.start_logits, output.end_logits], [starts, ends]
    mask = options.get("attention_mask")
    if mask is not None:
        valid = mask.to(logits[0].device, torch.bool)
        logits = [x.masked_fill(~valid, torch.finfo(x.dtype).min) for x in logits]
        positions = [_ignored_outside(valid, x.to(valid.device)) for x in positions]
    whole = type(output)(loss=ForQuestionAnsweringLoss(*logits, *positions), **output)
    return whole if (config.return_dict if as_dict is None else as_dict) else whole.to_tuple()


def _ignored_outside(valid: Tensor, positions: Tensor) -> Tensor:
    """Positions, those that are no valid token's at the width, where the loss ignores them."""
    width = valid.shape[1]
    places = positions.view(len(valid), -1)[:, 0].clamp(0, width)
    inside = torch.nn.functional.pad(valid, (0, 1)).gather(1, places[:, None])[:, 0]
    return places.where(inside, width)
