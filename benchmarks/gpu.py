"""Sequences per second on a GPU: pruned and unpruned models beside dense ones, with padding and without.

    make gpu
    python benchmarks/gpu.py --output results/gpu/h200 --shapes base --lengths 512 --batch-sizes 32 --dtypes bfloat16

Weights are random, with thresholds fitted to keep tokens along a line; lengths are drawn anew for every pass, uniform
from half of the greatest length to all of it. Engines take turns (A B C A B C) on the same batches, which lie on the
GPU beforehand, each in the form that suits it: padded or packed. Time is from CUDA events around a turn; a ratio is the
median of the passes' ratios. A turn is repeated once uncounted when an engine first meets a batch size.

What each kernel reaches is measured apart, against a copy and a matrix product of the same card.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from output import beside, spread, write
from random_weights import FINAL_KEEP, linear_thresholds, make_model
from torch import Tensor
from transformers import AttentionInterface

import token_pruning as tp
from token_pruning.ragged import fused
from token_pruning.ragged.layout import layout_from_mask
from token_pruning.ragged.triton.attention import attend, column_sums
from token_pruning.ragged.triton.compaction import compact
from token_pruning.runtime.flops import count_flops

PRUNE_AT = (3, 6)  # of twelve layers: where a single sequence is pruned
FITTED = 32  # sequences that thresholds are fitted to
TOKENS_PER_TURN = 16_384  # so many at least, and at least one batch
PADDED = "transformers, SDPA, padded"
VARLEN = "transformers, varlen attention, no padding"
COMPILED = "the same, torch.compile"
UNPRUNED, PRUNED, FEW = "token-pruning, unpruned", "token-pruning, pruned", "token-pruning, pruned at two layers"
WITHOUT_PADDING = (VARLEN, COMPILED)


@dataclass(frozen=True)
class Batch:
    """Sequences in both forms; RoBERTa's positions start at 2."""

    padded: dict[str, Tensor]
    ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    longest: int


