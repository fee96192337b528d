"""``compile``: a Hugging Face encoder as an inference engine."""

import copy
import functools
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from token_pruning.checks import choice, positive_integer
from token_pruning.engine.adapters import with_merged_adapters
from token_pruning.engine.encoder import Encoder, TorchEncoder
from token_pruning.engine.heads import first_token_steps
from token_pruning.engine.library import (
    ACTIVATIONS,
    KERNELS_VARIABLE,
    level_limit,
    load_library,
    memory_errors,
)
from token_pruning.engine.native import NativeEncoder, why_bfloat16
from token_pruning.errors import ConfigError, UnsupportedModelError
from token_pruning.families import Family, Reads, family_of, padding_id
from token_pruning.families.intact import foreign_to_native, not_plain, refuse_foreign
from token_pruning.pruners import Unpruned
from token_pruning.ragged import Layout, PackedTokens, layout_from_mask
from token_pruning.runtime.adapters import adapter_of
from token_pruning.runtime.attachment import MODULE_NAME
from token_pruning.runtime.departed import Departures, LastStates
from token_pruning.runtime.inputs import check_arguments, check_ids, input_tables, model_output, pack_inputs
from token_pruning.runtime.prune import attachment_of, hugging_face_model, is_pruned, reads_of, set_budget
from token_pruning.runtime.selection import Selection, select
from token_pruning.runtime.spans import answers_with_spans, with_span_loss
from token_pruning.runtime.token_pruner import TokenPruner

EngineDtype = Literal["auto", "float32", "bfloat16", "int8"]

# The forward keyword arguments by which run_packed asks for packed states, or brings those of one text, and run_pooled
# asks for one vector a text.
_PACKED = "token_pruning_packed"
_STATES = "token_pruning_states"
_POOLED = "token_pruning_pooled"


@memory_errors
def compile(
    model: nn.Module, dtype: EngineDtype = "auto", threads: int | None = None, *, reads: Reads | None = None
) -> Any:
    """Turn a model, pruned or not, into an engine for inference on a CPU.

    The engine keeps a packed copy of the weights and the pruning method as they are now; the model can be changed or
    deleted afterwards. Padding is never computed, tokens are removed after each layer's attention, and where the head
    reads the first token only, the last layer computes no others. A sequence's results do not depend on the batch it
    comes in; on the native kernels they are the same to the last bit.

    Args:
        model: of a supported family, with any head or without; adapters such as LoRA's are merged in a copy of it. Or a
            ``SentenceTransformer`` or ``CrossEncoder`` of sentence-transformers that begins with one. All of the
            package's families run on native kernels, others on PyTorch.
        dtype: what products are computed in. ``"auto"`` is bfloat16 where that is faster, with AMX or by AVX-512 BF16
            if a probe of some 3 ms says so; else float32. ``"int8"`` has one scale per output channel of a weight and
            one per token of its input, taken as it comes: no calibration data. Softmax, LayerNorm, residuals and
            importance are float32 whatever the dtype.
        threads: threads of one call (default: ``torch.get_num_threads()``); it takes no more than the cores that the
            process may use when it is made. Calls from several Python threads run side by side; while one call has the
            helper threads, each other call runs on its caller's thread alone. PyTorch's path, where that is used,
            follows ``torch.set_num_threads``.
        reads: as for :func:`token_pruning.prune`, for a model that is not pruned.

    Returns:
        The engine (:class:`Engine`). From a ``SentenceTransformer`` or ``CrossEncoder`` a copy of the same class that
        runs on it; the engine itself is ``copy[0].model.engine``.

    Raises:
        UnsupportedModelError: for a model of another family, one with weights that are not in memory, or one with
            modules that neither the kernels nor the loop on PyTorch would run as they are.
        ConfigError: for a wrong dtype or number of threads, int8 without native kernels, or a ``TOKEN_PRUNING_KERNELS``
            that is unknown or beyond the processor.
    """
    choice("dtype", dtype, get_args(EngineDtype))
    threads = torch.get_num_threads() if threads is None else positive_integer("threads", threads)
    inner = with_merged_adapters(hugging_face_model(model))
    for name, weight in inner.named_parameters():
        if weight.is_meta:
            raise UnsupportedModelError(f"weight {name} is not in memory, but on the device meta; load the whole model")
    if inner.main_input_name != "input_ids":
        raise UnsupportedModelError(f"{type(inner).__name__} takes {inner.main_input_name}; an engine takes input_ids")
    if reads is not None and is_pruned(inner):
        raise ConfigError(f"reads is {reads!r}; for a pruned model it is prune() that says so")
    engine = _engine_class(type(inner).__name__)(inner, dtype, threads, reads_of(model, reads))
    adapter = adapter_of(model)
    return engine if adapter is None else adapter.compiled(model, engine)


