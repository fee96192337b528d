"""Where the engine's time goes, and how near each stage is to what one core can do.

    python benchmarks/stages.py --output results/cpu/MACHINE/stages      (needs g++, and an x86 processor with AVX2)

RoBERTa-base shape with random weights, one thread, unpruned, sequence classification (the last layer computes first
only). Rates are against the core's own peaks, which peak.cpp measures before and after: products of each dtype by its
best instructions, and reading 170 MiB. At batch size 1 a product cannot be faster than its weights can be
read. Where two processors are one core's threads, a busy neighbour halves all of it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from output import write

import token_pruning as tp
from token_pruning.engine.library import PARTS
from token_pruning.engine.machine import cpu_flags, cpu_name

TURNS = 7
CASES = {
    "32 sequences of about 50 tokens": (32, 50),
    "one sequence of 50 tokens": (1, 50),
    "8 × 370 tokens": (8, 370),
}
PRODUCTS = {  # by dtype, the best first: peak.cpp's names, and Linux's for what the processor must have
    "bfloat16": {"AMX_BF16": "amx_bf16", "AVX512_BF16": "avx512_bf16"},
    "int8": {
        "AMX_INT8": "amx_int8",
        "AVX512_VNNI": "avx512_vnni",
        "AVX_VNNI": "avx_vnni",
        "AVX2_INT8": "avx2",
    },
    "float32": {"AVX512": "avx512f", "AVX2": "avx2"},
}
NAMES = {
    "embed": "embeddings",
    "pack": "packing of rows",
    "project": "query, key, value",
    "attend": "attention",
    "output": "output projection",
    "up": "feed-forward up, GELU",
    "down": "feed-forward down",
    "norm": "LayerNorm",
    "decide": "bookkeeping",
}


def kinds() -> dict[str, str]:
    """What each dtype's products are best done with here, as peak.cpp names it; a dtype without products is missing."""
    flags = cpu_flags()
    found = {}
    for dtype, choices in PRODUCTS.items():
        possible = [kind for kind, flag in choices.items() if flag in flags]
        if possible:
            found[dtype] = possible[0]
    return found


def peaks(best: dict[str, str]) -> dict[str, float]:
    """GOP/s of each dtype's products, and GB/s ``reading``: the better of two measurements."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        source = Path(__file__).with_name("peak.cpp")
        subprocess.run(["g++", "-O3", "-mavx2", "-w", source, "-o", program], check=True)
        command = [program, *best.values()]
        first, second = (json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(2))
    names = {**best, "reading": "reading"}
    return {name: max(first[kind], second[kind]) for name, kind in names.items()}


def operations(config: Any, lengths: list[int]) -> dict[str, float]:
    """Floating-point operations of the stages with products, the last layer computing first tokens only."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    tokens, sequences = sum(lengths), len(lengths)
    finished = tokens * (layers - 1) + sequences
    return {
        "project": 2 * hidden**2 * (3 * tokens * (layers - 1) + 2 * tokens + sequences),
        "attend": 4 * hidden * (sum(n * n for n in lengths) * (layers - 1) + tokens),
        "output": 2 * hidden**2 * finished,
        "up": 2 * hidden * inner * finished,
        "down": 2 * hidden * inner * finished,
    }


def weight_bytes(config: Any, dtype: str) -> dict[str, float]:
    size = {"float32": 4, "bfloat16": 2, "int8": 1}[dtype] * config.num_hidden_layers * config.hidden_size
    return {
        "project": 3 * size * config.hidden_size,
        "output": size * config.hidden_size,
        "up": size * config.intermediate_size,
        "down": size * config.intermediate_size,
    }


def measure(engine: Any, lengths: list[int]) -> list[float]:
    """Seconds of every stage, the median call's."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(5, 30000, (sum(lengths),))
    run, calls = engine._encoder.run, []
    try:
        for _ in range(TURNS + 2):
            seconds = torch.zeros(len(PARTS), dtype=torch.float64)
            engine._encoder.run = lambda *a, seconds=seconds, **k: run(*a, **k, seconds=seconds)
            engine.run_packed(ids, cu_seqlens)
            calls.append(seconds)
    finally:
        engine._encoder.run = run
    calls = sorted(calls[2:], key=lambda seconds: float(seconds.sum()))
    return calls[len(calls) // 2].tolist()


def markdown(result: dict[str, Any]) -> str:
    peak = result["peaks"]
    rates = ", ".join(f"{dtype} {peak[dtype]:.0f} GOP/s by {kind}" for dtype, kind in result["kinds"].items())
    lines = [
        f"{result['cpu']}, one thread, medians of {TURNS} calls. Peaks of a core: {rates}; reading "
        f"{peak['reading']:.1f} GB/s.",
        "",
    ]
    for case in result["cases"]:
        products = {"attend": peak.get("bfloat16", peak["float32"])} if case["dtype"] == "int8" else {}  # not in int8
        lines += [
            f"### {case['name']}, {case['dtype']}: {case['milliseconds']:.1f} ms",
            "",
            "| stage | time | GOP/s | of the peak | weights read, GB/s | of the peak |",
            "|---|---|---|---|---|---|",
        ]
        for stage in case["stages"]:
            rate, reading = stage.get("gops"), stage.get("reading")
            lines.append(
                f"| {NAMES[stage['name']]} | {stage['share']:.1%} "
                + (f"| {rate:.0f} | {rate / products.get(stage['name'], peak[case['dtype']]):.0%} " if rate else "| | ")
                + (f"| {reading:.1f} | {reading / peak['reading']:.0%} |" if reading else "| | |")
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514)
    model = transformers.RobertaForSequenceClassification(config).eval()
    best = kinds()
    result: dict[str, Any] = {"cpu": cpu_name(), "kinds": best, "cases": []}
    highest = peaks(best)
    for dtype in best:
        engine = tp.compile(model, dtype, threads=1)
        for name, (sequences, mean) in CASES.items():
            spread = mean // 2 if sequences > 16 else 0
            lengths = [mean - spread + round(2 * spread * i / max(1, sequences - 1)) for i in range(sequences)]
            seconds = measure(engine, lengths)
            work, weights = operations(config, lengths), weight_bytes(config, dtype)
            stages = []
            for stage, took in zip(PARTS, seconds, strict=True):
                row: dict[str, Any] = {"name": stage, "share": took / sum(seconds)}
                if stage in work:
                    row["gops"] = work[stage] / took / 1e9
                if stage in weights and sequences == 1:
                    row["reading"] = weights[stage] / took / 1e9
                stages.append(row)
            result["cases"].append({"name": name, "dtype": dtype, "milliseconds": sum(seconds) * 1e3, "stages": stages})
        del engine
    again = peaks(best)
    result["peaks"] = {name: max(highest[name], again[name]) for name in highest}
    print(markdown(result))
    if arguments.output:
        write(result, markdown(result), arguments.output)


if __name__ == "__main__":
    try:
        main()
    except (tp.TokenPruningError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
