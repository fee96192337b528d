"""The native encoder: C++ kernels that compute a whole forward pass.

Nothing here is a callback: where a pruner in Python decides, the native call returns, and goes on when it is called
again. So an exception or Ctrl-C rises like any other. All memory of a call belongs to Python: a call that is given up
leaves nothing behind.
"""

import contextlib
import copy
import ctypes
import functools
import itertools
import math
import os
import time
from collections.abc import Iterator
from ctypes import c_char_p, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from token_pruning.engine.library import (
    ACTIVATIONS,
    DTYPES,
    KERNELS_VARIABLE,
    LEVELS,
    PARTS,
    Handle,
    Request,
    Shape,
    Workspace,
    as_float32,
    check,
    level_limit,
    levels_here,
    load_library,
    pointer,
    sized,
)
from token_pruning.engine.machine import has_amx
from token_pruning.errors import TokenPruningError
from token_pruning.families import Family, HeadOutputs, LayerModules, Outputs, Reads
from token_pruning.families.intact import epsilon_of
from token_pruning.pruners import FixedThreshold, LayerTokens
from token_pruning.pruners.importance import importance_scores
from token_pruning.pruners.summary import Summaries
from token_pruning.ragged import Layout, PackedTokens
from token_pruning.runtime.departed import LastStates, needs_left_at
from token_pruning.runtime.roles import asking, first_segment, protected
from token_pruning.runtime.token_pruner import TokenPruner
from token_pruning.runtime.trace import LayerRecord, PassRecord, recording

_STATE_FORMAT = 5  # of a pickled engine
_WORTHWHILE = 1.1  # how many times as fast bfloat16 products must be


class _Linear(NamedTuple):
    """The numbers of a linear layer: ``[out, in]``, ``[out]``, and for int8 ``[out]``, what its whole numbers mean."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None = None


class _Value(NamedTuple):
    """A tensor in a pickle.

    As a tensor, multiprocessing would send it to a process that it starts by a file descriptor; those of tensors that
    are made for the pickle alone are closed before the process opens them.
    """

    data: bytes
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor | None) -> "_Value | None":
        """A tensor's numbers."""
        if tensor is None:
            return None
        return cls(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), tensor.dtype, tuple(tensor.shape))

    def tensor(self) -> Tensor:
        """A tensor with them."""
        return torch.frombuffer(bytearray(self.data), dtype=self.dtype).view(self.shape)


_STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def _exported(dtype: str, shape: tuple[int, int], read: Any) -> _Linear:
    """A packed linear layer's numbers, in the dtype that holds them exactly; ``read`` fills three float32 arrays."""
    weight = torch.empty(shape, dtype=torch.float32, device="cpu")
    bias, scale = (torch.empty(shape[0], dtype=torch.float32, device="cpu") for _ in range(2))
    read(weight.data_ptr(), bias.data_ptr(), scale.data_ptr())
    return _Linear(weight.to(_STORED[dtype]), bias, scale if dtype == "int8" else None)


def _restored_limit(state: dict[str, Any]) -> tuple[ctypes.CDLL, int]:
    """The library, and the best kernel level for a pickled engine here.

    That is its own, so that it gives the same results to the last bit; where there is none such, the best there is.
    """
    if state.pop("format", None) != _STATE_FORMAT:
        raise TokenPruningError("this engine was pickled by another version of the package: compile the model again")
    library = load_library()
    limit = level_limit(library)
    if library is None or limit is None:
        why = "were not built here" if library is None else f"{KERNELS_VARIABLE} rules out"
        raise TokenPruningError(f"this engine needs native kernels, which {why}: compile the model again")
    own = int(state["_limit"])
    return library, own if own <= limit and library.tp_has_level(own) else limit


