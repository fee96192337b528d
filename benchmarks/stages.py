"""Where the engine's time goes, and how near each stage is to what one core can do.

    python benchmarks/stages.py --output results/cpu/MACHINE/stages      (needs g++, and a processor with AMX)

RoBERTa-base shape with random weights, one thread, unpruned, sequence classification (the last layer computes first
tokens only). Rates are against the core's own peaks, which peak.cpp measures before and after: products on AMX tiles or
AVX-512 registers, and reading 170 MiB. At batch size 1 a product cannot be faster than its weights can be read.
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
from token_pruning.engine.machine import cpu_name

TURNS = 7
CASES = {
    "32 sequences of about 50 tokens": (32, 50),
    "one sequence of 50 tokens": (1, 50),
    "8 × 370 tokens": (8, 370),
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


def peaks() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        source = Path(__file__).with_name("peak.cpp")
        subprocess.run(["g++", "-O3", "-march=sapphirerapids", "-w", source, "-o", program], check=True)
        first, second = (json.loads(subprocess.run(program, check=True, capture_output=True).stdout) for _ in range(2))
    return {name: max(first[name], second[name]) for name in first}


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
    lines = [
        f"{result['cpu']}, one thread. Peaks of a core: {peak['bfloat16'] / 1e3:.2f} TFLOP/s bfloat16 and "
        f"{peak['int8'] / 1e3:.2f} TOP/s int8 on tiles, {peak['float32']:.0f} GFLOP/s float32, reading "
        f"{peak['reading']:.1f} GB/s. Medians of {TURNS} calls.",
        "",
    ]
    for case in result["cases"]:
        lines += [
            f"### {case['name']}, {case['dtype']}: {case['milliseconds']:.1f} ms",
            "",
            "| stage | time | GFLOP/s | of the peak | weights read, GB/s | of the peak |",
            "|---|---|---|---|---|---|",
        ]
        for stage in case["stages"]:
            rate, reading = stage.get("gflops"), stage.get("reading")
            lines.append(
                f"| {NAMES[stage['name']]} | {stage['share']:.1%} "
                + (f"| {rate:.0f} | {rate / peak[case['dtype']]:.0%} " if rate else "| | ")
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
    result: dict[str, Any] = {"cpu": cpu_name(), "cases": []}
    highest = peaks()
    for dtype in ("bfloat16", "int8", "float32"):
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
                    row["gflops"] = work[stage] / took / 1e9
                if stage in weights and sequences == 1:
                    row["reading"] = weights[stage] / took / 1e9
                stages.append(row)
            result["cases"].append({"name": name, "dtype": dtype, "milliseconds": sum(seconds) * 1e3, "stages": stages})
        del engine
    again = peaks()
    result["peaks"] = {name: max(highest[name], again[name]) for name in highest}
    print(markdown(result))
    if arguments.output:
        write(result, markdown(result), arguments.output)


if __name__ == "__main__":
    try:
        main()
    except (tp.TokenPruningError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