def _make_encoder(
    family: Family, embeddings: Family | None, dtype: EngineDtype, threads: int
) -> tuple[Encoder, list[str]]:
    """The best encoder for this machine, and what to say about the choice."""
    library = load_library()
    limit = level_limit(library)
    reason = _why_not_native(family)
    if library is None:
        _warn_once(
            "token_pruning's native kernels were not built (no C++ compiler at installation, or another platform): "
            "compile() uses PyTorch, which is slower"
        )
        reason = "the native library was not built"
    elif limit is None:
        reason = f"of {KERNELS_VARIABLE}=torch"
    chosen, why = dtype, ""
    if dtype == "auto":
        faster = why_bfloat16(library, limit, on_pytorch=bool(reason))
        chosen = "bfloat16" if faster else "float32"
        why = f" (auto: {faster or 'bfloat16 is no faster here'})"
    lines = [f"dtype: {chosen}{why}", f"threads: {threads}"]
    native = native_encoder(family, embeddings, chosen, threads)
    if native is not None:
        return native, lines
    refuse_foreign(family)
    reason = f"kernels: PyTorch, because {reason}"
    if chosen == "int8":
        raise ConfigError(f"dtype 'int8' needs the native kernels; {reason}")
    own = _unpruned_copy(family.base)
    return TorchEncoder(type(family)(own), getattr(torch, chosen)), [*lines, reason]


def native_encoder(family: Family, embeddings: Family | None, dtype: str, threads: int) -> NativeEncoder | None:
    """The native kernels with a model's weights; None where they cannot run it.

    Arguments and errors as :class:`NativeEncoder`.
    """
    library = load_library()
    limit = level_limit(library)
    if library is None or limit is None or _why_not_native(family):
        return None
    return NativeEncoder(library, family, dtype, limit, threads, embeddings)


def _why_not_native(family: Family) -> str:
    """What about a model the native kernels do not have; empty if nothing."""
    if not family.native:
        return f"the native ones have no {family.config.model_type!r} layers"
    if family.activation not in ACTIVATIONS:
        return f"the native ones have no activation {family.activation!r}"
    return foreign_to_native(family)


def _unpruned_copy(module: nn.Module, stand_ins: Mapping[nn.Module, nn.Module | None] = MappingProxyType({})) -> Any:
    """A deep copy without pruning, with something else, or nothing, for some of the modules inside."""
    memo: dict[int, Any] = {id(part): stand_in for part, stand_in in stand_ins.items()}
    if is_pruned(module):
        memo[id(attachment_of(module))] = None
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        part._modules.pop(MODULE_NAME, None)
        if hasattr(part.__dict__.get("forward"), "attachment"):
            del part.forward
    return copied


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


class Pooled(NamedTuple):
    """What :meth:`Engine.run_pooled` gives, float32.

    Attributes:
        vectors: ``[batch, dim]``: the first token's last state, or the mean of all tokens'; zeros for no tokens.
        states: ``[tokens, dim]``, or ``[batch, dim]`` where only first tokens are read; may be None unless asked for.
    """

    vectors: Tensor
    states: Tensor | None