class NativeLinear(nn.Module):
    """A linear layer on the native kernels: a row's result never depends on the rows beside it.

    Copies share the packed weights. Pickled, it is its numbers in its dtype, packed again where it is loaded.
    """

    def __init__(self, library: ctypes.CDLL, linear: nn.Linear, dtype: str, limit: int, threads: int) -> None:
        """Pack the weights of ``linear`` for the best level up to ``limit``.

        Raises:
            MemoryError: if there is no memory for them.
        """
        super().__init__()
        self._threads, self._dtype, self._limit = threads, dtype, limit
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._pack(library, _Linear(linear.weight, linear.bias))

    def _pack(self, library: ctypes.CDLL, numbers: _Linear) -> None:
        self._library = library
        # A head's output sizes fit no tile; only the shared side and whole panels matter to the packing.
        dtype = DTYPES[self._dtype]
        level = library.tp_choose_level(self._limit, dtype, self.in_features, self.in_features, 32)
        if self.out_features % 32 and LEVELS[level] == "amx":
            level = library.tp_choose_level(level - 1, dtype, self.in_features, self.in_features, 32)
        weight, bias, scale = (as_float32(tensor) for tensor in numbers)
        address = library.tp_linear_new(
            level, dtype, pointer(weight), pointer(bias), pointer(scale), self.in_features, self.out_features
        )
        self._handle = Handle(library, address, "tp_linear_free")

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``, float32."""
        rows = x if x.dtype == torch.float32 else x.float()  # asking costs less than a call that changes nothing
        if rows.dim() != 2 or rows.shape[1] != self.in_features or not rows.is_contiguous():
            rows = rows.reshape(-1, self.in_features).contiguous()
        out = torch.empty(rows.shape[0], self.out_features, dtype=torch.float32, device="cpu")
        failed = self._library.tp_linear_apply(
            self._handle, rows.data_ptr(), rows.shape[0], out.data_ptr(), self._threads
        )
        check(self._library, failed)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], self.out_features)

    def __deepcopy__(self, memo: dict[int, Any]) -> "NativeLinear":
        copied = NativeLinear.__new__(NativeLinear)
        memo[id(self)] = copied
        shared = {"_library": self._library, "_handle": self._handle}
        copied.__dict__.update({k: shared.get(k) or copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return copied

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in ("_library", "_handle")}

        def read(*arrays: int) -> None:
            check(self._library, self._library.tp_linear_get(self._handle, *arrays))

        numbers = _exported(self._dtype, (self.out_features, self.in_features), read)
        return {**state, "numbers": tuple(map(_Value.of, numbers)), "format": _STATE_FORMAT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        library, state["_limit"] = _restored_limit(state)
        numbers = _Linear(*(value and value.tensor() for value in state.pop("numbers")))
        self.__dict__.update(state)
        self._pack(library, numbers)


@functools.cache
def _bfloat16_gain() -> float:
    """How many times as fast bfloat16 products by AVX-512 BF16 are as float32 ones on bfloat16 weights.

    Measured in about 3 ms, once in a process.
    """
    linear = nn.Linear(512, 256, bias=False, device="meta")
    linear.weight = nn.Parameter(torch.full((256, 512), 0.01, device="cpu"))
    rows, library = torch.full((96, 512), 0.1, device="cpu"), load_library()
    assert library is not None
    layers = [NativeLinear(library, linear, "bfloat16", LEVELS.index(name), 1) for name in ("avx512_bf16", "avx512")]
    best = [math.inf, math.inf]
    for _ in range(5):  # in turn, so that a disturbance hits both
        for i, layer in enumerate(layers):
            began = time.perf_counter()
            layer(rows)
            best[i] = min(best[i], time.perf_counter() - began)
    return best[1] / best[0]


def why_bfloat16(library: ctypes.CDLL | None, limit: int | None, *, on_pytorch: bool) -> str:
    """Why bfloat16 products are faster than float32 ones here; empty where they are not.

    Args:
        library: the kernels.
        limit: the best level allowed, None for none.
        on_pytorch: whether they are PyTorch's, which are fast with AMX alone.
    """
    if has_amx() and (limit is None or LEVELS[limit] == "amx"):
        return "the processor has AMX"
    level = LEVELS.index("avx512_bf16")
    if on_pytorch or library is None or limit is None or limit < level or not library.tp_has_level(level):
        return ""
    gain = _bfloat16_gain()
    return f"{gain:.2f} times as fast as float32 in a probe" if gain >= _WORTHWHILE else ""


class _Part(NamedTuple):
    """Some of an encoder's weights: where they belong, and the tensors. Layer -1 is all that is no layer's."""

    kind: str  # "table", "norm", "linear", "rotation", "bias", "distances" or "distance"
    layer: int
    which: int
    tensors: tuple[Tensor | None, ...]


def _parts(family: Family, table_dtype: torch.dtype) -> Iterator[_Part]:
    """A base model's weights, one after the other, so that they are never all copied at once."""

    def norm(layer: int, which: int, module: nn.Module) -> _Part:
        return _Part("norm", layer, which, (module.weight, getattr(module, "bias", None)))  # type: ignore[arg-type]

    embeddings, last = family.embedding_modules(), family.last_norm
    for which, table in enumerate((embeddings.word, embeddings.position, embeddings.token_type)):
        if table is not None:
            yield _Part("table", -1, which, (table.weight.detach().to("cpu", table_dtype),))
    if embeddings.norm is not None:
        yield norm(-1, 0, embeddings.norm)
    if last is not None:
        yield norm(-1, 1, last)
    if embeddings.projection is not None:
        yield _Part("linear", -1, 0, (embeddings.projection.weight, embeddings.projection.bias, None))
    if embeddings.projected_norm is not None:
        yield norm(-1, 2, embeddings.projected_norm)
    bias = family.distance_bias()
    if bias is not None:
        yield _Part("bias", -1, 0, (bias.detach(),))
    for number, layer in enumerate(map(family.layer_modules, _distinct(family))):
        for which, linear in enumerate(_linears(layer)):
            if linear is not None:
                yield _Part("linear", number, which, (*_numbers(linear), None))
        if layer.attention_norm is not None:
            yield norm(number, 0, layer.attention_norm)
        yield norm(number, 1, layer.output_norm)
    yield from _distance_parts(family)


