"""The native encoder: C++ kernels in a plain shared library, called through ctypes (which releases the GIL)."""

import ctypes
import functools
import os
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_uint8, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from token_pruning.checks import choice
from token_pruning.errors import ConfigError, TokenPruningError
from token_pruning.families import EmbeddingModules, Family, LayerModules
from token_pruning.pruners import FixedThreshold, LayerTokens
from token_pruning.pruners.importance import importance_scores
from token_pruning.pruners.summary import Summaries, segments_of
from token_pruning.ragged import Layout, PackedTokens
from token_pruning.runtime.token_pruner import TokenPruner
from token_pruning.runtime.trace import LayerRecord, PassRecord, recording

KERNELS_VARIABLE = "TOKEN_PRUNING_KERNELS"
LEVELS = ("portable", "avx2", "avx512", "amx")
DTYPES = {"float32": 0, "bfloat16": 1, "int8": 2}
ACTIVATIONS = {"gelu": 0, "relu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "gelu_fast": 2}
PARTS = ("embed", "pack", "project", "attend", "output", "up", "down", "norm", "decide")

_ABI_VERSION = 2
_LIBRARY = Path(__file__).parent / "libtoken_pruning.so"
_DECIDE = CFUNCTYPE(c_int, c_int, c_int, POINTER(c_int32), POINTER(c_float), POINTER(c_uint8))


class _Request(ctypes.Structure):
    """``tp::Request`` of encoder.h, field by field."""

    _fields_ = (
        ("sequences", c_int),
        ("cu_seqlens", c_void_p),
        ("ids", c_void_p),
        ("positions", c_void_p),
        ("token_types", c_void_p),
        ("threads", c_int),
        ("thresholds", c_void_p),
        ("prunes", c_void_p),
        ("divisor", c_float),
        ("decide", _DECIDE),
        ("first_only", ctypes.c_bool),
        ("record", ctypes.c_bool),
        ("segments", c_void_p),
        ("hosts", c_void_p),
        ("out", c_void_p),
        ("survived", c_void_p),
        ("received", c_void_p),
        ("seconds", c_void_p),
    )


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The kernels' library, or None where it was not built.

    Raises:
        TokenPruningError: if it was built from other sources than these.
    """
    if not _LIBRARY.exists():
        return None
    library = ctypes.CDLL(str(_LIBRARY))
    _check_interface(library)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "tp_last_error": (c_char_p, []),
        "tp_best_level": (c_int, []),
        "tp_choose_level": (c_int, [c_int] * 5),
        "tp_describe": (c_char_p, [c_int, c_int]),
        "tp_encoder_new": (c_void_p, [c_int] * 6 + [c_float, c_int]),
        "tp_encoder_free": (None, [c_void_p]),
        "tp_encoder_set_linear": (c_int, [c_void_p, c_int, c_int, c_void_p, c_void_p, c_int, c_int]),
        "tp_encoder_set_norm": (c_int, [c_void_p, c_int, c_int, c_void_p, c_void_p, c_int]),
        "tp_encoder_set_table": (c_int, [c_void_p, c_int, c_void_p, c_int, c_int, c_int]),
        "tp_encoder_weight_bytes": (c_int64, [c_void_p]),
        "tp_encoder_forward": (c_int, [c_void_p, POINTER(_Request)]),
        "tp_linear_new": (c_void_p, [c_int, c_int, c_void_p, c_void_p, c_int, c_int]),
        "tp_linear_free": (None, [c_void_p]),
        "tp_linear_apply": (c_int, [c_void_p, c_void_p, c_int, c_void_p, c_int]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _check_interface(library: Any) -> None:
    """Raises TokenPruningError unless the library's interface is the one that this file speaks."""
    try:
        found = (library.tp_abi_version(), library.tp_request_size())
    except AttributeError:
        found = (0, 0)
    expected = (_ABI_VERSION, ctypes.sizeof(_Request))
    if found != expected:
        raise TokenPruningError(
            f"{_LIBRARY} has interface {found[0]} with requests of {found[1]} bytes; this version of the package needs "
            f"{expected[0]} with {expected[1]}: install it again, so that the kernels are built anew"
        )


def level_limit(library: ctypes.CDLL | None) -> int | None:
    """The best kernel level that may be used, or None for none: the processor's, or ``TOKEN_PRUNING_KERNELS``.

    Raises:
        ConfigError: if the variable names no level, or one that this processor or installation does not have.
    """
    best = -1 if library is None else int(library.tp_best_level())
    wanted = os.environ.get(KERNELS_VARIABLE)
    if not wanted:
        return None if best < 0 else best
    if choice(KERNELS_VARIABLE, wanted, (*LEVELS, "torch")) == "torch":
        return None
    if LEVELS.index(wanted) > best:
        has = "no native kernels were built" if best < 0 else f"this processor's best level is {LEVELS[best]!r}"
        raise ConfigError(f"{KERNELS_VARIABLE} is {wanted!r}; {has}")
    return LEVELS.index(wanted)


def _check(library: ctypes.CDLL, failed: bool) -> None:
    if failed:
        raise TokenPruningError(f"native engine: {library.tp_last_error().decode()}")


def _float32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to("cpu", torch.float32).contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class NativeLinear(nn.Module):
    """A linear layer on the native kernels: a row's result never depends on the rows beside it."""

    def __init__(self, library: ctypes.CDLL, linear: nn.Linear, dtype: str, limit: int, threads: int) -> None:
        """Pack the weights of ``linear`` for the best level up to ``limit``."""
        super().__init__()
        self._library, self._threads = library, threads
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # A head's output sizes fit no tile; only the shared side and whole panels matter to the packing.
        level = library.tp_choose_level(limit, DTYPES[dtype], linear.in_features, linear.in_features, 32)
        if linear.out_features % 32 and LEVELS[level] == "amx":
            level -= 1
        weight, bias = _float32(linear.weight), _float32(linear.bias)
        self._handle = library.tp_linear_new(
            level, DTYPES[dtype], _pointer(weight), _pointer(bias), self.in_features, self.out_features
        )
        _check(library, not self._handle)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``, float32."""
        rows = x.to(torch.float32).reshape(-1, self.in_features).contiguous()
        out = torch.empty(rows.shape[0], self.out_features, dtype=torch.float32, device="cpu")
        failed = self._library.tp_linear_apply(
            self._handle, rows.data_ptr(), rows.shape[0], out.data_ptr(), self._threads
        )
        _check(self._library, failed)
        return out.view(*x.shape[:-1], self.out_features)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.tp_linear_free(self._handle)


class NativeEncoder:
    """A post-LN encoder whose forward pass is one native call."""

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
            threads: threads of one call.
        """
        self._library, self.dtype, self.threads = library, dtype, threads
        self.shape = family.shape(family.config)
        self._embeddings = embeddings
        tables = family.embedding_modules()
        layers = [family.layer_modules(layer) for layer in family.layers]
        self.level = self._choose_level(limit, tables)
        self._limit = limit
        shape, activation = self.shape, ACTIVATIONS[family.activation]
        self._handle = library.tp_encoder_new(
            self.level,
            DTYPES[dtype],
            shape.num_layers,
            shape.hidden_size,
            shape.num_heads,
            shape.intermediate_size,
            tables.norm.eps,
            activation,
        )
        _check(library, not self._handle)
        self._set_embeddings(tables)
        for number, layer in enumerate(layers):
            self._set_layer(number, layer)

    def _choose_level(self, limit: int, embeddings: EmbeddingModules) -> int:
        shape = self.shape
        level = self._library.tp_choose_level(
            limit,
            DTYPES[self.dtype],
            shape.hidden_size,
            shape.intermediate_size,
            shape.hidden_size // shape.num_heads,
        )
        if embeddings.projection is not None:
            width = embeddings.projection.in_features
            level = self._library.tp_choose_level(level, DTYPES[self.dtype], width, width, 32)
        return int(level)

    def _set_embeddings(self, embeddings: EmbeddingModules) -> None:
        half = self.dtype != "float32"
        for which, table in enumerate((embeddings.word, embeddings.position, embeddings.token_type)):
            if table is None:
                continue
            values = table.weight.detach().to("cpu", torch.bfloat16 if half else torch.float32).contiguous()
            rows, size = values.shape
            failed = self._library.tp_encoder_set_table(self._handle, which, values.data_ptr(), rows, size, half)
            _check(self._library, failed)
        self._set_norm(-1, 0, embeddings.norm)
        if embeddings.projection is not None:
            self._set_linear(-1, 0, embeddings.projection)

    def _set_layer(self, number: int, layer: LayerModules) -> None:
        linears = (
            layer.query,
            layer.key,
            layer.value,
            layer.attention_output,
            layer.feed_forward_up,
            layer.feed_forward_down,
        )
        for which, linear in enumerate(linears):
            self._set_linear(number, which, linear)
        self._set_norm(number, 0, layer.attention_norm)
        self._set_norm(number, 1, layer.output_norm)

    def _set_linear(self, layer: int, which: int, linear: nn.Linear) -> None:
        weight, bias = _float32(linear.weight), _float32(linear.bias)
        failed = self._library.tp_encoder_set_linear(
            self._handle, layer, which, _pointer(weight), _pointer(bias), linear.in_features, linear.out_features
        )
        _check(self._library, failed)

    def _set_norm(self, layer: int, which: int, norm: nn.LayerNorm) -> None:
        size = norm.normalized_shape[0]
        gamma, beta = _float32(norm.weight), _float32(norm.bias)
        failed = self._library.tp_encoder_set_norm(self._handle, layer, which, _pointer(gamma), _pointer(beta), size)
        _check(self._library, failed)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.tp_encoder_free(self._handle)

    @property
    def weight_bytes(self) -> int:
        """Memory of the packed weights and tables, in bytes."""
        return int(self._library.tp_encoder_weight_bytes(self._handle))

    def head_linear(self, linear: nn.Linear, vocabulary: int) -> NativeLinear:
        """A head's linear layer on these kernels: float32, but for one as wide as the vocabulary."""
        dtype = self.dtype if linear.out_features == vocabulary else "float32"
        return NativeLinear(self._library, linear, dtype, self._limit, self.threads)

    def run(
        self, tokens: PackedTokens, token_pruner: TokenPruner, *, first_only: bool, seconds: Tensor | None = None
    ) -> Tensor:
        """See :class:`token_pruning.engine.encoder.Encoder`.

        Args:
            tokens: see there.
            token_pruner: see there.
            first_only: see there.
            seconds: ``[len(PARTS)]`` float64, to which the time of each part is added.
        """
        if not tokens.layout.batch_size:
            return torch.empty(0, self.shape.hidden_size, dtype=torch.float32, device="cpu")
        entering, kept, dropped = token_pruner.enter(tokens)
        traces = [trace for pruner, trace in recording.get() if pruner is token_pruner]
        segments = None
        if token_pruner.pruner.summary_tokens == "segment":
            id_grid = tokens.id_grid()
            assert id_grid is not None
            segments = segments_of(id_grid, tokens.layout)[entering.indices].to(torch.uint8)
        entered = (tokens if kept is None else tokens.of(kept, entering)).int32()
        states, layers = self._forward(
            entered, token_pruner, segments, first_only=first_only, recorded=bool(traces), seconds=seconds
        )
        for trace in traces:
            trace.passes.append(PassRecord(token_pruner.pruner, tokens.layout, entering, layers, first_only))
        if first_only or kept is None or dropped is None:
            return states
        # What never entered keeps its embedding.
        everything = states.new_empty(tokens.layout.total, states.shape[1]).index_copy(0, kept, states)
        assert self._embeddings is not None
        return everything.index_copy(0, dropped, self._embeddings.embed(tokens.of(dropped, tokens.layout)))

    def _forward(
        self,
        tokens: PackedTokens,
        token_pruner: TokenPruner,
        segments: Tensor | None,
        *,
        first_only: bool,
        recorded: bool,
        seconds: Tensor | None,
    ) -> tuple[Tensor, dict[int, LayerRecord]]:
        """The native call: last states, and a record per layer (1-based) if they are asked for, else none."""
        layout, layers = tokens.layout, self.shape.num_layers
        cu_seqlens = layout.cu_seqlens
        filled = cu_seqlens.diff() > 0
        if not bool(filled.all()):  # the native side knows no empty sequences
            cu_seqlens = torch.cat([cu_seqlens[:1], cu_seqlens[1:][filled]])
        rows = cu_seqlens.numel() - 1 if first_only else layout.total
        out = torch.empty(rows, self.shape.hidden_size, dtype=torch.float32, device="cpu")
        survived = torch.zeros(layout.total, dtype=torch.int32, device="cpu")
        received = None
        if recorded:
            received = torch.full((layers, layout.total), torch.nan, dtype=torch.float32, device="cpu")
        method = token_pruner.pruner
        absolute = type(method).keep is FixedThreshold.keep
        summaries = method.summary_tokens != "none"
        hosts = torch.zeros(layout.total, dtype=torch.uint8, device="cpu") if summaries else None
        prunes = bytes(
            [method.prunes(layer, layers) for layer in range(1, layers + 1)]
            if recorded
            else token_pruner.dropping_layers()
        )
        decisions = None if absolute or not any(prunes) else _Decisions(tokens, token_pruner, survived, hosts)
        assert tokens.ids is not None
        request = _Request(
            sequences=cu_seqlens.numel() - 1,
            cu_seqlens=cu_seqlens.data_ptr(),
            ids=tokens.ids.data_ptr(),
            positions=tokens.positions.data_ptr(),
            token_types=_pointer(tokens.token_types),
            threads=self.threads,
            thresholds=_pointer(token_pruner.thresholds) if absolute else None,
            prunes=ctypes.cast(ctypes.c_char_p(prunes), c_void_p),
            divisor={"mean": float(method.max_seq_length), "mean_norm": 0.0, "relative": 1.0}[method.scoring_mode],
            decide=_DECIDE(decisions) if decisions else _DECIDE(),
            first_only=first_only,
            record=recorded,
            segments=_pointer(segments),
            hosts=_pointer(hosts),
            out=out.data_ptr(),
            survived=survived.data_ptr(),
            received=_pointer(received),
            seconds=_pointer(seconds),
        )
        status = self._library.tp_encoder_forward(self._handle, ctypes.byref(request)) if layout.total else 0
        if decisions and decisions.error:
            raise decisions.error
        _check(self._library, status < 0)
        records = {} if received is None else _records(tokens, token_pruner, survived, hosts, received)
        return layout.per_sequence(out) if first_only else out, records

    def explain(self) -> list[str]:
        """The kernels and why they were chosen."""
        shape = self.shape
        lines = [
            f"kernels: {LEVELS[self.level]}, {self._library.tp_describe(self.level, DTYPES[self.dtype]).decode()}",
            f"weights: {self.weight_bytes / 2**20:.0f} MiB",
        ]
        best = int(self._library.tp_best_level())
        if self._limit < best:
            lines.append(
                f"{KERNELS_VARIABLE} limits kernels to {LEVELS[self._limit]}; the processor has {LEVELS[best]}"
            )
        if self.level < self._limit:
            if self.dtype == "float32" and LEVELS[self._limit] == "amx":
                lines.append("amx has no float32 products")
            else:
                lines.append(
                    f"{LEVELS[self._limit]} kernels do not fit hidden size {shape.hidden_size}, intermediate size "
                    f"{shape.intermediate_size}, head size {shape.hidden_size // shape.num_heads}: tiles need hidden "
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
            scores = importance_scores(
                received[layer - 1][present], entering, method.scoring_mode, method.max_seq_length
            )
        summaries = None
        if hosts is not None:
            summary = (survived < layer)[left]
            summaries = Summaries(summary, torch.full(summary.shape, torch.nan, dtype=torch.float32, device="cpu"))
        records[layer] = LayerRecord(entering, leaving, scores=scores, summaries=summaries)
    return records


class _Decisions:
    """Asks a pruner what stays, on behalf of the native encoder."""

    def __init__(self, tokens: PackedTokens, pruner: TokenPruner, survived: Tensor, hosts: Tensor | None) -> None:
        self.tokens, self.pruner, self.survived, self.hosts = tokens, pruner, survived, hosts
        self.error: BaseException | None = None

    def __call__(self, layer: int, rows: int, cu_seqlens: Any, received: Any, keep: Any) -> int:
        try:
            tokens, module = self.tokens, self.pruner
            # Rows that are still there have survived every layer before this one.
            present = _rows_left(self.survived, self.hosts, layer)
            layout = _layout_of(tokens, present)
            total = torch.frombuffer(
                (c_float * rows).from_address(ctypes.addressof(received.contents)), dtype=torch.float32
            )
            scores = importance_scores(total, layout, module.pruner.scoring_mode, module.pruner.max_seq_length)
            decision = module.pruner.checked_keep(
                LayerTokens(
                    layer=layer + 1,
                    num_layers=module.num_layers,
                    layout=layout,
                    scores=scores,
                    input_lengths=tokens.layout.lengths_tensor,
                    threshold=None if module.thresholds is None else module.thresholds[layer],
                    summaries=None if self.hosts is None else (self.survived < layer)[present],
                )
            )
            flags = decision.to(torch.uint8).contiguous()
            ctypes.memmove(keep, flags.data_ptr(), rows)
            return 0
        except BaseException as error:  # carried over the native frames, and raised again by the caller
            self.error = error
            return 1
