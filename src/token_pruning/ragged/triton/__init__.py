"""GPU kernels in Triton. Nothing is imported from Triton until a tensor needs it."""

import functools
import importlib.util

import torch


def usable(device: torch.device) -> bool:
    """Whether these kernels run on a device: a CUDA one, where Triton is installed."""
    return device.type == "cuda" and _installed()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