def _distance_parts(family: Family) -> Iterator[_Part]:
    """What disentangled attention multiplies each layer's queries and keys with: constants of the weights."""
    heads, columns = family.shape(family.config).num_heads, None
    for number, layer in enumerate(_distinct(family)):
        modules = family.distance_modules(layer)
        if modules is None:
            continue
        if columns is None:
            columns = modules.columns.to(torch.int32)
            yield _Part("distances", -1, 0, (columns,))
        rows: Any = as_float32(modules.embeddings.weight[: int(columns[-1]) + 1])
        norm: Any = modules.norm
        if norm is not None:
            gamma, beta = as_float32(norm.weight), as_float32(norm.bias)
            rows = functional.layer_norm(rows, rows.shape[1:], gamma, beta, epsilon_of(norm))
        for which, projection in enumerate((modules.key, modules.query)):
            if projection is not None:
                weight: Any = as_float32(projection.weight)
                projected = functional.linear(rows, weight, as_float32(projection.bias)) * family.scale(layer)
                products = projected.view(len(rows), heads, -1).transpose(0, 1)  # [heads, columns, head_dim]
                yield _Part("distance", number, which, (products,))


def _distinct(family: Family) -> list[nn.Module]:
    """The layers that have weights of their own, in the order that they first run in."""
    return list(dict.fromkeys(family.layers))


def _linears(layer: LayerModules) -> tuple[nn.Linear | Outputs | HeadOutputs | None, ...]:
    return (
        layer.query,
        layer.key,
        layer.value,
        layer.attention_output,
        layer.feed_forward_up,
        layer.feed_forward_down,
        layer.feed_forward_gate,
    )


def _numbers(part: nn.Linear | Outputs | HeadOutputs) -> tuple[Tensor, Tensor | None]:
    """Weight and bias."""
    return (part.weight, part.bias) if isinstance(part, nn.Linear) else part.numbers()


class _Step(NamedTuple):
    """What a layer has of its own: the number of its weights, its window, the number of its rotation; -1 for none."""

    weights: int
    window: int
    rotation: int


def _steps(family: Family) -> tuple[list[_Step], list[_Part]]:
    """Every layer's step, in the order that they run in, and the rotations that they name."""
    numbers = {layer: number for number, layer in enumerate(_distinct(family))}
    rotations: dict[tuple[float, ...], int] = {}
    parts: list[_Part] = []
    steps: list[_Step] = []
    for layer in family.layers:
        rotation, window, which = family.rotation(layer), family.terms(layer).window, -1
        if rotation is not None:
            frequencies = rotation.frequencies.detach().to("cpu", torch.float32)
            key = (rotation.factor, *frequencies.tolist())
            which = rotations.setdefault(key, len(rotations))
            if which == len(parts):
                parts.append(_Part("rotation", -1, which, (frequencies, torch.tensor([rotation.factor]))))
        steps.append(_Step(numbers[layer], -1 if window is None else window, which))
    return steps, parts


class _Roles(NamedTuple):
    """What the tokens of a call are to the method, ``[tokens]`` uint8 of 0 or 1, as encoder.h has it; None for none."""

    segments: Tensor | None
    stays: Tensor | None
    asks: Tensor | None
    outside: Tensor | None


