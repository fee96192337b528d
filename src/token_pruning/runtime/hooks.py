"""The hooks that make a Hugging Face model drop tokens.

No model code is copied or subclassed. One registered attention function takes the decisions; forward hooks pack the
batch at the encoder's entry, drop rows after each attention block, and put every token back in its place at the exit.
"""

import copy
import inspect
import threading
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel

from token_pruning.errors import ConfigError, UnsupportedModelError
from token_pruning.families import family_of, reads_first_token_only
from token_pruning.pruners import Pruner
from token_pruning.ragged import first_token_attention, masked_attention, packed_attention
from token_pruning.ragged.layout import pack, row_bucket, unpack
from token_pruning.runtime.state import ForwardState, TokenPruner, recording

Execution = Literal["packed", "masked"]

ATTENTION_NAME = "token_pruning"
_STATE = "token_pruning_state"  # the forward keyword argument that carries the state
_FIRST_ONLY = "token_pruning_first_only"  # by which a head says that it reads first tokens only
_MODULE_NAME = "token_pruner"

# Between a layer's attention and the module its rows are dropped at, which may receive nothing but a tensor
# (DistilBERT's LayerNorm), the state is handed over within the thread. Both run again under gradient checkpointing.
_handover = threading.local()

# The rows that the last layer's query and output projections are to compute and how many there are; None for all.
_first_rows = threading.local()


