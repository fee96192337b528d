"""Sequences per second on a CPU: the engine, pruned and unpruned, beside the dense engines of others.

    make bench
    python benchmarks/cpu.py --workload roberta-base-bs32 --threads 1 2 --output results/cpu/roberta-base
    python benchmarks/cpu.py --workload minilm-mrpc-bs32 --checkpoints RUNS --data-dir GLUE

For every workload, number of threads and dtype a fresh process builds all engines. They take turns (A B C A B C), in a
pass all on the same sequences, which are padded to tensors beforehand. Lengths are drawn anew for every pass. A ratio
is the median of the passes' ratios. Before a turn all threads get 50 ms to stop spinning, and the engine one call that
is not counted. Before the first pass an engine meets every width to expect, and a dense engine chooses what multiple
widths are padded to: that which was the fastest on sequences of their own.

Memory is measured once per engine, in a process that holds nothing else: resident memory that building it and one
batch add, after the model it was built from is gone, and the highest on the way.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
import transformers
from output import spread
from peers import PEERS, Call, Model, import_packages, prepare, versions
from workloads import WORKLOADS, Sequences, load, make_checkpoint

import token_pruning as tp
from token_pruning.engine.machine import cpu_name, has_amx
from token_pruning.families import shape_of
from token_pruning.runtime.flops import relative_flops
from token_pruning.runtime.prune import reads_of

DTYPES = ("float32", "bfloat16", "int8")
UNPRUNED, PRUNED = "engine, unpruned", "engine, pruned"
WIDTH_MULTIPLES = (1, 8, 16, 32)
TUNING_SEQUENCES = 64
PAUSE = 0.05  # seconds
HELD_OUT = 2**31 - 5  # the number of a draw that is no pass


# In processes of their own


def in_fresh_process(function: Callable[..., Any], *arguments: Any, threads: int) -> Any:
    """Call a function where nothing else has run; a process that dies is a TokenPruningError."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_start, initargs=(threads,)) as executor:
        try:
            return executor.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise tp.TokenPruningError(f"the process of {function.__name__} died; was there enough memory?") from None


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def make_model(workload: str, folder: Path, checkpoints: Path | None, data_dir: Path | None) -> dict[str, Any]:
    """The checkpoint, what pruning saves on it, and logits in float32 to hold the engines against."""
    checkpoint = make_checkpoint(WORKLOADS[workload], folder, checkpoints, data_dir)
    sequences = Sequences(WORKLOADS[workload], checkpoint, data_dir)
    pruned = load(checkpoint, pruned=True)
    with torch.inference_mode(), tp.record(pruned) as trace:
        for batch in sequences.draw(HELD_OUT):
            pruned(**sequences.pad(batch))
    sample = sequences.pad(sequences.draw(HELD_OUT)[0])
    with torch.inference_mode():
        expected = {True: pruned(**sample).logits, False: tp.unprune(pruned)(**sample).logits}
    entering = trace.attention_lengths.double().mean(1)
    return {
        "model": Model(checkpoint, folder, sequences.names),
        "relative_flops": tp.count_flops(pruned, trace).relative,
        "relative_flops_unpruned": unpruned_flops(pruned, trace),
        "kept": (trace.ffn_lengths.double().mean(1) / entering[0]).tolist(),
        "sample": sample,
        "expected": expected,
    }


def unpruned_flops(model: Any, trace: tp.Trace) -> float:
    """What the engine computes without pruning, relative to the dense model: less where first tokens are enough."""
    shape, lengths = shape_of(model.config), trace.attention_lengths[0]
    left = lengths.expand(shape.num_layers + 1, -1)
    return float(relative_flops(shape, lengths, left, first_only=reads_of(model) == "first"))


def prepare_peer(workload: str, name: str, dtype: str, model: Model, data_dir: Path | None) -> str | None:
    """Write the files a dense engine reads, or say why it cannot be measured."""
    try:
        import_packages(PEERS[name])
        prepare(name, dtype, model, Sequences(WORKLOADS[workload], model.checkpoint, data_dir))
    except Exception as error:  # other projects' exporters fail with exceptions of every kind
        return first_line(error)
    return None