class _Context:
    """A method's :class:`token_pruning.LinearContext` on the native kernels."""

    def __init__(self, library: ctypes.CDLL, encoder: Handle, token_pruner: TokenPruner) -> None:
        setting = token_pruner.pruner.context
        assert setting is not None
        self.tensors = token_pruner.context_down, token_pruner.context_up
        self.versions = _versions(self.tensors)
        numbers = []
        for tensor in map(as_float32, self.tensors):
            assert tensor is not None
            numbers += [tensor[..., :-1].contiguous(), tensor[..., -1].contiguous()]
        cuts = torch.tensor(setting.layers, dtype=torch.int32, device="cpu")
        rank = setting.down.shape[1]
        address = library.tp_context_new(encoder, cuts.data_ptr(), len(cuts), rank, *map(pointer, numbers))
        self.handle = Handle(library, address, "tp_context_free")

    def is_of(self, token_pruner: TokenPruner) -> bool:
        """Whether it was made from the tensors as they are now."""
        now = token_pruner.context_down, token_pruner.context_up
        same = all(mine is other for mine, other in zip(self.tensors, now, strict=True))
        return same and self.versions == _versions(now)


def _versions(tensors: tuple[Tensor | None, ...]) -> list[int]:
    """What changes when a tensor is written to; inference tensors do not say."""
    return [0 if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors]