class Attachment:
    """The hooks on one model. A deep copy of the model gets hooks of its own, bound to a copy of this object."""

    def __init__(
        self, model: PreTrainedModel, pruner: Pruner, execution: Execution, vocabulary_scores: Tensor | None
    ) -> None:
        """Attach; nothing is changed if that fails."""
        base = model.base_model
        self.family = family_of(base.config)
        self.shape = self.family.shape(base.config)
        self.token_pruner = TokenPruner(pruner, self.shape.num_layers, model.device, vocabulary_scores)
        self.token_pruner.train(model.training)
        self.packed = execution == "packed"
        self.parameter_names = tuple(inspect.signature(base.forward).parameters)
        self.model = model
        self.original_config = model.config
        self.handles: list[RemovableHandle] = []

        encoder = self.family.encoder(base)
        layers = list(self.family.layers(encoder))
        self.layer_numbers = {self.family.attention(layer): number for number, layer in enumerate(layers, start=1)}

        # Its masks are never built: without a registered mask function a model passes None, and the state has the mask.
        AttentionInterface.register(ATTENTION_NAME, _attention_function)
        # Models built from one config object share it; what is written below must not reach the others.
        config = copy.deepcopy(model.config)
        _replace_config(model, model.config, config)
        model.set_attn_implementation(ATTENTION_NAME)
        if base.config._attn_implementation != ATTENTION_NAME:
            _replace_config(model, config, self.original_config)
            raise UnsupportedModelError(
                f"{type(model).__name__} does not let its attention function be replaced, so it cannot be pruned"
            )
        write_keys(config, pruner)
        model.add_module(_MODULE_NAME, self.token_pruner)

        if reads_first_token_only(model):
            # Only a call of the whole model: its encoder may be called for other tokens' states too.
            self.handles.append(model.register_forward_pre_hook(_enter_head, with_kwargs=True))
            self._compute_first_rows_only(layers[-1])
        self.handles.append(base.register_forward_pre_hook(self.enter_model, with_kwargs=True))
        self.handles.append(encoder.register_forward_pre_hook(self.enter_encoder, with_kwargs=True))
        self.handles.append(encoder.register_forward_hook(self.leave_encoder, with_kwargs=True))
        for number, layer in enumerate(layers, start=1):
            self.handles.append(self.family.attention_output(layer).register_forward_hook(self.leave_attention))
            # Before any hook that records hidden states, so that they see what the next layer sees.
            self.handles.append(
                layer.register_forward_hook(partial(self.leave_layer, number), with_kwargs=True, prepend=True)
            )

    def _compute_first_rows_only(self, last_layer: nn.Module) -> None:
        """Have the last layer's row-wise projections skip rows nobody wants, where its pass says so."""
        self.handles.append(last_layer.register_forward_pre_hook(self.enter_last_layer, with_kwargs=True))
        modules = self.family.layer_modules(last_layer)
        for linear in (modules.query, modules.attention_output):
            self.handles.append(linear.register_forward_pre_hook(_take_first_rows))
            self.handles.append(linear.register_forward_hook(_put_first_rows_back))

    def detach(self) -> None:
        """Undo everything."""
        for handle in self.handles:
            handle.remove()
        delattr(self.model, _MODULE_NAME)
        _replace_config(self.model, self.model.config, self.original_config)

    # The hooks, in the order they run.

    def enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Start a state, and hand it to the layers in place of the attention mask."""
        kwargs = {**dict(zip(self.parameter_names, args, strict=False)), **kwargs}
        first_only = kwargs.pop(_FIRST_ONLY, False)
        inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if inputs is None:
            return (), kwargs  # the model itself says what is missing
        shape, device = inputs.shape[:2], inputs.device
        if shape[1] > self.shape.max_positions:
            raise ConfigError(
                f"the sequence length is {shape[1]} tokens; the model has positions for at most "
                f"{self.shape.max_positions}: truncate the input"
            )
        config: Any = module.config
        for output in ("output_attentions", "output_hidden_states"):
            if self.packed and kwargs.get(output, getattr(config, output, False)):
                raise UnsupportedModelError(
                    f"{output}=True is not possible in packed execution, where layers hold different tokens; "
                    'use prune(model, pruner, execution="masked")'
                )
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=device)
        elif mask.shape != shape:
            raise ConfigError(f"attention_mask has shape {list(mask.shape)}; it must be {list(shape)}, as the input")
        state = ForwardState(
            self.token_pruner,
            mask.to(device, torch.bool),
            self.layer_numbers,
            packed=self.packed,
            input_ids=kwargs.get("input_ids"),
            first_only=first_only,
        )
        return (), {**kwargs, "attention_mask": None, _STATE: state}

    def enter_encoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Leave padding behind, and tokens that the vocabulary threshold drops."""
        state = _state(kwargs)
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if state.never_entered is not None and not state.record.first_only:
            places = state.valid.indices[state.never_entered]
            state.last_states[0] = (places, hidden_states.flatten(0, 1)[places])
        if not state.packed:
            return None
        packed = _with_filler(pack(hidden_states, state.entering(1)))[None]
        return ((packed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": packed})

    def enter_last_layer(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Say which rows its projections are to compute."""
        state = _state(kwargs)
        layer = self.shape.num_layers
        only = state.packed and state.first_only(layer) and not state.prunes(layer)
        hidden_states = args[0] if args else kwargs["hidden_states"]
        _first_rows.value = (state.entering(layer).first_rows, hidden_states.shape[1]) if only else None

    def leave_attention(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Drop the rows that leave, and remember their states."""
        state, layer = cast(tuple[ForwardState, int], _handover.value)
        _handover.value = None
        hidden_states = output[0] if isinstance(output, tuple) else output
        record = state.layers[layer]
        if not state.packed:
            if record.merge is not None and record.dropped_rows is not None:
                places, gone = record.entering.indices, record.dropped_rows
                flat = hidden_states.flatten(0, 1)
                state.last_states[layer] = (places[gone], flat[places[gone]])
                merged = record.merge.apply(flat[places])
                hidden_states = flat.index_copy(0, places, merged).view(hidden_states.shape)
            state.attention_outputs[layer] = hidden_states
            return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states
        rows = hidden_states[0]
        if state.first_only(layer):
            kept_rows = record.entering.first_rows
        elif record.kept_rows is not None and record.dropped_rows is not None:
            gone, kept_rows = record.dropped_rows, record.kept_rows
            if not state.record.first_only:  # else nobody wants the states of other tokens
                state.last_states[layer] = (record.entering.indices[gone], rows[gone])
            if record.merge is not None:
                rows = record.merge.apply(rows)
        else:
            return None
        kept = _with_filler(rows[kept_rows])[None]
        return (kept, *output[1:]) if isinstance(output, tuple) else kept

    def leave_layer(self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Soft stage: multiply by the soft mask. Masked execution: tokens that are gone keep their last state."""
        state = _state(kwargs)
        record = state.layers[layer]
        hidden_states = output[0] if isinstance(output, tuple) else output
        if record.soft_mask is not None:
            if state.packed and state.first_only(layer):
                return None  # first tokens are never masked
            if state.packed:
                factor = torch.nn.functional.pad(
                    record.soft_mask, (0, hidden_states.shape[1] - record.entering.total), value=1.0
                )[None, :, None]
            else:
                ones = torch.ones(state.mask.numel(), device=hidden_states.device)
                factor = ones.index_copy(0, record.entering.indices, record.soft_mask).view(*state.mask.shape, 1)
            hidden_states = hidden_states * factor.to(hidden_states.dtype)
        elif not state.packed:
            before = args[0] if args else kwargs["hidden_states"]
            entered, stays = (_as_mask(which.indices, state)[..., None] for which in (record.entering, record.leaving))
            last = torch.where(entered, state.attention_outputs[layer], before)
            hidden_states = torch.where(stays, hidden_states, last)
        return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states

    def leave_encoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Put every token back in its place, and give the pass to those who record."""
        state = _state(kwargs)
        hidden_states = output.last_hidden_state
        if state.packed:
            places, rows = self._final_rows(hidden_states[0], state)
            output.last_hidden_state = unpack(rows, places, *state.mask.shape)
        else:  # packed execution never sees padding; neither do heads in the reference
            flat = hidden_states.masked_fill(~state.mask[..., None], 0.0).flatten(0, 1)
            for places, rows in state.last_states.values():  # some of their rows carry summaries
                flat = flat.index_copy(0, places, rows)
            output.last_hidden_state = flat.view(hidden_states.shape)
        for token_pruner, trace in recording.get():
            if token_pruner is self.token_pruner:
                trace.passes.append(state.record)
        return output

    def _final_rows(self, rows: Tensor, state: ForwardState) -> tuple[Tensor, Tensor]:
        """Places in the padded batch, and the last hidden state of the token at each."""
        last = state.layers[self.shape.num_layers]
        if state.record.first_only:
            first = last.entering.first_rows
            return last.entering.indices[first], rows[: first.numel()]
        places, rows = last.leaving.indices[last.token_rows], rows[last.token_rows]
        dropped = state.last_states.values()
        return torch.cat([places, *(p for p, _ in dropped)]), torch.cat([rows, *(r for _, r in dropped)])


def _enter_head(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A head that reads first tokens only says so to its encoder."""
    return args, {**kwargs, _FIRST_ONLY: True}


def _take_first_rows(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
    """``[1, rows, dim]`` to the rows wanted."""
    if _first_rows.value is None:
        return None
    rows, _ = _first_rows.value
    return (args[0][:, rows],)


def _put_first_rows_back(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    """Zeros where nothing was computed: the model expects as many rows as it gave."""
    if _first_rows.value is None:
        return None
    rows, total = _first_rows.value
    return output.new_zeros(1, total, output.shape[-1]).index_copy(1, rows, output)


def _state(kwargs: dict[str, Any]) -> ForwardState:
    state: ForwardState | None = kwargs.get(_STATE)
    if state is None:
        raise ConfigError("a pruned model must be called as model(...): forward() of an inner module skips its hooks")
    return state


def _as_mask(indices: Tensor, state: ForwardState) -> Tensor:
    """``[batch, width]`` bool, True at the given places."""
    mask = torch.zeros(state.mask.numel(), dtype=torch.bool, device=indices.device)
    return mask.index_fill(0, indices, True).view(state.mask.shape)


def _with_filler(rows: Tensor) -> Tensor:
    """Rows with zeros appended up to a bucketed count, where half-precision CPU products would need that."""
    if rows.shape[0] == 0:  # nothing but padding: models cannot reshape a batch of no rows
        return rows.new_zeros(1, rows.shape[1])
    if rows.device.type != "cpu" or (rows.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")):
        return rows
    return torch.nn.functional.pad(rows, (0, 0, 0, row_bucket(rows.shape[0]) - rows.shape[0]))


def write_keys(config: Any, pruner: Pruner) -> None:
    """Describe the method in the model's config, and so in ``config.json``."""
    for key, value in pruner.config().items():
        if value is not None:
            setattr(config, key, value)
        elif hasattr(config, key):
            delattr(config, key)


def _replace_config(model: nn.Module, old: Any, new: Any) -> None:
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a pruned model calls: attention over the surviving tokens, and the layer's decision.

    ``query``, ``key`` and ``value`` are ``[batch, heads, width, head_dim]``, in packed execution ``[1, heads, rows,
    head_dim]``. The mask is unused: the state knows the tokens.
    """
    state = _state(kwargs)
    if state.with_grad and not torch.is_grad_enabled():
        raise ConfigError(
            "a pruned model cannot train through re-entrant gradient checkpointing; "
            'use gradient_checkpointing_kwargs={"use_reentrant": False}'
        )
    layer = state.layer_numbers[module]
    entering, prunes = state.entering(layer), state.prunes(layer)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    probabilities: Tensor | None = None
    if state.packed and state.first_only(layer) and not prunes:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        first, received = entering.first_rows, None
        context = first_token_attention(q[first], k, v, entering, scaling, dropout)
        context = torch.zeros_like(q).index_copy(0, first, context)[None]
    elif state.packed:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        context, received = packed_attention(
            q, k, v, entering, scaling, dropout,
            needs_importance=prunes, differentiable_importance=state.differentiable_importance,
        )  # fmt: skip
        context = context[None]
    else:
        alive = _as_mask(entering.indices, state)
        context, probabilities, padded = masked_attention(query, key, value, alive, scaling, dropout)
        context = context.transpose(1, 2)
        received = padded.flatten()[entering.indices] if prunes else None
    state.decide(layer, received)
    _handover.value = (state, layer)
    return context.contiguous(), probabilities
