"""The kernels' shared library, through ctypes (which releases the GIL): finding it, its interface, what it is given."""

import contextlib
import ctypes
import functools
import mmap
import os
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from token_pruning.checks import choice
from token_pruning.errors import ConfigError, TokenPruningError

F = TypeVar("F", bound=Callable[..., Any])

KERNELS_VARIABLE = "TOKEN_PRUNING_KERNELS"
LEVELS = (
    *("portable", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx"),
    *("neon", "dotprod", "i8mm"),
)
"""Kernel levels, best last, as in native/cpu_level.h."""

DTYPES = {"float32": 0, "bfloat16": 1, "int8": 2}
ACTIVATIONS = {"gelu": 0, "relu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "gelu_fast": 2, "silu": 3, "swish": 3}
PARTS = ("embed", "pack", "project", "attend", "output", "up", "down", "norm", "decide")

_ABI_VERSION = 7
_LIBRARY = Path(__file__).parent / "libtoken_pruning.so"


class Shape(ctypes.Structure):
    """``tp::Shape`` of encoder.h, field by field."""

    _fields_ = (
        ("layers", c_int),
        ("hidden", c_int),
        ("heads", c_int),
        ("key_heads", c_int),
        ("head_size", c_int),
        ("inner", c_int),
        ("epsilon", c_float),
        ("scale", c_float),
        ("activation", c_int),
        ("norm_first", c_bool),
        ("rms_norm", c_bool),
        ("gated", c_bool),
    )


class Request(ctypes.Structure):
    """``tp::Request`` of encoder.h, field by field."""

    _fields_ = (
        ("sequences", c_int),
        ("tokens", c_int),
        ("layers", c_int),
        ("threads", c_int),
        ("cu_seqlens", c_void_p),
        ("ids", c_void_p),
        ("positions", c_void_p),
        ("token_types", c_void_p),
        ("places", c_void_p),
        ("thresholds", c_void_p),
        ("prunes", c_void_p),
        ("divisor", c_float),
        ("first_only", c_bool),
        ("record", c_bool),
        ("departed", c_bool),
        ("unread", c_bool),
        ("stays", c_void_p),
        ("asks", c_void_p),
        ("probes", c_void_p),
        ("probed", c_void_p),
        ("segments", c_void_p),
        ("hosts", c_void_p),
        ("context", c_void_p),
        ("outside", c_void_p),
        ("out", c_void_p),
        ("survived", c_void_p),
        ("received", c_void_p),
        ("seconds", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
        ("importance", c_void_p),
        ("keep", c_void_p),
        ("waiting", c_bool),
        ("layer", c_int),
        ("rows", c_int),
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
    check_interface(library)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "tp_last_error": (c_char_p, []),
        "tp_has_level": (c_int, [c_int]),
        "tp_usable_cores": (c_int, []),
        "tp_choose_level": (c_int, [c_int] * 5),
        "tp_describe": (c_char_p, [c_int, c_int]),
        "tp_encoder_new": (c_void_p, [c_int, c_int, POINTER(Shape)]),
        "tp_encoder_free": (None, [c_void_p]),
        "tp_encoder_set_linear": (c_int, [c_void_p, c_int, c_int, c_void_p, c_void_p, c_void_p, c_int, c_int]),
        "tp_encoder_get_linear": (c_int, [c_void_p, c_int, c_int, c_void_p, c_void_p, c_void_p, c_int, c_int]),
        "tp_encoder_set_norm": (c_int, [c_void_p, c_int, c_int, c_void_p, c_void_p, c_int]),
        "tp_encoder_set_step": (c_int, [c_void_p, c_int, c_int, c_int, c_int]),
        "tp_encoder_set_rotation": (c_int, [c_void_p, c_int, c_void_p, c_int, c_float]),
        "tp_encoder_set_bias": (c_int, [c_void_p, c_void_p, c_int, c_int]),
        "tp_encoder_set_distances": (c_int, [c_void_p, c_void_p, c_int]),
        "tp_encoder_set_distance_products": (c_int, [c_void_p, c_int, c_int, c_void_p, c_int, c_int]),
        "tp_encoder_get_distance_products": (c_int, [c_void_p, c_int, c_int, c_void_p, c_int, c_int]),
        "tp_encoder_get_norm": (c_int, [c_void_p, c_int, c_int, c_void_p, c_void_p, c_int]),
        "tp_encoder_set_table": (c_int, [c_void_p, c_int, c_void_p, c_int, c_int, c_int]),
        "tp_encoder_get_table": (c_int, [c_void_p, c_int, c_void_p, c_int, c_int]),
        "tp_encoder_weight_bytes": (c_int64, [c_void_p]),
        "tp_encoder_workspace_bytes": (c_int64, [c_void_p, POINTER(Request)]),
        "tp_encoder_forward": (c_int, [c_void_p, POINTER(Request)]),
        "tp_context_new": (c_void_p, [c_void_p, c_void_p, c_int, c_int, *[c_void_p] * 4]),
        "tp_context_free": (None, [c_void_p]),
        "tp_linear_new": (c_void_p, [c_int, c_int, c_void_p, c_void_p, c_void_p, c_int, c_int]),
        "tp_linear_get": (c_int, [c_void_p, c_void_p, c_void_p, c_void_p]),
        "tp_linear_free": (None, [c_void_p]),
        "tp_linear_apply": (c_int, [c_void_p, c_void_p, c_int, c_void_p, c_int]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def check_interface(library: Any) -> None:
    """Raises TokenPruningError unless the library's interface is the one that this file speaks."""
    try:
        found = (library.tp_abi_version(), library.tp_request_size(), library.tp_shape_size())
    except AttributeError:
        found = (0, 0, 0)
    expected = (_ABI_VERSION, ctypes.sizeof(Request), ctypes.sizeof(Shape))
    if found != expected:
        raise TokenPruningError(
            f"{_LIBRARY} has interface {found[0]} with requests of {found[1]} bytes and shapes of {found[2]}; this "
            f"version of the package needs {expected[0]} with {expected[1]} and {expected[2]}: install it again, so "
            "that the kernels are built anew"
        )


def levels_here(library: ctypes.CDLL | None) -> tuple[str, ...]:
    """The kernel levels of this processor, best last; none without a library."""
    return () if library is None else tuple(name for i, name in enumerate(LEVELS) if library.tp_has_level(i))


def level_limit(library: ctypes.CDLL | None) -> int | None:
    """The best kernel level that may be used, or None for none: the processor's, or ``TOKEN_PRUNING_KERNELS``.

    Raises:
        ConfigError: if the variable names no level, or one that this processor or installation does not have.
    """
    here = levels_here(library)
    wanted = os.environ.get(KERNELS_VARIABLE)
    if not wanted:
        return LEVELS.index(here[-1]) if here else None
    if choice(KERNELS_VARIABLE, wanted, (*LEVELS, "torch")) == "torch":
        return None
    if wanted not in here:
        has = f"this processor has {', '.join(here)}" if here else "no native kernels were built"
        raise ConfigError(f"{KERNELS_VARIABLE} is {wanted!r}; {has}")
    return LEVELS.index(wanted)


def check(library: ctypes.CDLL, failed: bool) -> None:
    if not failed:
        return
    message = library.tp_last_error().decode()
    if message == "out of memory":
        raise MemoryError("native engine: out of memory")
    raise TokenPruningError(f"native engine: {message}")


def memory_errors(function: F) -> F:
    """What PyTorch says when memory runs out becomes a MemoryError."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if "DefaultCPUAllocator" not in str(error) and "std::bad_alloc" not in str(error):
                raise
            raise MemoryError(str(error)) from error

    return called  # type: ignore[return-value]


def as_float32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to("cpu", torch.float32).contiguous()


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def sized(tensor: Tensor | None, dtype: torch.dtype, count: int) -> int | None:
    """A tensor's address, once it is what the native side takes it for."""
    if tensor is None:
        return None
    if tensor.dtype != dtype or tensor.numel() != count or not tensor.is_cpu or not tensor.is_contiguous():
        raise TokenPruningError(
            f"native engine: a {tensor.dtype} tensor of {tensor.numel()} numbers on {tensor.device} where {count} of "
            f"{dtype} are needed"
        )
    return tensor.data_ptr()


class Handle:
    """Owns a native object, which nobody changes once it is made: copies share it, and it is freed once."""

    def __init__(self, library: ctypes.CDLL, address: int | None, free: str) -> None:
        self._as_parameter_ = address
        self._free = getattr(library, free)
        check(library, not address)

    @property
    def address(self) -> int | None:
        """Where it is."""
        return self._as_parameter_

    def __deepcopy__(self, memo: dict[int, Any]) -> "Handle":
        return self

    __copy__ = __deepcopy__

    def __del__(self) -> None:
        if self._as_parameter_:
            self._free(self._as_parameter_)


class Workspace:
    """Memory of one call, on huge pages where it is large: it goes back to the system when nobody holds it."""

    _HUGE_PAGE = 2 << 20

    def __init__(self, size: int) -> None:
        """Take at least ``size`` bytes.

        Raises:
            MemoryError: if the system has not so many.
        """
        align = self._HUGE_PAGE if size >= self._HUGE_PAGE // 2 else mmap.PAGESIZE
        try:
            self._memory = mmap.mmap(-1, size + align, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as error:
            raise MemoryError(f"native engine: a call needs {size} bytes of memory, which there are not") from error
        if align == self._HUGE_PAGE:
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.address = -(-begin // align) * align
        self.bytes = begin + len(self._memory) - self.address