class NativeEncoder:
    """An encoder whose forward pass is native.

    A copy shares the packed weights. Pickled, it is its weights in its dtype (for int8 the whole numbers and their
    scales), unpacked: as large as ``weight_bytes``, which a process that pickles or loads one needs once more for the
    while. Loaded, it is packed for the same kernels as before, and gives the same results to the last bit; on a
    processor without them, for the best below.

    A call needs memory in proportion to its tokens and threads, by the formula in ``native/encoder.h``. It is kept for
    the next call: as many pieces as calls ever ran at once.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        family: Family,
        dtype: str,
        limit: int,
        threads: int,
        embeddings: Family | None = None,
    ) -> None:
        """Pack a base model's weights.

        Args:
            library: from :func:`load_library`.
            family: bound to the base model.
            embeddings: bound to a float32 copy of the embeddings, for tokens that never enter the first layer; None
                where their states are unused.
            dtype: ``"float32"``, ``"bfloat16"`` or ``"int8"``.
            limit: the best kernel level allowed.
            threads: threads of one call, at most: it takes no more than the cores that it may use.

        Raises:
            MemoryError: if there is no memory for them.
        """
        self.dtype, self.threads = dtype, threads
        self.shape = family.shape(family.config)
        self._embeddings = embeddings
        self._limit, self._restored = limit, False
        self._context: _Context | None = None
        self._gain: float | None = None
        first, projection = family.layers[0], family.embedding_modules().projection
        modules = family.layer_modules(first)
        self._described = {
            "layers": self.shape.num_layers,
            "hidden": self.shape.hidden_size,
            "heads": self.shape.num_heads,
            "key_heads": self.shape.num_kv_heads or self.shape.num_heads,
            "head_size": self.shape.query_size // self.shape.num_heads,
            "inner": self.shape.intermediate_size,
            "epsilon": epsilon_of(modules.output_norm),
            "scale": family.scale(first),
            "activation": ACTIVATIONS[family.activation],
            "norm_first": family.norm_first,
            "rms_norm": family.rms_norm,
            "gated": modules.feed_forward_gate is not None,
        }
        self._projected = None if projection is None else projection.in_features
        self._steps, rotations = _steps(family)
        self._placed = (
            family.distance_bias() is not None
            or any(step.window >= 0 for step in self._steps)
            or any(family.distance_modules(layer) is not None for layer in family.layers)
        )
        self._library = library
        level = self._choose_level()
        if LEVELS[level] == "avx512_bf16" and not os.environ.get(KERNELS_VARIABLE):
            self._gain = _bfloat16_gain()
            if self._gain < _WORTHWHILE:
                self._limit = level - 1
        self._pack(library, itertools.chain(rotations, _parts(family, self._table_dtype)))

    @property
    def _table_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    def _choose_level(self) -> int:
        shape, level = self.shape, self._limit
        for width in (shape.hidden_size, shape.query_size, self._projected):  # of what enters a product
            if width is not None:
                level = self._library.tp_choose_level(
                    level, DTYPES[self.dtype], width, shape.intermediate_size, self._described["head_size"]
                )
        return int(level)

    def _pack(self, library: ctypes.CDLL, parts: Iterator[_Part]) -> None:
        self._library = library
        self.level = self._choose_level()
        address = library.tp_encoder_new(self.level, DTYPES[self.dtype], Shape(**self._described))
        self._handle = Handle(library, address, "tp_encoder_free")
        self._shapes: dict[tuple[str, int, int], tuple[int, int]] = {}
        self._small: dict[tuple[str, int, int], _Part] = {}  # what the native side does not give back
        self._spare: list[Workspace] = []
        for number, step in enumerate(self._steps):
            check(library, library.tp_encoder_set_step(self._handle, number, *step))
        for part in parts:
            self._set(part)

    def _set(self, part: _Part) -> None:
        library, layer, which = self._library, part.layer, part.which
        if part.kind == "table":
            assert part.tensors[0] is not None
            table = part.tensors[0].contiguous()
            rows, size = table.shape
            half = table.dtype == torch.bfloat16
            failed = library.tp_encoder_set_table(self._handle, which, table.data_ptr(), rows, size, half)
        elif part.kind == "distances":
            columns = part.tensors[0]
            assert columns is not None
            self._small[part[:3]] = part
            rows, size = 1, len(columns)
            failed = library.tp_encoder_set_distances(self._handle, columns.data_ptr(), size // 2)
        elif part.kind == "distance":
            products = as_float32(part.tensors[0])
            assert products is not None
            rows, size = products.shape[:2]
            failed = library.tp_encoder_set_distance_products(
                self._handle, layer, which, products.data_ptr(), rows, size
            )
        else:
            numbers = [as_float32(tensor) for tensor in part.tensors]
            assert numbers[0] is not None
            rows, size = numbers[0].shape if numbers[0].dim() == 2 else (1, len(numbers[0]))
            pointers = [pointer(tensor) for tensor in numbers]
            if part.kind in ("rotation", "bias"):
                self._small[part[:3]] = part._replace(tensors=tuple(numbers))
            if part.kind == "rotation":
                assert numbers[1] is not None
                failed = library.tp_encoder_set_rotation(self._handle, which, pointers[0], size, float(numbers[1]))
            elif part.kind == "bias":
                failed = library.tp_encoder_set_bias(self._handle, pointers[0], rows, size // 2)
            elif part.kind == "linear":
                failed = library.tp_encoder_set_linear(self._handle, layer, which, *pointers, size, rows)
            else:
                failed = library.tp_encoder_set_norm(self._handle, layer, which, *pointers, size)
        check(library, failed)
        self._shapes[part.kind, layer, which] = rows, size

    def _get(self, kind: str, layer: int, which: int) -> _Part:
        """What :meth:`_set` was given, as it is used."""
        if (kind, layer, which) in self._small:
            return self._small[kind, layer, which]
        library, (rows, size) = self._library, self._shapes[kind, layer, which]
        tensors: tuple[Tensor | None, ...]
        if kind == "linear":

            def read(*arrays: int) -> None:
                check(library, library.tp_encoder_get_linear(self._handle, layer, which, *arrays, size, rows))

            tensors = _exported(self.dtype, (rows, size), read)
        elif kind == "distance":
            shape = rows, size, int(self._described["head_size"])
            products = torch.empty(shape, dtype=torch.float32, device="cpu")
            failed = library.tp_encoder_get_distance_products(
                self._handle, layer, which, products.data_ptr(), rows, size
            )
            check(library, failed)
            tensors = (products.to(self._table_dtype),)
        elif kind == "norm":
            gamma, beta = (torch.empty(size, dtype=torch.float32, device="cpu") for _ in range(2))
            pointers = gamma.data_ptr(), beta.data_ptr()
            check(library, library.tp_encoder_get_norm(self._handle, layer, which, *pointers, size))
            tensors = gamma, beta
        else:
            table = torch.empty((rows, size), dtype=self._table_dtype, device="cpu")
            check(library, library.tp_encoder_get_table(self._handle, which, table.data_ptr(), rows, size))
            tensors = (table,)
        return _Part(kind, layer, which, tuple(tensors))

    def __deepcopy__(self, memo: dict[int, Any]) -> "NativeEncoder":
        copied = NativeEncoder.__new__(NativeEncoder)
        memo[id(self)] = copied
        copied.__dict__.update(self.__dict__, _embeddings=copy.deepcopy(self._embeddings, memo), _spare=[])
        return copied

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_library", "_handle", "_spare", "_shapes", "_small", "_context", "level")
        state = {name: value for name, value in self.__dict__.items() if name not in left_out}
        parts = [(*place, *map(_Value.of, self._get(*place).tensors)) for place in self._shapes]
        return {**state, "parts": parts, "format": _STATE_FORMAT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        library, state["_limit"] = _restored_limit(state)
        parts = state.pop("parts")
        self.__dict__.update(state, _restored=True, _gain=None, _context=None)
        self._pack(
            library,
            (
                _Part(kind, layer, which, tuple(value and value.tensor() for value in values))
                for kind, layer, which, *values in parts
            ),
        )

    @property
    def weight_bytes(self) -> int:
        """Memory of the packed weights and tables, in bytes."""
        return int(self._library.tp_encoder_weight_bytes(self._handle))

    def head_linear(self, linear: nn.Linear, vocabulary: int) -> NativeLinear:
        """A head's linear layer on these kernels: float32, but for one as wide as the vocabulary."""
        dtype = self.dtype if linear.out_features == vocabulary else "float32"
        return NativeLinear(self._library, linear, dtype, self._limit, self.threads)

    def run(
        self, tokens: PackedTokens, token_pruner: TokenPruner, *, reads: Reads, seconds: Tensor | None = None
    ) -> LastStates:
        """See :class:`token_pruning.engine.encoder.Encoder`.

        Args:
            tokens: see there.
            token_pruner: see there.
            reads: see there.
            seconds: ``[len(PARTS)]`` float64, to which the time of each part is added.

        Raises:
            MemoryError: if there is no memory for the call.
            TokenPruningError: for tokens that the tables do not have.
            Exception: whatever the pruner raises.
        """
        if not tokens.layout.batch_size:
            return LastStates(torch.empty(0, self.shape.hidden_size, dtype=torch.float32, device="cpu"))
        pruner, first_only = token_pruner.pruner, reads == "first"
        entering, kept, dropped = token_pruner.enter(tokens)
        outside = None
        if dropped is not None and 0 in pruner.context_cuts(self.shape.num_layers):  # they are keys still
            outside = torch.zeros(tokens.layout.total, dtype=torch.uint8, device="cpu").index_fill(0, dropped, 1)
            kept = dropped = None
        traces = [trace for recorded, trace in recording.get() if recorded is token_pruner]

        def of_entered(role: Tensor | None) -> Tensor | None:
            return None if role is None else (role if kept is None else role[kept]).to(torch.uint8)

        second = None
        if pruner.summary_tokens == "segment":
            assert tokens.ids is not None
            second = ~first_segment(tokens.ids, tokens.layout)
        roles = _Roles(
            of_entered(second),
            of_entered(protected(tokens, pruner)),
            of_entered(asking(tokens, pruner)),
            outside,
        )
        entered = (tokens if kept is None else tokens.of(kept, entering)).int32()
        states, survived, layers = self._forward(
            entered, token_pruner, roles, entering, first_only=first_only, recorded=bool(traces), seconds=seconds
        )
        for trace in traces:
            trace.passes.append(PassRecord(pruner, tokens.layout, entering, reads, layers))
        left_at = survived.long() + 1 if needs_left_at(pruner, reads) else None
        if kept is None or dropped is None:
            return LastStates(states, left_at)
        if left_at is not None:
            left_at = left_at.new_zeros(tokens.layout.total).index_copy(0, kept, left_at)
        if first_only:
            return LastStates(states, left_at)
        everything = states.new_zeros(tokens.layout.total, states.shape[1]).index_copy(0, kept, states)
        if pruner.departed != "survivors":  # what never entered keeps its embedding
            assert self._embeddings is not None
            embedded = self._embeddings.embed(tokens.of(dropped, tokens.layout))
            if pruner.departed != "map":  # as maps were fitted to them
                embedded = self._embeddings.finish(embedded)
            everything = everything.index_copy(0, dropped, embedded)
        return LastStates(everything, left_at)

    def _forward(
        self,
        tokens: PackedTokens,
        token_pruner: TokenPruner,
        roles: _Roles,
        entering: Layout,
        *,
        first_only: bool,
        recorded: bool,
        seconds: Tensor | None,
    ) -> tuple[Tensor, Tensor, dict[int, LayerRecord]]:
        """The native call.

        Returns:
            Last states, zeros for tokens that left where these count for nothing; ``[tokens]`` int32 layers that each
            token survived; and a record per layer (1-based) if they are asked for, else none.
        """
        layout, layers = tokens.layout, self.shape.num_layers
        cu_seqlens = layout.cu_seqlens
        if 0 in layout.lengths:  # the native side knows no empty sequences
            cu_seqlens = torch.cat([cu_seqlens[:1], cu_seqlens[1:][cu_seqlens.diff() > 0]])
        total, sequences = layout.total, cu_seqlens.numel() - 1
        rows, size = sequences if first_only else total, self.shape.hidden_size
        method = token_pruner.pruner
        departed = method.departed != "survivors"
        make = torch.empty if first_only or departed else torch.zeros
        out = make(rows, size, dtype=torch.float32, device="cpu")
        survived = torch.zeros(total, dtype=torch.int32, device="cpu")
        if roles.outside is not None:
            survived -= roles.outside
        context = self._context_of(token_pruner)
        received = None
        if recorded:
            received = torch.full((layers, total), torch.nan, dtype=torch.float32, device="cpu")
        summaries = method.summary_tokens != "none"
        hosts = torch.zeros(total, dtype=torch.uint8, device="cpu") if summaries else None
        prunes = bytes(
            [method.prunes(layer, layers) for layer in range(1, layers + 1)]
            if recorded
            else token_pruner.dropping_layers()
        )
        assert len(prunes) == layers
        absolute = type(method).keep is FixedThreshold.keep
        decides = not absolute and any(prunes)
        importance = torch.empty(total, dtype=torch.float32, device="cpu") if decides else None
        keep = torch.empty(total, dtype=torch.uint8, device="cpu") if decides else None
        probes, probed = _probes(token_pruner, size)
        places = (layout.indices % layout.width).int() if self._placed else None
        assert tokens.ids is not None
        request = Request(
            sequences=sequences,
            tokens=total,
            layers=layers,
            threads=1 if self.threads == 1 else min(self.threads, self._library.tp_usable_cores()),
            cu_seqlens=sized(cu_seqlens, torch.int32, sequences + 1),
            ids=sized(tokens.ids, torch.int32, total),
            positions=sized(tokens.positions, torch.int32, total),
            token_types=sized(tokens.token_types, torch.int32, total),
            places=sized(places, torch.int32, total),
            thresholds=sized(token_pruner.thresholds, torch.float32, layers) if absolute else None,
            prunes=ctypes.cast(c_char_p(prunes), c_void_p),
            divisor={"mean": float(method.max_seq_length), "mean_norm": 0.0, "relative": 1.0}[method.scoring_mode],
            first_only=first_only,
            record=recorded,
            departed=departed,
            unread=method.departed == "map",
            stays=sized(roles.stays, torch.uint8, total),
            asks=sized(roles.asks, torch.uint8, total),
            probes=sized(probes, torch.float32, layers * (size + 1)),
            probed=None if probed is None else ctypes.cast(c_char_p(probed), c_void_p),
            segments=sized(roles.segments, torch.uint8, total),
            hosts=pointer(hosts),
            context=None if context is None else context.handle.address,
            outside=sized(roles.outside, torch.uint8, total),
            out=out.data_ptr(),
            survived=survived.data_ptr(),
            received=pointer(received),
            seconds=sized(seconds, torch.float64, len(PARTS)),
            importance=pointer(importance),
            keep=pointer(keep),
        )
        if total:
            workspace = self._workspace_for(request)
            while status := self._library.tp_encoder_forward(self._handle, request):
                check(self._library, status < 0)
                assert importance is not None and keep is not None
                began = time.perf_counter()
                scores = importance[: request.rows]
                keep[: request.rows] = _decision(
                    tokens, token_pruner, entering, request.layer, survived, hosts, roles.stays, scores
                )
                if seconds is not None:
                    seconds[PARTS.index("decide")] += time.perf_counter() - began
            self._spare.append(workspace)
        records = {} if received is None else _records(tokens, token_pruner, survived, hosts, received)
        return layout.per_sequence(out) if first_only else out, survived, records

    def _context_of(self, token_pruner: TokenPruner) -> _Context | None:
        """What tokens that left go on giving, packed once for the tensors that a method has."""
        if token_pruner.pruner.context is None:
            return None
        found = self._context
        if found is None or not found.is_of(token_pruner):
            self._context = found = _Context(self._library, self._handle, token_pruner)
        return found

    def _workspace_for(self, request: Request) -> "Workspace":
        """Memory for a call, an earlier one's where that is large enough."""
        needed = self._library.tp_encoder_workspace_bytes(self._handle, request)
        check(self._library, needed < 0)
        workspace = None
        with contextlib.suppress(IndexError):  # another thread may be first
            workspace = self._spare.pop()
        if workspace is None or workspace.bytes < needed:  # a small one is freed: never more of them than calls at once
            workspace = None
            workspace = Workspace(needed)
        request.workspace, request.workspace_bytes = workspace.address, workspace.bytes
        return workspace

    def _description(self, level: int) -> str:
        """What a level computes products of the dtype in; empty where it has none."""
        text: bytes = self._library.tp_describe(level, DTYPES[self.dtype])
        return text.decode()

    def explain(self) -> list[str]:
        """The kernels and why they were chosen."""
        shape = self.shape
        here = levels_here(self._library)
        best = self._limit == LEVELS.index(here[-1])
        lines = [
            f"kernels: {LEVELS[self.level]}, {self._description(self.level)}"
            f"{f' (the best for {self.dtype} on this processor)' if best else ''}",
            f"weights: {self.weight_bytes / 2**20:.0f} MiB",
        ]
        cores = int(self._library.tp_usable_cores())
        if cores < self.threads:
            lines.append(f"a call takes {cores} of its {self.threads} threads: this process may use no more cores now")
        if self._gain is not None:
            lines.append(
                f"bfloat16 products by AVX-512 BF16 were {self._gain:.2f} times as fast as float32 ones in a probe; "
                f"they are used from {_WORTHWHILE} times on"
            )
        if not best and (self._gain is None or self._restored):
            what = "the machine this engine was compiled on" if self._restored else KERNELS_VARIABLE
            lines.append(f"{what} limits kernels to {LEVELS[self._limit]}; the processor has {here[-1]}")
        if self.level < self._limit:
            if not self._description(self._limit):
                lines.append(f"{LEVELS[self._limit]} has no {self.dtype} products of its own")
            else:
                lines.append(
                    f"{LEVELS[self._limit]} kernels do not fit hidden size {shape.hidden_size}, intermediate size "
                    f"{shape.intermediate_size}, head size {self._described['head_size']}: tiles need hidden "
                    f"and intermediate sizes in multiples of {64 if self.dtype == 'int8' else 32}, head sizes of 32"
                )
        return lines


