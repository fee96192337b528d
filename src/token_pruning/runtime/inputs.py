"""From what a model is called with to packed tokens, and from last states to what it returns."""

from typing import Any

import torch
from torch import Tensor

from token_pruning.errors import ConfigError
from token_pruning.families import Family
from token_pruning.ragged import Layout, PackedTokens, layout_from_mask, pack, unpack


def pack_inputs(
    family: Family,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> PackedTokens:
    """Leave padding behind.

    Args:
        family: bound to the base model.
        input_ids: ``[batch, width]`` integers.
        attention_mask: ``[batch, width]``, non-zero for valid tokens (default: all).
        token_type_ids: ``[batch, width]`` or something that broadcasts to it.
        position_ids: the same (default: what the family gives them).
        inputs_embeds: ``[batch, width, dim]`` in place of ``input_ids``.

    Raises:
        ConfigError: unless exactly one of ids and embeddings is given, or for an empty input, a mask of another shape
            or sequences longer than the model's positions.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ConfigError("give exactly one of input_ids and inputs_embeds")
    given = input_ids if input_ids is not None else inputs_embeds
    assert given is not None
    shape, device = given.shape[:2], given.device
    if 0 in shape:
        raise ConfigError(f"the input has shape {list(shape)}, without any token; leave empty batches out")
    if attention_mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=device)
    elif attention_mask.shape != shape:
        raise ConfigError(
            f"attention_mask has shape {list(attention_mask.shape)}; it must be {list(shape)}, as the input"
        )
    else:
        mask = attention_mask.to(device, torch.bool)
    layout = layout_from_mask(mask)
    most = family.shape(family.config).max_positions
    if most is not None and shape[1] > most and max(layout.lengths) > most:
        raise ConfigError(
            f"the sequence length is {max(layout.lengths)} tokens; the model has positions for at most {most}: "
            "truncate the input"
        )
    if position_ids is None:
        position_ids = family.positions(input_ids, mask)

    def packed(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return pack(values.expand(*shape, *values.shape[2:]), layout)

    positions = packed(position_ids)
    assert positions is not None
    return PackedTokens(packed(input_ids), positions, packed(token_type_ids), layout, embeds=packed(inputs_embeds))


def model_output(
    family: Family,
    states: Tensor,
    layout: Layout,
    *,
    first_only: bool,
    for_first_token_head: bool = False,
    return_dict: bool | None = None,
    **fields: Any,
) -> Any:
    """The base model's output.

    Args:
        family: bound to the base model.
        states: ``[batch, dim]`` of first tokens, or ``[tokens, dim]``.
        layout: the valid tokens.
        first_only: which of the two: then ``last_hidden_state`` is ``[batch, 1, dim]``.
        for_first_token_head: make it so in any case, since a head that reads the first column is to find a sequence's
            first valid token there, wherever padding stands.
        return_dict: False for a tuple.
        fields: hidden states and attentions, where they are asked for.
    """
    if first_only:
        first, padded = states, states[:, None]
    else:
        first = layout.per_sequence(states[layout.first_rows])
        padded = unpack(states, layout.indices, layout.batch_size, layout.width)
        if for_first_token_head:
            padded = first[:, None]
    output = family.output(padded, first, **fields)
    return output.to_tuple() if return_dict is False else output