def build(name: str, model: Model, dtype: str, threads: int) -> tuple[Call, str]:
    """An engine as a function from a padded batch to logits, and what it says of itself."""
    if name in PEERS:
        return PEERS[name].build(model, dtype, threads), PEERS[name].settings
    engine = tp.compile(load(model.checkpoint, pruned=name == PRUNED), dtype=dtype, threads=threads)
    return lambda inputs: engine(**inputs).logits, engine.explain()


def measure(
    workload: str, made: dict[str, Any], names: list[str], dtype: str, threads: int, passes: int, data_dir: Path | None
) -> dict[str, Any]:
    """Seconds of every engine in every pass."""
    sequences = Sequences(WORKLOADS[workload], made["model"].checkpoint, data_dir)
    calls: dict[str, Call] = {}
    left_out, difference, multiples, explained = {}, {}, {}, {}
    for name in names:
        try:
            call, explained[name] = build(name, made["model"], dtype, threads)
            expected = made["expected"][name == PRUNED]
            difference[name] = ((call(made["sample"]).float() - expected).abs().max() / expected.abs().max()).item()
            multiples[name] = best_multiple(call, sequences) if name in PEERS else 1
            warm_up(call, sequences, multiples[name])
            calls[name] = call
        except Exception as error:  # as above
            left_out[name] = first_line(error)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    counts, valid, places = [], 0, 0
    warm = sequences.draw(HELD_OUT)[0]
    for number in range(passes):
        batches = sequences.draw(number)
        lengths = [[len(feature["input_ids"]) for feature in batch] for batch in batches]
        counts.append(sum(map(len, lengths)))
        valid += sum(map(sum, lengths))
        places += sum(max(batch) * len(batch) for batch in lengths)
        for name, call in calls.items():
            inputs = [sequences.pad(batch, multiples[name]) for batch in batches]
            time.sleep(PAUSE)
            call(sequences.pad(warm, multiples[name]))
            seconds[name].append(timed(call, inputs))
    return {
        "sequences": counts,
        "mean_tokens": valid / sum(counts),
        "fill": valid / places,
        "seconds": seconds,
        "difference": difference,
        "width_multiple": multiples,
        "explained": explained,
        "left_out": left_out,
    }


def timed(call: Call, batches: list[Any]) -> float:
    began = time.perf_counter()
    for batch in batches:
        call(batch)
    return time.perf_counter() - began


def warm_up(call: Call, sequences: Sequences, multiple: int) -> None:
    """One call for every shape to expect."""
    seen = set()
    for batch in sequences.every_shape():
        inputs = sequences.pad(batch, multiple)
        if inputs["input_ids"].shape not in seen:
            seen.add(inputs["input_ids"].shape)
            call(inputs)