def _rows_left(survived: Tensor, hosts: Tensor | None, layers: int) -> Tensor:
    """``[tokens]`` bool: tokens that survived at least so many layers, and rows that carry a summary after them."""
    left = survived >= layers
    return left if hosts is None else left | hosts.bool()


def _layout_of(tokens: PackedTokens, left: Tensor) -> Layout:
    layout = tokens.layout
    before = torch.nn.functional.pad(left.cumsum(0), (1, 0))
    return Layout(layout.indices[left], before[layout.cu_seqlens.long()].to(torch.int32), layout.width)


def _records(
    tokens: PackedTokens, pruner: TokenPruner, survived: Tensor, hosts: Tensor | None, received: Tensor
) -> dict[int, LayerRecord]:
    method = pruner.pruner
    records = {}
    for layer in range(1, pruner.num_layers + 1):
        present, left = (_rows_left(survived, hosts, done) for done in (layer - 1, layer))
        entering, leaving = _layout_of(tokens, present), _layout_of(tokens, left)
        scores = None
        if method.prunes(layer, pruner.num_layers):
            scores = _scores(pruner, layer, received[layer - 1][present], entering)
        summaries = None
        if hosts is not None:
            summary = (survived < layer)[left]
            summaries = Summaries(summary, torch.full(summary.shape, torch.nan, dtype=torch.float32, device="cpu"))
        records[layer] = LayerRecord(entering, leaving, scores=scores, summaries=summaries)
    return records


