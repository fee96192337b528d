"""What processor this is, for figures that must name it."""

import platform
from pathlib import Path


def _cpu_info(key: str) -> str:
    """The first value of ``key`` in ``/proc/cpuinfo``; empty where there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def cpu_name() -> str:
    """The processor's name, or its architecture where the system does not tell.

    Virtual machines often say "AMD EPYC" and no more. Zen 5's vectors are twice as wide as Zen 4's, so it is named.
    """
    name = _cpu_info("model name") or platform.processor() or platform.machine()
    return f"{name} (Zen 5)" if name == "AMD EPYC" and _cpu_info("cpu family") == "26" else name


def cpu_flags() -> frozenset[str]:
    """What the processor can do, in Linux's words; empty where the system does not tell."""
    return frozenset((_cpu_info("flags") or _cpu_info("Features")).split())


def has_amx() -> bool:
    """Whether the processor has AMX bfloat16 matrix products."""
    return "amx_bf16" in cpu_flags()
