"""From what a model is called with to packed tokens, and from last states to what it returns."""

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from token_pruning.errors import ConfigError
from token_pruning.families import Family
from token_pruning.ragged import Layout, PackedTokens, full_layout, layout_from_mask, pack, unpack

_INTEGERS = (torch.int64, torch.int32)
# What heads and trainers hand to any base model, whose forward takes it as one of **kwargs.
_ALWAYS_TAKEN = {
    "labels", "num_items_in_batch", "output_attentions", "output_hidden_states", "return_dict", "token_type_ids"
}  # fmt: skip


def check_arguments(family: Family, options: Mapping[str, Any], head: type | None = None) -> None:
    """Hold the arguments of a forward against what it knows by name.

    transformers' own models take any argument, and ignore those they do not know.

    Args:
        family: bound to the base model.
        options: by name; those that are None count as not given.
        head: the class of the whole model, whose forward it is; the base model's unless given.

    Raises:
        ConfigError: for an argument that the family refuses, or that the model does not have.
    """
    cls = type(family.base) if head is None else head
    known = _known(type(family.base), cls)
    for name, value in options.items():
        if value is None:
            continue
        if name in family.refused_inputs:
            raise ConfigError(f"{name} is given; a pruned or compiled {type(family.base).__name__} cannot take it")
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = (
                f"did you mean {near[0]}?"
                if near
                else f"it takes {', '.join(sorted(known - {*family.refused_inputs}))}"
            )
            raise ConfigError(f"{name} is given; a {cls.__name__} has no such argument: {hint}")


_KNOWN: dict[tuple[type, type], frozenset[str]] = {}  # torch.compile warns of a functools.cache


def _known(base: Any, head: Any) -> frozenset[str]:
    if (base, head) not in _KNOWN:
        names = {name for cls in (base, head) for name in inspect.signature(cls.forward).parameters}
        _KNOWN[base, head] = frozenset((names | _ALWAYS_TAKEN) - {"self", "kwargs"})
    return _KNOWN[base, head]