def best_multiple(call: Call, sequences: Sequences) -> int:
    """What widths are best padded to a multiple of: the faster of two turns each, after one that does not count."""
    seconds: dict[int, list[float]] = {multiple: [] for multiple in WIDTH_MULTIPLES}
    for turn in range(3):
        batches = sequences.draw(HELD_OUT - turn)
        batches = batches[:: max(1, sum(map(len, batches)) // TUNING_SEQUENCES)]
        for multiple, values in seconds.items():
            values.append(timed(call, [sequences.pad(batch, multiple) for batch in batches]))
    return min(seconds, key=lambda multiple: min(seconds[multiple][1:]))


def memory(name: str, made: dict[str, Any], dtype: str, threads: int) -> dict[str, float] | None:
    """MiB that an engine adds to a process which has its libraries; None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None

    def mebibytes(key: str) -> float:
        lines = status.read_text(encoding="utf-8").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(key))) / 1024

    def tidy() -> None:
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)

    if name in PEERS:
        import_packages(PEERS[name])
    # The first model loads code that the engine does not need.
    transformers.AutoModelForSequenceClassification.from_config(
        transformers.AutoConfig.from_pretrained(
            made["model"].checkpoint,
            num_hidden_layers=1,
            hidden_size=12,
            num_attention_heads=12,
            vocab_size=9,
            trust_remote_code=False,
        )
    )
    torch.ones(64, 64) @ torch.ones(64, 64)
    tidy()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before = mebibytes("VmRSS")
    call, _ = build(name, made["model"], dtype, threads)
    call(made["sample"])
    tidy()
    return {"resident": mebibytes("VmRSS") - before, "peak": mebibytes("VmHWM") - before}


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# One run: a workload with a number of threads and a dtype


def run(workload: str, made: dict[str, Any], dtype: str, threads: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything about a run, as it goes into the JSON file."""
    left_out, names = {}, []
    for name in arguments.peers:
        if dtype in PEERS[name].dtypes:
            failed = in_fresh_process(
                prepare_peer, workload, name, dtype, made["model"], arguments.data_dir, threads=threads
            )
            if failed:
                left_out[name] = failed
            else:
                names.append(name)
    names += [UNPRUNED, PRUNED]
    measured = in_fresh_process(
        measure, workload, made, names, dtype, threads, arguments.passes, arguments.data_dir, threads=threads
    )
    left_out |= measured.pop("left_out")
    seconds = measured["seconds"]
    dense = [name for name in PEERS if name in seconds]
    best = min(dense, key=lambda name: statistics.median(seconds[name])) if dense else None
    rows = {}
    for name, values in seconds.items():
        speeds = [count / value for count, value in zip(measured["sequences"], values, strict=True)]
        row: dict[str, Any] = {"sequences_per_second": spread(speeds)}
        if best:
            row["to_best_dense"] = spread([theirs / own for theirs, own in zip(seconds[best], values, strict=True)])
        row["logit_difference"] = measured["difference"][name]
        row["width_multiple"] = measured["width_multiple"][name]
        if arguments.memory and threads == arguments.threads[0]:
            row["memory_mib"] = in_fresh_process(memory, name, made, dtype, threads, threads=threads)
        rows[name] = row
    result = {
        "workload": workload,
        "about": WORKLOADS[workload].about,
        "batch_size": WORKLOADS[workload].batch_size,
        "passes": arguments.passes,
        "dtype": dtype,
        "threads": threads,
        **measured,
        "relative_flops": made["relative_flops"],
        "relative_flops_unpruned": made["relative_flops_unpruned"],
        "kept": made["kept"],
        "best_dense": best,
        "engines": rows,
        "left_out": left_out,
    }
    if UNPRUNED in seconds and PRUNED in seconds:
        pairs = zip(seconds[UNPRUNED], seconds[PRUNED], strict=True)
        result["pruning_speed_up"] = spread([unpruned / pruned for unpruned, pruned in pairs])
        result["realised_fraction"] = result["pruning_speed_up"]["median"] / _pruning_gain(result)
    return result


def _pruning_gain(done: Mapping[str, Any]) -> float:
    """By how much pruning divides the engine's FLOPs; runs of earlier versions know one figure only."""
    return float(done.get("relative_flops_unpruned", 1.0) / done["relative_flops"])


# The report


def markdown(result: dict[str, Any]) -> str:
    about = result["about"]
    installed = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    lines = [
        f"{about['cpu']}, {'with' if about['amx'] else 'without'} AMX, {about['processors']} processors. {installed}.",
        "",
        "Medians of a run's passes, with the slowest and the fastest; "
        "engines took turns in one process, on the same sequences. *To best dense*: against the fastest engine of "
        "others in the same run, median of the passes' ratios. *Memory*: resident, after building and one batch, with "
        "the peak on the way. *Logits*: largest difference from transformers in float32, relative to the largest "
        "logit; the pruned engine's from the pruned model. *Realised fraction*: how much faster pruning makes the "
        "engine, ÷ 1/relative FLOPs.",
        "",
        *(f"- {name}: {settings}." for name, settings in about["settings"].items()),
        "",
        *summary(result),
        "",
    ]
    previous = None
    for done in result["runs"]:
        if (done["workload"], done["threads"]) != previous:
            previous = done["workload"], done["threads"]
            lines += [
                f"### {done['workload']}, {count(done['threads'], 'thread')}",
                "",
                f"{done['about'][0].upper()}{done['about'][1:]}; batch size {done['batch_size']}, "
                f"{done['sequences'][0]} sequences a pass, {done['mean_tokens']:.1f} tokens on average, padded batches "
                f"{done['fill']:.1%} full, {count(done['passes'], 'pass', 'passes')}, relative FLOPs "
                f"{done['relative_flops']:.3f}.",
                "",
                "| dtype | engine | sequences/s (slowest – fastest) | to best dense | memory (peak), MiB | logits |",
                "|---|---|---|---|---|---|",
            ]
        else:
            lines.pop()  # the table goes on
        notes = result_notes(done)
        lines += [table_row(done, name) for name in done["engines"]]
        lines += [f"| {done['dtype']} | {name} | left out: {why} | | | |" for name, why in done["left_out"].items()]
        if notes:
            lines.append(f"| {done['dtype']} | *pruning* | {notes} | | | |")
        lines.append("")
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> list[str]:
    """A line per run: the best dense engine of others, and this package's."""
    lines = [
        "| workload | dtype | threads | best dense engine of others, sequences/s | unpruned engine | pruned engine | "
        "relative FLOPs | realised fraction |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for done in result["runs"]:
        if not done["best_dense"]:
            continue

        def speed(name: str, done: dict[str, Any] = done) -> str:
            row = done["engines"].get(name)
            if row is None:
                return ""
            return f"{row['sequences_per_second']['median']:.1f}, **{row['to_best_dense']['median']:.2f}×**"

        best = done["engines"][done["best_dense"]]["sequences_per_second"]["median"]
        fraction = f"{done['realised_fraction']:.2f}" if "realised_fraction" in done else ""
        cells = (
            done["workload"],
            done["dtype"],
            str(done["threads"]),
            f"{done['best_dense']} {best:.1f}",
            speed(UNPRUNED),
            speed(PRUNED),
            f"{done['relative_flops']:.2f}",
            fraction,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def table_row(done: dict[str, Any], name: str) -> str:
    row = done["engines"][name]
    speed, ratio, used = row["sequences_per_second"], row.get("to_best_dense"), row.get("memory_mib")
    multiple = row["width_multiple"]
    cells = (
        done["dtype"],
        name + (f", widths padded to {multiple}s" if multiple > 1 else ""),
        f"{speed['median']:.1f} ({speed['lowest']:.1f} – {speed['highest']:.1f})",
        f"{ratio['median']:.2f}× ({ratio['lowest']:.2f} – {ratio['highest']:.2f})" if ratio else "",
        f"{used['resident']:.0f} ({used['peak']:.0f})" if used else "",
        f"{row['logit_difference']:.1e}",
    )
    return f"| {' | '.join(cells)} |"


def result_notes(done: dict[str, Any]) -> str:
    if "realised_fraction" not in done:
        return ""
    gain = done["pruning_speed_up"]
    return (
        f"{gain['median']:.2f}× ({gain['lowest']:.2f} – {gain['highest']:.2f}) of {_pruning_gain(done):.2f}×: "
        f"realised fraction {done['realised_fraction']:.2f}"
    )


def count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Every run a line, every engine's speed on it as a multiple of the best dense engine's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = [done for done in result["runs"] if done["best_dense"]]
    if not runs:
        return
    figure = Figure(figsize=(9, 1.6 + 0.32 * len(runs)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    looks = dict(zip([PRUNED, UNPRUNED, *PEERS], ("C3o", "C0o", "C7x", "C7+", "C7v", "C7s"), strict=True))
    for name, look in looks.items():
        points = [
            (done["engines"][name]["to_best_dense"], place)
            for place, done in enumerate(runs)
            if name in done["engines"]
        ]
        if points:
            ratios = [ratio["median"] for ratio, _ in points]
            below = [ratio["median"] - ratio["lowest"] for ratio, _ in points]
            above = [ratio["highest"] - ratio["median"] for ratio, _ in points]
            axes.errorbar(
                ratios,
                [place for _, place in points],
                xerr=(below, above),
                fmt=look,
                markersize=5,
                elinewidth=1,
                label=name,
            )
    axes.axvline(1, color="0.5", linewidth=1, zorder=0)
    axes.set_yticks(
        range(len(runs)),
        [f"{done['workload']} · {count(done['threads'], 'thread')} · {done['dtype']}" for done in runs],
    )
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    about = result["about"]
    axes.set_title(f"{about['cpu']}, {'with' if about['amx'] else 'without'} AMX", fontsize="small", loc="left")
    axes.set_xlabel("sequences per second, relative to the fastest dense engine of others in the same run")
    axes.grid(axis="x", alpha=0.4)
    figure.legend(loc="outside upper center", ncols=len(looks), fontsize="small", frameon=False)
    figure.savefig(path)


def put(runs: list[dict[str, Any]], done: dict[str, Any]) -> None:
    """Add a run in its place, or replace the one that was there."""

    def place(run: dict[str, Any]) -> tuple[int, int, int]:
        return list(WORKLOADS).index(run["workload"]), run["threads"], DTYPES.index(run["dtype"])

    runs[:] = sorted([run for run in runs if place(run) != place(done)] + [done], key=place)


def json_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.json")


def write(result: dict[str, Any], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    json_path(output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    output.with_name(f"{output.name}.md").write_text(markdown(result), encoding="utf-8")
    plot(result, output.with_name(f"{output.name}.png"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", action="append", choices=WORKLOADS, help="may be repeated (default: all)")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="dense engines to compare with")
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--checkpoints", type=Path, help="folder with TASK/hard, for the workloads with real weights")
    parser.add_argument("--data-dir", type=Path, help="folder in the official GLUE layout, for the same")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave memory out")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json, OUTPUT.md and OUTPUT.png")
    parser.add_argument(
        "--add", action="store_true", help="keep the runs that OUTPUT.json has and this command has not"
    )
    arguments = parser.parse_args()
    if arguments.passes < 1 or min(arguments.threads) < 1:
        parser.error("--passes and --threads must be at least 1")
    if arguments.add and not (arguments.output and json_path(arguments.output).exists()):
        parser.error("--add needs the --output of an earlier run")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    result: dict[str, Any] = {
        "about": {
            "cpu": cpu_name(),
            "amx": has_amx(),
            "processors": os.cpu_count(),
            "versions": versions(),
            "settings": {name: PEERS[name].settings for name in arguments.peers},
        },
        "runs": [],
    }
    if arguments.add:
        result["runs"] = json.loads(json_path(arguments.output).read_text(encoding="utf-8"))["runs"]
    skipped = []
    for workload in arguments.workload or WORKLOADS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                made = in_fresh_process(
                    make_model,
                    workload,
                    Path(folder),
                    arguments.checkpoints,
                    arguments.data_dir,
                    threads=max(arguments.threads),
                )
            except (tp.CheckpointError, tp.DataError) as error:
                skipped.append(f"{workload}: skipped, {error}")
                print(skipped[-1], file=sys.stderr, flush=True)
                continue
            for threads in arguments.threads:
                for dtype in arguments.dtypes:
                    print(f"{workload}, {count(threads, 'thread')}, {dtype}", file=sys.stderr, flush=True)
                    put(result["runs"], run(workload, made, dtype, threads, arguments))
                    if arguments.output:
                        write(result, arguments.output)
    if not result["runs"]:
        raise tp.DataError(skipped[-1])
    print(markdown(result))


if __name__ == "__main__":
    try:
        main()
    except tp.TokenPruningError as error:
        sys.exit(f"error: {error}")
