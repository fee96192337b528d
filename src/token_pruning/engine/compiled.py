"""``compile``: a Hugging Face encoder as an inference engine."""

import copy
import functools
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from token_pruning.checks import choice, positive_integer
from token_pruning.engine.machine import has_amx
from token_pruning.engine.native import ACTIVATIONS, KERNELS_VARIABLE, NativeEncoder, level_limit, load_library
from token_pruning.engine.tokens import Encoder, PackedTokens
from token_pruning.engine.torch_encoder import Embeddings, TorchEncoder
from token_pruning.errors import ConfigError, UnsupportedModelError
from token_pruning.families import Family, family_of, reads_first_token_only, supported_model_types
from token_pruning.pruners import Unpruned
from token_pruning.ragged.layout import Layout, layout_from_mask, unpack
from token_pruning.runtime.prune import attachment_of, is_pruned
from token_pruning.runtime.state import PassRecord, TokenPruner, recording

EngineDtype = Literal["auto", "float32", "bfloat16", "int8"]

_PACKED = "token_pruning_packed"  # the forward keyword argument by which run_packed asks for packed states


def compile(model: nn.Module, dtype: EngineDtype = "auto", threads: int | None = None) -> "Engine":
    """Turn a model, pruned or not, into an engine for inference on a CPU.

    The engine keeps a packed copy of the weights and the pruning method as they are now; the model can be changed or
    deleted afterwards. Padding is never computed, tokens are removed after each layer's attention, and where the head
    reads the first token only, the last layer computes no others. A sequence's results do not depend on the batch it
    comes in; on the native kernels they are the same to the last bit.

    Args:
        model: a BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA or DistilBERT model with any head, or without.
        dtype: what products are computed in. ``"auto"`` is bfloat16 where the processor has AMX, else float32.
            ``"int8"`` has one scale per output channel of a weight and one per token of its input, taken as it comes:
            no calibration data. Softmax, LayerNorm, residuals and importance are float32 whatever the dtype.
        threads: threads of one call (default: ``torch.get_num_threads()``). Calls from several Python threads run side
            by side; while one call has the helper threads, each other call runs on its caller's thread alone. PyTorch's
            path, where that is used, follows ``torch.set_num_threads``.

    Returns:
        The engine.

    Raises:
        UnsupportedModelError: for a model without an adapter.
        ConfigError: for a wrong dtype or number of threads, int8 without native kernels, or a ``TOKEN_PRUNING_KERNELS``
            that is unknown or beyond the processor.
    """
    choice("dtype", dtype, get_args(EngineDtype))
    threads = torch.get_num_threads() if threads is None else positive_integer("threads", threads)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a Hugging Face model; supported are {', '.join(supported_model_types())}"
        )
    base = model.base_model
    family = family_of(base.config)
    encoder, lines = _make_encoder(family, base, dtype, threads)
    return Engine(model, family, encoder, lines)


def _make_encoder(family: Family, base: Any, dtype: EngineDtype, threads: int) -> tuple[Encoder, list[str]]:
    """The best encoder for this machine, and what to say about the choice."""
    library = load_library()
    limit = level_limit(library)
    activation = family.activation(base.config)
    if library is None:
        _warn_once(
            "token_pruning's native kernels were not built (no C++ compiler at installation, or another platform): "
            "compile() uses PyTorch, which is slower"
        )
        reason = "kernels: PyTorch, because the native library was not built"
    elif limit is None:
        reason = f"kernels: PyTorch, because of {KERNELS_VARIABLE}=torch"
    elif activation not in ACTIVATIONS:
        reason = f"kernels: PyTorch, because the native ones have no activation {activation!r}"
    else:
        reason = ""
    fast_bfloat16 = has_amx() and (limit is None or limit >= 3)
    chosen = ("bfloat16" if fast_bfloat16 else "float32") if dtype == "auto" else dtype
    why = ""
    if dtype == "auto":
        why = " (auto: the processor has AMX)" if fast_bfloat16 else " (auto: bfloat16 pays with AMX only)"
    lines = [f"dtype: {chosen}{why}", f"threads: {threads}"]
    if library is not None and limit is not None and not reason:
        return NativeEncoder(library, family, base, chosen, limit, threads), lines
    if chosen == "int8":
        raise ConfigError(f"dtype 'int8' needs the native kernels; {reason}")
    return TorchEncoder(family, base, getattr(torch, chosen)), [*lines, reason]


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