class Engine:
    """A compiled model; see :func:`compile`. It stands in for the model in a ``transformers.pipeline`` too.

    Its class has the name of the model's class, by which pipelines tell what they can run.

    Attributes:
        config: the model's configuration.
        device: the CPU.
        dtype: float32, of all that comes out.
        token_pruner: the pruning method and its thresholds, as they were when the model was compiled.
        reads: which last hidden states are used.
    """

    device = torch.device("cpu")
    dtype = torch.float32
    input_modalities = "text"  # a pipeline's repr has it

    def __init__(self, model: PreTrainedModel, dtype: EngineDtype, threads: int, reads: Reads) -> None:
        """Take a copy of everything needed."""
        base: Any = model.base_model
        family = family_of(base.config)(base)
        self.config = copy.deepcopy(model.config)
        if is_pruned(model):
            attachment = attachment_of(model)
            attachment.token_pruner.fit_vocabulary()
            token_pruner = copy.deepcopy(attachment.token_pruner, {id(attachment): None})
            self.token_pruner = token_pruner.to("cpu").eval().requires_grad_(False)
            self.token_pruner.check_maps(reads)
        else:
            layers = family.shape(base.config).num_layers
            self.token_pruner = TokenPruner(Unpruned(), layers, torch.device("cpu"))
        self.reads: Reads = reads
        self._first_only = reads == "first"
        # A head that reads first tokens is given one state per sequence even where all states are computed.
        self._one_each = self._first_only or (model is not base and family.reads(model) == "first")
        name = type(model).__name__
        self._needs_padding = name.endswith("ForMultipleChoice")
        self._pools = model is not base and not self._one_each and name.endswith(family.first_token_heads)
        self._padding = padding_id(base.config)
        pruner = self.token_pruner.pruner
        natively = 0 in pruner.context_cuts(self.token_pruner.num_layers)
        needs_embeddings = pruner.has_gate and reads != "first" and pruner.departed != "survivors" and not natively
        stub = _CompiledBase(self, family, keep_embeddings=needs_embeddings)
        self._family, self._model_class = stub.family, type(model)
        self._encoder, self._lines = _make_encoder(family, stub.family if needs_embeddings else None, dtype, threads)
        self._departures = self._make_departures()
        # A head is everything of the model but its base, which the stub stands in for.
        self._head = stub if model is base else _unpruned_copy(model, {base: stub})
        self._head.to("cpu", torch.float32).eval().requires_grad_(False)
        _replace_linears(self._head, self._encoder, getattr(base.config, "vocab_size", -1))
        self._base = stub
        self._steps = first_token_steps(self._head, stub.rest) if self._first_only else None

    def _make_departures(self) -> Departures:
        """What departed tokens count as, by products whose rows do not depend on the others of a batch."""

        def affine(weights: Tensor) -> nn.Module:
            linear = nn.Linear(weights.shape[1] - 1, weights.shape[0], device="meta")
            linear.weight, linear.bias = nn.Parameter(weights[:, :-1]), nn.Parameter(weights[:, -1])
            return self._encoder.head_linear(linear, -1)

        maps = {at: affine(weights) for at, weights in self.token_pruner.departure_maps.items()}
        weights = self.token_pruner.correction_weights
        correction = None if weights is None else affine(weights)
        return Departures(self.token_pruner, maps=maps, correction=correction)

    @memory_errors
    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model on a padded batch.

        Args:
            input_ids: ``[batch, width]`` int64 or int32; required.
            attention_mask: ``[batch, width]``, 1 for valid tokens and 0 for padding (default: all valid).
            token_type_ids: ``[batch, width]`` segment ids (default: 0).
            position_ids: ``[batch, width]`` (default: what the model gives them).
            kwargs: what the model's head takes, such as ``labels``.

        Returns:
            The model's output class; floating-point tensors are float32. Hidden states of padding are zero, those of
            removed tokens their last state.

        Raises:
            ConfigError: for tensors of wrong types, shapes or dtypes, ids outside their tables, sequences longer than
                the model's positions, arguments that the model does not have.
            UnsupportedModelError: for outputs that a ragged engine cannot give.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        given = {name: value for name, value in inputs.items() if value is not None} | kwargs
        check_arguments(self._family, given, self._model_class)
        if self._steps is not None and input_ids is not None and not kwargs:
            return self._classified(**inputs)
        if answers_with_spans(self._head):
            return with_span_loss(self._head, self.config, given)
        return self._head(**given)

    forward = __call__

    def _classified(self, **inputs: Tensor | None) -> SequenceClassifierOutput:
        """The output of a head whose steps are known, asked for nothing but logits."""
        assert self._steps is not None
        states = self._base.first_states(**inputs)
        for step in self._steps:
            states = step.forward(states)
        return SequenceClassifierOutput(logits=states)

    def to(self, device: Any) -> "Engine":
        """The engine itself: a pipeline asks for its own device.

        Args:
            device: the CPU.

        Raises:
            ConfigError: for another device.
        """
        if torch.device(device).type != "cpu":
            raise ConfigError(f"device is {str(device)!r}; an engine runs on the CPU: pipeline(…, device='cpu')")
        return self

    def can_generate(self) -> bool:
        """False: pipelines ask."""
        return False

    if not TYPE_CHECKING:  # mypy knows what there is

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(f"an engine has no attribute {name!r}")  # Python would say that the model has none

    def __copy__(self) -> "Engine":
        """Weights are shared, what set_budget changes is not: as in a deep copy."""
        return copy.deepcopy(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty_engine, (type(self).__name__,), self.__dict__

    @memory_errors
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
            ConfigError: as the padded call, for ``cu_seqlens`` that do not fit ``input_ids``, and for multiple choice.
        """
        if self._needs_padding:
            raise ConfigError(f"run_packed cannot run a {type(self._head).__name__}, whose head needs a padded batch")
        inputs = self._padded(input_ids, cu_seqlens, token_type_ids, position_ids)
        if self._steps is not None:
            return self._classified(**inputs)
        if self._pools and len(cu_seqlens) > 1:
            return self._text_by_text(inputs, cu_seqlens.diff().tolist())
        output = self._head(**inputs, **{_PACKED: True})
        if not self._one_each:
            for name in list(output):  # heads saw one long sequence [1, tokens]
                if name != "pooler_output":
                    output[name] = output[name].squeeze(0)
        return output

    def _text_by_text(self, inputs: dict[str, Tensor], lengths: list[int]) -> Any:
        """The output of a head that pools: it sees one text at a time, and so sums over its own tokens alone."""
        states = self._head.base_model(**inputs, **{_POOLED: "states"}).states
        outputs = []
        for text, own in enumerate(torch.split(states, lengths)):
            places = inputs["attention_mask"][text]
            alone = {name: values[text][places][None] for name, values in inputs.items()}
            outputs.append(self._head(**alone, **{_STATES: own}))
        return type(outputs[0])(**{name: torch.cat([output[name] for output in outputs]) for name in outputs[0]})

    @memory_errors
    @torch.inference_mode()
    def run_pooled(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        states: bool = False,
    ) -> Pooled:
        """Run a base model on sequences that were never padded, for one vector each.

        Args:
            input_ids: as for :meth:`run_packed`.
            cu_seqlens: as there.
            token_type_ids: as there.
            states: whether the tokens' last states are wanted too.

        Returns:
            The vectors: first tokens' states where only these are read, else means. On the native kernels they are the
            same to the last bit in any batch.

        Raises:
            ConfigError: as :meth:`run_packed`; and for a model with a head.
        """
        if not isinstance(self._head, _CompiledBase):
            raise ConfigError(f"run_pooled runs a base model; this is a {type(self._head).__name__}")
        inputs = self._padded(input_ids, cu_seqlens, token_type_ids, None)
        pooled: Pooled = self._head(**inputs, **{_POOLED: "states" if states else "vectors"})
        return pooled

    def _padded(
        self, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None
    ) -> dict[str, Tensor]:
        """Packed ids as the forward of a model takes them; of ids alone padding costs nothing."""
        _check_on_cpu("input_ids", check_ids("input_ids", input_ids, 1))
        mask = _mask_of(cu_seqlens, input_ids.shape[0])
        padded = {"input_ids": input_ids.new_full(mask.shape, self._padding).masked_scatter_(mask, input_ids)}
        for name, value in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
            if value is not None:
                _check_on_cpu(name, check_ids(name, value, 1))
                if value.shape != input_ids.shape:
                    raise ConfigError(
                        f"{name} has shape {list(value.shape)}; it must be {list(input_ids.shape)}, as input_ids"
                    )
                padded[name] = value.new_zeros(mask.shape).masked_scatter_(mask, value)
        return {**padded, "attention_mask": mask}

    def linear(self, linear: nn.Linear) -> nn.Module:
        """A linear layer on the engine's kernels, float32: on the native ones a row's result is its own.

        Args:
            linear: of another module than the engine's, such as one behind the pooling.
        """
        return self._encoder.head_linear(linear, -1)

    def set_budget(self, budget: float) -> None:
        """Prune to another of the budgets that the model was calibrated for, in place.

        Args:
            budget: relative FLOPs; errors as for :func:`token_pruning.set_budget`.
        """
        set_budget(self, budget)

    @property
    def is_dense(self) -> bool:
        """Whether the model was not pruned when it was compiled."""
        return isinstance(self.token_pruner.pruner, Unpruned)

    @property
    def is_native(self) -> bool:
        """Whether it runs on the package's own kernels, and not on PyTorch."""
        return isinstance(self._encoder, NativeEncoder)

    def explain(self) -> str:
        """Which kernels were chosen, and why; a line each."""
        lines = [*self._lines, *self._encoder.explain(), f"pruning: {self.token_pruner.pruner!r}"]
        if self._first_only:
            lines.append("last layer: first tokens only, the head reads no others")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Engine({type(self._head).__name__}):\n{self.explain()}"


@functools.cache
def _engine_class(name: str) -> type[Engine]:
    """Engines of the models of one class."""
    return type(name, (Engine,), {})


def _empty_engine(name: str) -> Engine:
    """What a pickle is read into: it cannot find a class that was made when it was needed."""
    made = _engine_class(name)
    return made.__new__(made)


class _CompiledBase(nn.Module):
    """Stands in for the base model inside a head: checks and packs the input, runs the encoder, unpacks."""

    def __init__(self, engine: Engine, family: Family, *, keep_embeddings: bool) -> None:
        super().__init__()
        self._engine = engine
        base = family.base
        left_out: list[nn.Module | None] = [*family.layers]
        if not keep_embeddings:
            left_out += [getattr(base, "embeddings", None), base.get_input_embeddings()]
        self.rest = _unpruned_copy(base, {part: None for part in left_out if part is not None})
        self.config = self.rest.config
        self.family = type(family)(self.rest)
        self._tables = input_tables(base)

    def __getattr__(self, name: str) -> Any:
        """What else a head looks for in its base model."""
        if name == "embeddings":
            raise UnsupportedModelError(
                f"the head of this model reads the embeddings of its {type(self.rest).__name__}, which an engine has "
                "packed; use the pruned model itself"
            )
        return super().__getattr__(name)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        packed, pooled = kwargs.pop(_PACKED, False), kwargs.pop(_POOLED, None)
        known: Tensor | None = kwargs.pop(_STATES, None)
        if known is not None:
            layout = layout_from_mask(torch.ones(1, known.shape[0], dtype=torch.bool, device="cpu"))
            return self._output(known, layout, packed, kwargs.get("return_dict"))
        self._check_options(input_ids, kwargs)
        engine = self._engine
        tokens, selection, last = self._run(input_ids, attention_mask, token_type_ids, position_ids)
        entering = tokens if selection is None else selection.tokens
        departures = engine._departures
        states = None
        if pooled != "vectors" or engine.reads == "first":
            states = departures.states(last, entering.layout, engine.reads, selection, tokens.layout)
        if pooled is None:
            assert states is not None
            return self._output(states, tokens.layout, packed, kwargs.get("return_dict"))
        if states is not None and engine.reads == "first":
            return Pooled(states, states)
        texts = None if selection is None else selection.cu_texts
        return Pooled(departures.pooled(last, entering.layout, cu_texts=texts), states)

    def first_states(self, **inputs: Tensor | None) -> Tensor:
        """First tokens' last states, ``[batch, dim]``, where only these are read; arguments as of :meth:`forward`."""
        self._check_options(inputs["input_ids"], {})
        tokens, selection, last = self._run(**inputs)
        entering = tokens if selection is None else selection.tokens
        return self._engine._departures.states(last, entering.layout, "first", selection, tokens.layout)

    def _run(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[PackedTokens, Selection | None, LastStates]:
        """The valid tokens, what was chosen of them, and the encoder's last states of that."""
        for name, value in (
            ("input_ids", input_ids),
            ("token_type_ids", token_type_ids),
            ("position_ids", position_ids),
        ):
            if value is not None:
                _check_on_cpu(name, value)
        engine = self._engine
        pruner = engine.token_pruner.pruner
        tokens = pack_inputs(
            self.family,
            self._tables,
            max_tokens=pruner.max_tokens,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
        )
        selection = select(tokens, pruner)
        entering = tokens if selection is None else selection.tokens
        return tokens, selection, engine._encoder.run(entering, engine.token_pruner, reads=engine.reads)

    def _output(self, states: Tensor, layout: Layout, packed: bool, return_dict: bool | None) -> Any:
        first_only, one_each = self._engine._first_only, self._engine._one_each
        output = model_output(
            self.family, states, layout, first_only=first_only, for_first_token_head=one_each, return_dict=True
        )
        if packed and not one_each:
            output.last_hidden_state = states[None]
        return self.family.as_tuple(output) if return_dict is False else output

    def _check_options(self, input_ids: Tensor | None, options: dict[str, Any]) -> None:
        if input_ids is None:
            raise ConfigError("input_ids is missing; an engine takes no inputs_embeds")
        for name in ("output_attentions", "output_hidden_states"):
            if options.get(name, getattr(self.config, name, False)):
                raise UnsupportedModelError(
                    f"{name}=True is not possible in an engine, where layers hold different tokens"
                )
        if options.pop("inputs_embeds", None) is not None:
            raise ConfigError("inputs_embeds is given; an engine takes input_ids only")


def _check_on_cpu(name: str, value: Any) -> None:
    """Raises ConfigError for a tensor elsewhere."""
    if isinstance(value, Tensor) and not value.is_cpu:
        raise ConfigError(f"{name} is on {value.device}; an engine takes tensors on the CPU")


def _mask_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """``[batch, longest]`` bool, True for a token."""
    _check_on_cpu("cu_seqlens", check_ids("cu_seqlens", cu_seqlens, 1))
    ends = cu_seqlens.tolist()
    lengths = cu_seqlens.diff()
    if not ends or ends[0] != 0 or ends[-1] != tokens or bool((lengths < 0).any()):
        shown = ends if len(ends) <= 8 else [*ends[:4], "…", *ends[-3:]]
        raise ConfigError(f"cu_seqlens is {shown}; it must rise from 0 to the number of tokens, {tokens}")
    return torch.arange(max([1, *lengths.tolist()]), device="cpu") < lengths[:, None]  # a column even for no tokens


def _replace_linears(module: nn.Module, encoder: Encoder, vocabulary: int) -> None:
    """Give a head the encoder's kind of linear layers."""
    for name, child in module.named_children():
        if type(child) is nn.Linear and not not_plain(child):
            setattr(module, name, encoder.head_linear(child, vocabulary))
        else:
            _replace_linears(child, encoder, vocabulary)
