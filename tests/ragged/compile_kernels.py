"""Compiles the kernels for GPUs that need not be there: what the interpreter lets pass, a compiler may not.

Run by test_kernels.py in a process of its own, where Triton's interpreter is off. Prints each kernel, and what of it
did not fit into registers.
"""

import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from token_pruning.ragged.triton import attention, compaction

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INTEGERS = ("cu_queries", "cu_keys", "cu_seqlens", "counts", "kept_cu_seqlens")
PLACES = ("query_positions", "key_positions", "positions", "places", "found")
FLAGS = ("keep", "protected")


def compile_kernel(kernel: Any, constants: dict[str, Any], warps: int, capability: int, pointer: str = "") -> str:
    """Compile with the types and the alignment of a real call; returns the compiler's report on registers."""

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in INTEGERS:
            return "*i32"
        if name in PLACES:
            return "*i64"
        if name in FLAGS:
            return "*i1"
        if name in ("lse", "sums", "received", "thresholds", "scores"):
            return "*fp32"
        if name in ("scale", "divisor"):
            return "fp32"
        return "i32" if name in ("window", "step", "layer") or re.search("_(row|head)$", name) else pointer

    names = kernel.arg_names
    types = {name: type_of(name) for name in names}
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or name.endswith(("_row", "_head"))]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned if not names[i].startswith(("lse_", "sums_"))},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return f"registers {found[1]} stack {found[2]} shared {compiled.metadata.shared}"


def main() -> None:
    capabilities = [int(argument) for argument in sys.argv[1:]] or [80, 90]
    for capability in capabilities:
        for (dtype, dim), windowed in product(
            [("bf16", 32), ("fp16", 64), ("bf16", 96), ("bf16", 128), ("fp32", 64), ("fp32", 128)], (False, True)
        ):
            if windowed and (dtype, dim) != ("fp16", 64):
                continue
            stays, passes, warps = attention._blocks(torch.empty(1, 1, dim, dtype=DTYPES[dtype]))
            for kernel, queries, keys in (
                (attention._forward, stays, passes), (attention._column_sums, passes, stays),
            ):  # fmt: skip
                constants = {
                    "WINDOWED": windowed, "HEAD_DIM": dim, "BLOCK_D": attention._padded(dim),
                    "BLOCK_QUERIES": queries, "BLOCK_KEYS": keys,
                }  # fmt: skip
                report = compile_kernel(kernel, constants, warps, capability, f"*{dtype}")
                print(f"sm_{capability} {kernel.__name__} {dtype} {dim} windowed {windowed}: {report}", flush=True)
        wanted: list[tuple[Any, dict[str, Any]]] = [
            (compaction._count, {}),
            (compaction._decide, {}), (compaction._decide, {"protected": None, "scores": None}),
            (compaction._split, {"DROPPED": True}), (compaction._split, {"DROPPED": False}),
        ]  # fmt: skip
        for kernel, constants in wanted:
            report = compile_kernel(kernel, {"BLOCK": compaction._BLOCK, **constants}, 4, capability)
            print(f"sm_{capability} {kernel.__name__} {constants}: {report}", flush=True)


if __name__ == "__main__":
    main()
