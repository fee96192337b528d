"""What to call the machine that figures come from, and whether a file of figures is its own."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import token_pruning as tp
from token_pruning.engine.machine import cpu_flags, cpu_name

RESULTS = Path(__file__).parents[1] / "results" / "cpu"
# What decides how fast products are, the best last. Of AMX the rest goes without saying.
_VECTORS = ("asimd", "avx2", "avx512f", "amx_bf16")
_NAMES = {"asimd": "neon", "avx512f": "avx512", "amx_bf16": "amx"}
_MORE = {
    "asimd": {"asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16"},
    "avx2": {"avx_vnni": "vnni"},
    "avx512f": {"avx512_vnni": "vnni", "avx512_bf16": "bf16"},
}


def instruction_sets(flags: Collection[str]) -> list[str]:
    """The widest vectors or tiles a processor has, then what it has for short numbers; empty for none known."""
    widest = next((name for name in reversed(_VECTORS) if name in flags), None)
    if widest is None:
        return []
    return [_NAMES.get(widest, widest), *(short for flag, short in _MORE.get(widest, {}).items() if flag in flags)]


def slug(name: str, flags: Collection[str]) -> str:
    """A folder's name for a kind of processor, such as ``amd-epyc-avx512-vnni-bf16``."""
    plain = re.sub(r"\(R\)|\(TM\)|\bCPU\b|\bProcessor\b|\b\d+-Core\b|@.*", " ", name, flags=re.IGNORECASE)
    words = re.findall(r"[a-z0-9]+", plain.lower())
    return "-".join([*words, *instruction_sets(flags)])


def has_vnni() -> bool:
    """Whether the processor multiplies 8-bit integers without overflow in between."""
    return bool({"avx512_vnni", "avx_vnni", "asimddp"} & cpu_flags())


def this_machine() -> dict[str, Any]:
    """The processor as it stands in a file of figures."""
    flags = cpu_flags()
    return {"machine": slug(cpu_name(), flags), "cpu": cpu_name(), "amx": "amx_bf16" in flags}


def refuse_others(about: Mapping[str, Any], path: Path) -> None:
    """Raise TokenPruningError if a file's figures come from another kind of machine than this one."""
    own = this_machine()
    if any(about.get(key, value) != value for key, value in own.items()):
        theirs = about.get("machine") or f"{about['cpu']}, {'with' if about['amx'] else 'without'} AMX"
        raise tp.TokenPruningError(
            f"{path} was measured on another machine ({theirs}; this is {own['machine']}); give another --output"
        )