class Engine:
    """A compiled model; see :func:`compile`.

    Attributes:
        config: the model's configuration.
        token_pruner: the pruning method and its thresholds, as they were when the model was compiled.
    """

    def __init__(self, model: PreTrainedModel, family: Family, encoder: Encoder, lines: list[str]) -> None:
        """Take a copy of everything needed but the encoder's weights, which ``encoder`` has."""
        base: Any = model.base_model
        self.config = copy.deepcopy(model.config)
        layers = family.shape(base.config).num_layers
        if is_pruned(model):
            self.token_pruner = copy.deepcopy(attachment_of(model).token_pruner).to("cpu").eval().requires_grad_(False)
        else:
            self.token_pruner = TokenPruner(Unpruned(), layers, torch.device("cpu"))
        self._encoder, self._lines = encoder, lines
        self._first_only = reads_first_token_only(model)
        self._padding = getattr(base.config, "pad_token_id", None) or 0
        bare = model is base
        stub = _CompiledBase(self, family, base, _output_class(model) if bare else BaseModelOutputWithPooling)
        # A head is everything of the model but its base, which the stub stands in for.
        self._head: nn.Module = stub if bare else copy.deepcopy(model, {id(base): stub})
        self._head.to("cpu", torch.float32).eval().requires_grad_(False)
        _replace_linears(self._head, encoder, getattr(base.config, "vocab_size", -1))

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model on a padded batch.

        Args:
            input_ids: ``[batch, width]`` int64 or int32.
            attention_mask: ``[batch, width]``, non-zero for valid tokens (default: all).
            token_type_ids: ``[batch, width]`` segment ids (default: 0).
            position_ids: ``[batch, width]`` (default: what the model gives them).
            kwargs: what the model's head takes, such as ``labels``.

        Returns:
            The model's output class; floating-point tensors are float32. Hidden states of padding are zero, those of
            removed tokens their last state.

        Raises:
            ConfigError: for tensors of wrong shapes or dtypes, ids outside the vocabulary, sequences longer than the
                model's positions, or outputs that a ragged engine cannot give.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        return self._head(**{name: value for name, value in inputs.items() if value is not None}, **kwargs)

    @torch.inference_mode()
    def run_packed(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Any:
        """Run the model on sequences that were never padded.

        Args:
            input_ids: ``[tokens]`` int64 or int32, sequence after sequence.
            cu_seqlens: ``[batch + 1]`` int32 or int64: sequence ``s`` is ``input_ids[cu_seqlens[s]:cu_seqlens[s+1]]``.
            token_type_ids: ``[tokens]``.
            position_ids: ``[tokens]``.

        Returns:
            The model's output class. What the padded call returns as ``[batch, width, …]`` is ``[tokens, …]`` here.

        Raises:
            ConfigError: as the padded call, and for ``cu_seqlens`` that do not fit ``input_ids``.
        """
        _check_ids("input_ids", input_ids, 1)
        mask = _mask_of(cu_seqlens, input_ids.shape[0])
        padded = {
            "input_ids": torch.full(mask.shape, self._padding, dtype=torch.int64).masked_scatter_(
                mask, input_ids.long()
            )
        }
        for name, value in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
            if value is not None:
                _check_ids(name, value, 1)
                _check_shape(name, value, input_ids.shape)
                padded[name] = torch.zeros(mask.shape, dtype=value.dtype).masked_scatter_(mask, value)
        output = self._head(**padded, attention_mask=mask, **{_PACKED: True})
        if not self._first_only:
            for name in list(output):  # heads saw one long sequence [1, tokens]
                if name != "pooler_output":
                    output[name] = output[name].squeeze(0)
        return output

    def explain(self) -> str:
        """Which kernels were chosen, and why; a line each."""
        lines = [*self._lines, *self._encoder.explain(), f"pruning: {self.token_pruner.pruner!r}"]
        if self._first_only:
            lines.append("last layer: first tokens only, the head reads no others")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Engine({type(self._head).__name__}):\n{self.explain()}"


class _CompiledBase(nn.Module):
    """Stands in for the base model inside a head: checks and packs the input, runs the encoder, unpacks."""

    def __init__(self, engine: Engine, family: Family, base: Any, output_class: Any) -> None:
        super().__init__()
        self._engine, self._family, self._output_class = engine, family, output_class
        self.config = copy.deepcopy(base.config)
        self.pooler = copy.deepcopy(getattr(base, "pooler", None))
        modules = family.embedding_modules(base)
        tables = {"word": modules.word, "position": modules.position, "token_type": modules.token_type}
        self._sizes = {name: 0 if table is None else table.num_embeddings for name, table in tables.items()}
        self._max_positions = family.shape(base.config).max_positions
        # The last states of tokens that never enter the first layer, where a head reads them.
        some_never_enter = bool(engine.token_pruner.pruner.vocabulary_threshold)
        self._embeddings = Embeddings(modules, torch.float32) if some_never_enter and not engine._first_only else None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        packed = kwargs.pop(_PACKED, False)
        self._check_options(input_ids, kwargs)
        assert input_ids is not None
        _check_ids("input_ids", input_ids, 2)
        if attention_mask is None:
            mask = torch.ones(input_ids.shape, dtype=torch.bool)
        else:
            _check_shape("attention_mask", attention_mask, input_ids.shape)
            mask = attention_mask.to("cpu", torch.bool)
        layout = layout_from_mask(mask)
        if position_ids is None:
            position_ids = self._family.positions(input_ids, self.config)
        tokens = PackedTokens(
            ids=self._table_rows("input_ids", input_ids, layout, self._sizes["word"]),
            positions=self._table_rows("position_ids", position_ids, layout, self._sizes["position"]),
            token_types=None
            if token_type_ids is None or self._sizes["token_type"] == 0
            else self._table_rows("token_type_ids", token_type_ids, layout, self._sizes["token_type"]),
            layout=layout,
        )
        engine = self._engine
        entering, kept, dropped = engine.token_pruner.enter(layout, input_ids)
        entered = tokens if kept is None else tokens.of(kept, entering)
        traces = [trace for pruner, trace in recording.get() if pruner is engine.token_pruner]
        output = engine._encoder.run(entered, engine.token_pruner, first_only=engine._first_only, recorded=bool(traces))
        for trace in traces:
            trace.passes.append(
                PassRecord(engine.token_pruner.pruner, mask, layout, entering, output.layers, engine._first_only)
            )
        states = output.states
        if self._embeddings is not None and kept is not None and dropped is not None:
            embedded = self._embeddings(tokens.of(dropped, layout))
            states = states.new_empty(layout.total, states.shape[1])
            states = states.index_copy(0, kept, output.states).index_copy(0, dropped, embedded)
        return self._output(states, layout, packed, kwargs.get("return_dict"))

    def _output(self, states: Tensor, layout: Layout, packed: bool, return_dict: bool | None) -> Any:
        if self._engine._first_only:
            first, states = states, states[:, None]
        else:
            first = states.new_zeros(layout.batch_size, states.shape[1])
            first[layout.lengths_tensor > 0] = states[layout.first_rows]
            states = states[None] if packed else unpack(states, layout.indices, layout.batch_size, layout.width)
        pooled = None if self.pooler is None else self.pooler(first[:, None])
        output = self._output_class(last_hidden_state=states, **({} if pooled is None else {"pooler_output": pooled}))
        return output.to_tuple() if return_dict is False else output

    def _check_options(self, input_ids: Tensor | None, options: dict[str, Any]) -> None:
        if input_ids is None:
            raise ConfigError("input_ids is missing; an engine takes no inputs_embeds")
        for name in ("output_attentions", "output_hidden_states"):
            if options.get(name, getattr(self.config, name, False)):
                raise UnsupportedModelError(
                    f"{name}=True is not possible in an engine, where layers hold different tokens"
                )
        for name in ("inputs_embeds", "encoder_hidden_states", "past_key_values"):
            if options.get(name) is not None:
                raise ConfigError(f"{name} is given; an engine takes input_ids only")

    def _table_rows(self, name: str, values: Tensor, layout: Layout, size: int) -> Tensor:
        """The valid tokens' values, ``[tokens]`` int32, all inside a table of ``size`` rows."""
        _check_ids(name, values, 2)
        if values.shape[0] != layout.batch_size or values.shape[1] != layout.width:
            _check_shape(name, values, torch.Size((layout.batch_size, layout.width)))
        rows = values.flatten()[layout.indices]
        if rows.numel():
            low, high = (int(x) for x in rows.aminmax())
            if low < 0 or high >= size:
                if name == "position_ids":
                    raise ConfigError(
                        f"position_ids reach {high if high >= size else low}; the model has positions for sequences of "
                        f"at most {self._max_positions} tokens: truncate the input"
                    )
                raise ConfigError(
                    f"{name} holds {high if high >= size else low}; the model has ids from 0 to {size - 1}"
                )
        return rows.to(torch.int32)


def _check_ids(name: str, ids: Any, dimensions: int) -> None:
    integers = (torch.int64, torch.int32)
    if not isinstance(ids, Tensor):
        raise ConfigError(f"{name} is a {type(ids).__name__}; it must be a tensor")
    if ids.dtype not in integers or ids.dim() != dimensions or ids.device.type != "cpu":
        raise ConfigError(
            f"{name} is a {ids.dtype} tensor of shape {list(ids.shape)} on {ids.device}; it must be int64 or int32, "
            f"{'[batch, width]' if dimensions == 2 else 'one-dimensional'}, on the CPU"
        )


def _check_shape(name: str, value: Tensor, shape: torch.Size) -> None:
    if value.shape != shape:
        raise ConfigError(f"{name} has shape {list(value.shape)}; it must be {list(shape)}, as input_ids")


def _mask_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """``[batch, longest]`` bool, True for a token."""
    _check_ids("cu_seqlens", cu_seqlens, 1)
    ends = cu_seqlens.tolist()
    lengths = cu_seqlens.diff()
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != tokens or bool((lengths < 0).any()):
        shown = ends if len(ends) <= 8 else [*ends[:4], "…", *ends[-3:]]
        raise ConfigError(f"cu_seqlens is {shown}; it must rise from 0 to the number of tokens, {tokens}")
    return torch.arange(int(lengths.max())) < lengths[:, None]


def _replace_linears(module: nn.Module, encoder: Encoder, vocabulary: int) -> None:
    """Give a head the encoder's kind of linear layers."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, encoder.head_linear(child, vocabulary))
        else:
            _replace_linears(child, encoder, vocabulary)


def _output_class(model: Any) -> Any:
    """The class a bare model returns."""
    with torch.no_grad():
        return type(model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), return_dict=True))