def _scores(pruner: TokenPruner, layer: int, received: Tensor, layout: Layout) -> Tensor:
    """What ``layer`` (1-based) decides by, ``[layout.total]`` float32: importance, or what its probe says."""
    if pruner.probe(layer) is not None:
        return received
    return importance_scores(received, layout, pruner.pruner.scoring_mode, pruner.pruner.max_seq_length)


def _probes(pruner: TokenPruner, size: int) -> tuple[Tensor | None, bytes | None]:
    """Every layer's probe, ``[layers, size + 1]`` float32, and which layers have one; None for both without any."""
    if pruner.pruner.probes is None:
        return None, None
    probes = [pruner.probe(layer) for layer in range(1, pruner.num_layers + 1)]
    nothing = torch.zeros(size + 1, dtype=torch.float32, device="cpu")
    weights = torch.stack([nothing if probe is None else probe for probe in probes])
    return weights, bytes(probe is not None for probe in probes)


def _decision(
    tokens: PackedTokens,
    pruner: TokenPruner,
    entering: Layout,
    layer: int,
    survived: Tensor,
    hosts: Tensor | None,
    stays: Tensor | None,
    received: Tensor,
) -> Tensor:
    """What a pruner keeps of the rows that are there in ``layer`` (0-based), ``[rows]`` bool."""
    # Rows that are still there have survived every layer before this one.
    present = _rows_left(survived, hosts, layer)
    layout = _layout_of(tokens, present)
    method = pruner.pruner
    return method.checked_keep(
        LayerTokens(
            layer=layer + 1,
            num_layers=pruner.num_layers,
            layout=layout,
            scores=_scores(pruner, layer + 1, received, layout),
            input_lengths=entering.lengths_tensor,
            threshold=None if pruner.thresholds is None else pruner.thresholds[layer],
            summaries=None if hosts is None else (survived < layer)[present],
            protected=None if stays is None else stays[present].bool(),
        )
    )