def make_batch(lengths: Tensor, generator: torch.Generator, device: torch.device) -> Batch:
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]
    ids = torch.randint(3, 50_000, mask.shape, generator=generator).masked_fill(~mask, 1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    positions = torch.cat([torch.arange(2, 2 + length) for length in lengths.tolist()])
    padded = {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}
    return Batch(
        padded, ids[mask][None].to(device), positions[None].to(device), cu_seqlens.to(device), longest
    )  # fmt: skip


def draw(number: int, count: int, batch_size: int, greatest: int, device: torch.device) -> list[Batch]:
    generator = torch.Generator().manual_seed(number)
    lengths = torch.randint(greatest // 2, greatest + 1, (count, batch_size), generator=generator)
    return [make_batch(row, generator, device) for row in lengths]


def varlen_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float | None = None,
    dropout: float = 0.0, *, cu_seqlens: Tensor, longest: int, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The dense peer's attention, as transformers calls it: the library's kernel on packed rows."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        context = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale)
    else:  # where the script is only tried out
        context = attend(q, k, v, cu_seqlens, cu_seqlens, longest, scale)[0]
    return context[None].contiguous(), None


AttentionInterface.register("dense_varlen", varlen_attention)

Engine = Callable[[Batch], Tensor]


def without_padding(model: Any) -> Engine:
    model.set_attn_implementation("dense_varlen")

    def run(batch: Batch) -> Tensor:
        states = model.base_model(
            input_ids=batch.ids, position_ids=batch.positions, cu_seqlens=batch.cu_seqlens, longest=batch.longest
        ).last_hidden_state
        logits: Tensor = model.classifier(states[0, batch.cu_seqlens[:-1].long(), None])
        return logits

    return run


def with_padding(model: Any) -> Engine:
    def run(batch: Batch) -> Tensor:
        logits: Tensor = model(**batch.padded).logits
        return logits

    return run


def make_engines(
    shape: str, dtype: torch.dtype, greatest: int, device: torch.device, compiled: bool
) -> tuple[dict[str, Engine], dict[str, float]]:
    """All engines of one shape, dtype and length, and what pruning costs in relative FLOPs."""
    fitted = draw(-1, 1, FITTED, greatest, device)[0].padded
    first = make_model(shape).to(device)
    method = linear_thresholds(first, fitted, FINAL_KEEP)
    layers = first.config.num_hidden_layers
    at = sorted({max(1, layers * layer // 12) for layer in PRUNE_AT})
    few = linear_thresholds(first, fitted, FINAL_KEEP, at)
    first.to(dtype)
    engines = {PADDED: with_padding(first), VARLEN: without_padding(copy.deepcopy(first))}
    if compiled:
        model = copy.deepcopy(first)
        engine = without_padding(model)
        model.base_model.compile(dynamic=True)
        try:
            with torch.inference_mode():
                engine(draw(-3, 1, 2, greatest, device)[0])
        except Exception as error:  # a compiler's failure is no reason to lose all other figures
            print(f"{COMPILED}: left out: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            engines[COMPILED] = engine
    flops = {}
    for name, pruner in ((UNPRUNED, tp.Unpruned()), (PRUNED, method), (FEW, few)):
        model = tp.prune(copy.deepcopy(first), pruner)
        with torch.inference_mode(), tp.record(model) as trace:
            model(**draw(-2, 1, FITTED, greatest, device)[0].padded)
        flops[name] = count_flops(model, trace).relative
        engines[name] = with_padding(model)
    return engines, flops


# The clock


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds on the device from the first launch to the last kernel's end."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    run()
    return statistics.median(seconds_of(run, device) for _ in range(repeats if device.type == "cuda" else 1))


# Whole models


def measure(
    engines: dict[str, Engine], flops: dict[str, float], batch_size: int, greatest: int, passes: int,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """One row of the results: every engine in turn on fresh lengths, ``passes`` times."""
    count = max(1, TOKENS_PER_TURN // (batch_size * greatest)) if device.type == "cuda" else 1
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    logits: dict[str, Tensor] = {}
    for number in range(-1, passes):  # the first is not counted
        batches = draw(number + 1, count, batch_size, greatest, device)
        for name, engine in engines.items():
            engine(batches[0])  # the width it has not met yet is not its fault

            def turn(engine: Engine = engine, batches: list[Batch] = batches) -> None:
                for batch in batches:
                    engine(batch)

            taken = seconds_of(turn, device)
            if number >= 0:
                seconds[name].append(taken)
            else:
                logits[name] = engine(batches[0]).float()
    dense = [name for name in WITHOUT_PADDING if name in seconds]
    best = min(dense, key=lambda name: statistics.median(seconds[name]))
    rows = {}
    for name, values in seconds.items():
        scale = logits[VARLEN].abs().max()
        rows[name] = {
            "sequences_per_second": spread([count * batch_size / value for value in values]),
            "to_best_dense": spread([theirs / own for theirs, own in zip(seconds[best], values, strict=True)]),
            "to_varlen": spread([theirs / own for theirs, own in zip(seconds[VARLEN], values, strict=True)]),
            "logit_difference": float((logits[name] - logits[VARLEN]).abs().max() / scale),
            "relative_flops": flops.get(name, 1.0),
        }
        if name in (PRUNED, FEW):
            gain = statistics.median(u / p for u, p in zip(seconds[UNPRUNED], values, strict=True))
            rows[name]["realised_fraction"] = gain * flops[name] / flops[UNPRUNED]
    return {"batch_size": batch_size, "length": greatest, "best_dense": best, "passes": passes, "engines": rows}


# Single kernels


def ceilings(device: torch.device) -> dict[str, float]:
    """What the card reaches: bytes read and written by a copy, and a bfloat16 matrix product; per second."""
    numbers, size = (2**30, 8192) if device.type == "cuda" else (2**20, 256)
    source = torch.randn(numbers, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), device)
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    matmul = median_seconds(lambda: a @ b, device)
    return {"bytes_per_second": 4 * numbers / copy, "flops_per_second": 2 * size**3 / matmul}


def measure_kernels(batch_size: int, length: int, dtype: torch.dtype, device: torch.device) -> list[dict[str, Any]]:
    """Seconds, FLOP/s and bytes/s of each kernel on sequences of one length, with base's 12 heads of 64."""
    heads, dim, rows = 12, 64, batch_size * length
    layout = layout_from_mask(torch.ones(batch_size, length, dtype=torch.bool, device=device))
    query, key, value = torch.randn(rows, 3, heads, dim, device=device, dtype=dtype).unbind(1)
    cu_seqlens, scale = layout.cu_seqlens, dim**-0.5
    _, lse = attend(query, key, value, cu_seqlens, cu_seqlens, length, scale)
    keep = torch.rand(rows, device=device) < 0.8
    states = torch.randn(rows, heads * dim, device=device, dtype=dtype)
    product_flops = 2 * batch_size * heads * length**2 * dim
    element = query.element_size()
    kept = keep.nonzero().squeeze(-1)
    runs: list[tuple[str, Callable[[], object], float, float]] = [
        ("column sums", lambda: column_sums(query, key, lse, cu_seqlens, length, scale),
         product_flops, rows * heads * (2 * dim * element + 8)),
        ("attention, our kernel", lambda: attend(query, key, value, cu_seqlens, cu_seqlens, length, scale),
         2 * product_flops, rows * heads * (4 * dim * element + 4)),
        ("compaction", lambda: compact(keep, layout.indices, cu_seqlens), 0, rows * (2 + 8 + 16)),
        ("gather of kept rows", lambda: states[kept], 0, 2 * kept.numel() * heads * dim * element),
    ]  # fmt: skip
    if device.type == "cuda":
        runs.insert(0, (
            "attention, the library's",
            lambda: fused._library_attention(query, key, value, cu_seqlens, cu_seqlens, length, length, scale),
            2 * product_flops, rows * heads * (4 * dim * element + 4),
        ))  # fmt: skip
    return [
        {
            "kernel": name, "batch_size": batch_size, "length": length, "dtype": str(dtype).removeprefix("torch."),
            "seconds": (taken := median_seconds(run, device)),
            "flops_per_second": flops / taken, "bytes_per_second": nbytes / taken,
        }
        for name, run, flops, nbytes in runs
    ]  # fmt: skip


# The report


def markdown(result: dict[str, Any]) -> str:
    about, top = result["about"], result["ceilings"]
    lines = [
        f"{about['device']}; torch {about['torch']}, transformers {about['transformers']}, triton {about['triton']}.",
        "",
        "Medians of a row's passes, with the slowest and the fastest; engines took turns on the same sequences. "
        f"*To best dense*: against the faster of *{VARLEN}* and *{COMPILED}*. *Realised fraction*: how much faster "
        "pruning makes token-pruning, ÷ by how much it divides its FLOPs. *Logits*: largest difference from the dense "
        "model in the same dtype, relative to the largest logit.",
        "",
        "| shape | dtype | batch × length | engine | sequences/s (slowest – fastest) | to best dense | to varlen "
        "| relative FLOPs | realised fraction | logits |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        for name, row in run["engines"].items():
            speed, ratio = row["sequences_per_second"], row["to_best_dense"]
            cells = (
                run["shape"], run["dtype"], f"{run['batch_size']} × {run['length']}", name,
                f"{speed['median']:.0f} ({speed['lowest']:.0f} – {speed['highest']:.0f})",
                f"{ratio['median']:.2f}× ({ratio['lowest']:.2f} – {ratio['highest']:.2f})",
                f"{row['to_varlen']['median']:.2f}×", f"{row['relative_flops']:.3f}",
                f"{row['realised_fraction']:.2f}" if "realised_fraction" in row else "",
                f"{row['logit_difference']:.1e}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Kernels, on sequences of equal length with 12 heads of 64. This card copies "
        f"{top['bytes_per_second'] / 1e9:.0f} GB/s (bytes read and written) and multiplies bfloat16 matrices at "
        f"{top['flops_per_second'] / 1e12:.0f} TFLOP/s.",
        "",
        "| kernel | dtype | batch × length | µs | TFLOP/s | of the ceiling | GB/s | of the ceiling |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["kernels"]:
        flops, nbytes = row["flops_per_second"], row["bytes_per_second"]
        cells = (
            row["kernel"], row["dtype"], f"{row['batch_size']} × {row['length']}", f"{row['seconds'] * 1e6:.1f}",
            f"{flops / 1e12:.1f}", f"{flops / top['flops_per_second']:.0%}",
            f"{nbytes / 1e9:.0f}", f"{nbytes / top['bytes_per_second']:.0%}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Every row's engines as multiples of the best dense engine without padding."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = result["runs"]
    figure = Figure(figsize=(9, 1.8 + 0.32 * len(runs)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    looks = {PRUNED: "C3o", FEW: "C1o", UNPRUNED: "C0o", COMPILED: "C7+", VARLEN: "C7x", PADDED: "C7v"}
    for name, look in looks.items():
        points = [(run["engines"][name]["to_best_dense"], y) for y, run in enumerate(runs) if name in run["engines"]]
        if points:
            ratios = [ratio["median"] for ratio, _ in points]
            errors = (
                [ratio["median"] - ratio["lowest"] for ratio, _ in points],
                [ratio["highest"] - ratio["median"] for ratio, _ in points],
            )
            axes.errorbar(ratios, [y for _, y in points], xerr=errors, fmt=look, markersize=5, elinewidth=1, label=name)
    axes.axvline(1, color="0.5", linewidth=1, zorder=0)
    names = [f"{run['shape']} · {run['dtype']} · {run['batch_size']} × {run['length']}" for run in runs]
    axes.set_yticks(range(len(runs)), names)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_title(result["about"]["device"], fontsize="small", loc="left")
    axes.set_xlabel("sequences per second, relative to the fastest dense engine without padding in the same row")
    axes.grid(axis="x", alpha=0.4)
    figure.legend(loc="outside upper center", ncols=3, fontsize="small", frameon=False)
    figure.savefig(path)


def rows(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int, bool]]:
    """Shape, dtype, length, and whether to compile a peer, which takes most of a minute: once for every shape."""
    for number, (shape, dtype) in enumerate(product(arguments.shapes, arguments.dtypes)):
        for length in arguments.lengths:
            yield shape, dtype, length, arguments.compile and number % len(arguments.dtypes) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=("tiny", "base", "large"), default=["base", "large"])
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"],
                        default=["bfloat16", "float16"])  # fmt: skip
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 128])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 256, 1])
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--minutes", type=float, default=6.0, help="begin no further row after so long (default 6)")
    parser.add_argument("--device", default="cuda", help="cpu only to try the script out, with TRITON_INTERPRET=1")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json, OUTPUT.md and OUTPUT.png")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device is cuda; this machine has no NVIDIA GPU that PyTorch can use")
    import triton

    begun = time.perf_counter()
    result: dict[str, Any] = {
        "about": {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU (trial run)",
            "torch": torch.__version__, "transformers": transformers.__version__, "triton": triton.__version__,
            "command": " ".join(["python", *sys.argv]),
        },
        "ceilings": ceilings(device), "runs": [], "kernels": [],
    }  # fmt: skip
    for batch_size, length in product(arguments.batch_sizes, arguments.lengths):
        result["kernels"] += measure_kernels(batch_size, length, getattr(torch, arguments.dtypes[0]), device)
    for shape, dtype, length, compiled in rows(arguments):
        if time.perf_counter() - begun > 60 * arguments.minutes:
            print(f"left out for want of time: {shape} {dtype} {length}", file=sys.stderr)
            continue
        engines, flops = make_engines(shape, getattr(torch, dtype), length, device, compiled)
        with torch.inference_mode():
            for batch_size in arguments.batch_sizes:
                done = measure(engines, flops, batch_size, length, arguments.passes, device)
                result["runs"].append({"shape": shape, "dtype": dtype, **done})
                if arguments.output:  # also when the time is cut short
                    write(result, markdown(result), arguments.output)
        del engines
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(markdown(result))
    if arguments.output:
        write(result, markdown(result), arguments.output)
        plot(result, beside(arguments.output, ".png"))


if __name__ == "__main__":
    main()