def pack_inputs(
    family: Family,
    tables: Mapping[str, int | None],
    *,
    max_tokens: int | None = None,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> PackedTokens:
    """Leave padding behind.

    Args:
        family: bound to the base model.
        tables: from :func:`input_tables`.
        max_tokens: the method's: of longer sequences only so many tokens will enter, so that these may be as long as
            they like.
        input_ids: ``[batch, width]`` int64 or int32.
        attention_mask: ``[batch, width]`` of any dtype, 1 for valid tokens and 0 for padding (default: all valid).
        token_type_ids: ``[batch, width]`` int64 or int32, or something that broadcasts to it; a model without token
            types takes no notice.
        position_ids: the same (default: what the family gives them).
        inputs_embeds: ``[batch, width, dim]`` floating point in place of ``input_ids``.

    Raises:
        ConfigError: unless exactly one of ids and embeddings is given; for a wrong type, dtype or shape, sequences of
            no width, a mask with other values than 0 and 1, sequences longer than the model's positions; and on a CPU
            for valid tokens whose id, token type or position is outside its table.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ConfigError("give exactly one of input_ids and inputs_embeds")
    given = check_ids("input_ids", input_ids, 2) if inputs_embeds is None else _check_embeds(inputs_embeds)
    shape, device = given.shape[:2], given.device
    if not shape[1]:
        raise ConfigError(f"the input has shape {list(shape)}, without a place for any token")
    mask = _valid(attention_mask, given)
    layout = full_layout(*shape) if mask is None else layout_from_mask(mask)
    most = family.max_positions
    longest = max(layout.lengths, default=0) if shape[1] > min(most or shape[1], max_tokens or shape[1]) else 0
    some_chosen = max_tokens is not None and longest > max_tokens
    if some_chosen and position_ids is not None:
        raise ConfigError(f"position_ids is given, for a sequence of more than max_tokens, {max_tokens}: leave it out")
    if most is not None and longest > most and not some_chosen:
        raise ConfigError(
            f"the sequence length is {max(layout.lengths)} tokens; the model has positions for at most {most}: "
            "truncate the input"
        )

    def packed(name: str, values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        if values.shape[:2] != shape or values.device != device:
            try:
                values = values.to(device).expand(*shape, *values.shape[2:])
            except RuntimeError:
                raise ConfigError(
                    f"{name} has shape {list(values.shape)}; it must be {list(shape)}, as the input"
                ) from None
        rows = pack(values, layout)
        if not (some_chosen and name == "position_ids"):  # those are numbered anew
            _check_range(name, rows, tables.get(name), most)
        return rows

    ignored = token_type_ids is None or not tables.get("token_type_ids")
    types = None if ignored else check_ids("token_type_ids", token_type_ids)
    positions: Tensor | None
    if mask is None and position_ids is None and type(family).positions is Family.positions:
        positions = layout.indices if shape[0] == 1 else layout.indices % shape[1]  # without padding: the columns
        if not some_chosen:
            _check_between("position_ids", 0, shape[1] - 1, tables.get("position_ids"), most)
    else:
        everywhere = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask
        own = position_ids is None
        positions = packed(
            "position_ids",
            family.positions(input_ids, everywhere) if own else check_ids("position_ids", position_ids),
        )
        assert positions is not None
    return PackedTokens(
        packed("input_ids", input_ids),
        positions,
        packed("token_type_ids", types),
        layout,
        embeds=packed("inputs_embeds", inputs_embeds),
    )


def check_ids(name: str, ids: Any, dimensions: int | None = None) -> Tensor:
    """A tensor of ids, as it is.

    Raises:
        ConfigError: for something else, another dtype, or another number of dimensions than the one asked for.
    """
    if not isinstance(ids, Tensor):
        raise ConfigError(f"{name} is a {type(ids).__name__}; it must be a tensor")
    if ids.dtype not in _INTEGERS or dimensions not in (None, ids.dim()):
        shape = {None: "", 1: ", one-dimensional", 2: ", [batch, width]"}[dimensions]
        raise ConfigError(
            f"{name} is a {ids.dtype} tensor of shape {list(ids.shape)}; it must be int64 or int32{shape}"
        )
    return ids


def _check_embeds(embeds: Any) -> Tensor:
    if not isinstance(embeds, Tensor) or embeds.dim() != 3 or not embeds.is_floating_point():
        found = f"{embeds.dtype} {list(embeds.shape)}" if isinstance(embeds, Tensor) else type(embeds).__name__
        raise ConfigError(f"inputs_embeds is {found}; it must be a floating-point tensor [batch, width, dim]")
    return embeds


def _valid(attention_mask: Any, given: Tensor) -> Tensor | None:
    """The mask as ``[batch, width]`` bool; None where every place has a token, as far as that is known on a CPU."""
    shape = given.shape[:2]
    known = given.is_cpu and shape[0] > 0 and not torch.compiler.is_compiling()
    if attention_mask is None:
        return None if known else torch.ones(shape, dtype=torch.bool, device=given.device)
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != shape:
        found = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ConfigError(f"attention_mask has shape {found}; it must be {list(shape)}, as the input")
    if not known or not attention_mask.is_cpu:
        return attention_mask.to(given.device, torch.bool)
    mask = attention_mask == 1
    if bool(mask.all()):
        return None
    if attention_mask.dtype != torch.bool and not torch.equal(attention_mask, mask.to(attention_mask.dtype)):
        odd = attention_mask[attention_mask != mask]  # added to logits, as some do, or numbers of packed texts
        raise ConfigError(f"attention_mask holds {odd[0].item():g}; it must be 1 for a token and 0 for padding")
    return mask


def input_tables(base: Any) -> dict[str, int | None]:
    """Rows of the tables that inputs index, by the input's name; None where there is no table."""
    embeddings = getattr(base, "embeddings", None)
    tables = {
        "input_ids": base.get_input_embeddings(),
        "position_ids": getattr(embeddings, "position_embeddings", None),
        "token_type_ids": getattr(embeddings, "token_type_embeddings", None),
    }
    return {name: getattr(table, "num_embeddings", None) for name, table in tables.items()}


def _check_range(name: str, values: Tensor, size: int | None, max_positions: int | None) -> None:
    """Raises ConfigError unless the valid tokens' values are all rows of the table they index.

    On another device than the CPU that would wait for it; what is compiled checks by itself.
    """
    if size is None or values.numel() == 0 or not values.is_cpu or torch.compiler.is_compiling():
        return
    low, high = values.aminmax()
    _check_between(name, int(low), int(high), size, max_positions)


def _check_between(name: str, low: int, high: int, size: int | None, max_positions: int | None) -> None:
    """The same for the least and the greatest value."""
    if size is None or (low >= 0 and high < size):
        return
    wrong = high if high >= size else low
    if name == "position_ids":
        raise ConfigError(
            f"position_ids reach {wrong}; the model has positions for sequences of at most {max_positions} tokens: "
            "truncate the input"
        )
    raise ConfigError(f"{name} holds {wrong}; the model has ids from 0 to {size - 1}")


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
        if for_first_token_head:
            padded = first[:, None]
        else:
            padded = unpack(states, layout.indices, layout.batch_size, layout.width)
    output = family.output(padded, first, **fields)
    return family.as_tuple(output) if return_dict is False else output
