"""Sequences per second on a CPU: the engine, pruned and unpruned, beside the dense engines of others.

    make bench
    python benchmarks/cpu.py --workload roberta-base-bs32 --threads 1 2
    python benchmarks/cpu.py --workload minilm-mrpc-bs32 --checkpoints RUNS --data-dir GLUE --add

Figures go to results/cpu/MACHINE/engines, and no machine writes over those of another kind.

For every workload, number of threads and dtype a fresh process builds all engines. They take turns (A B C A B C), in a
pass all on the same sequences, sorted by length and padded to tensors beforehand. Lengths are drawn anew for every
pass. A ratio is the median of the passes' ratios. Before a turn all threads get 50 ms to stop spinning, and the engine
one call that is not counted.

Every dense engine has its best setting, chosen beforehand on sequences of their own: its form (peers.py), how many
sequences it computes at once, and what multiple widths are padded to. This package's engine takes the batch as it
comes. Beside a dtype's dense engines the fastest of every wider dtype takes part, so that the best one of others has
that dtype or better. Before the first pass an engine meets every width to expect.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from hardware import RESULTS, refuse_others, this_machine
from index import write_index
from output import command, spread
from peers import PEERS, Call, Model, import_packages, outcome, prepare, versions
from torch import Tensor
from workloads import WORKLOADS, Features, Inputs, Sequences, load, make_checkpoint

import token_pruning as tp
from token_pruning.families import shape_of
from token_pruning.runtime.flops import relative_flops
from token_pruning.runtime.prune import reads_of

DTYPES = ("float32", "bfloat16", "int8")
UNPRUNED, PRUNED = "engine, unpruned", "engine, pruned"
WIDTH_MULTIPLES = (1, 8, 16, 32)
BATCH_SIZES = (32, 16, 8, 4, 2, 1)  # and a workload's own before them, unless it has more than WHOLE_TOKENS
WHOLE_TOKENS = 4096
TUNING_TOKENS = 1200
GIVE_UP = 1.15  # times the best: smaller batches are not tried, and other widths not of a slower form
SAMPLED = 8  # sequences whose outputs are compared
WRONG = 0.02  # float32: an engine whose outputs differ by more, relative to the largest, computes something else
PAUSE = 0.05  # seconds
HELD_OUT = 2**31 - 5  # the number of a draw that is no pass


@dataclass(frozen=True)
class Setting:
    """How a dense engine is run.

    Attributes:
        form: its place among the peer's for the dtype.
        batch_size: the most sequences at once.
        multiple: of what widths are padded to.
        seconds: per token of the sequences it was chosen on.
    """

    form: int
    batch_size: int
    multiple: int
    seconds: float


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
    """The checkpoint, what pruning saves on it, and outputs in float32 to hold the engines against."""
    checkpoint = make_checkpoint(WORKLOADS[workload], folder, checkpoints, data_dir)
    sequences = Sequences(WORKLOADS[workload], checkpoint, data_dir)
    pruned = load(checkpoint, pruned=True)
    with torch.inference_mode(), tp.record(pruned) as trace:
        for batch in sequences.draw(HELD_OUT):
            pruned(**sequences.pad(batch))
    sample = sequences.pad(sequences.draw(HELD_OUT)[0][:SAMPLED])
    pooled = WORKLOADS[workload].gives == "vector"
    with torch.inference_mode():
        expected = {
            is_pruned: outcome(model(**sample), sample["attention_mask"], pooled)
            for is_pruned, model in ((True, pruned), (False, load(checkpoint)))
        }
    entering = trace.attention_lengths.double().mean(1)
    return {
        "model": Model(checkpoint, folder, sequences.names, pooled),
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


def prepare_peer(
    workload: str, name: str, dtype: str, model: Model, data_dir: Path | None
) -> tuple[list[int], dict[str, str]]:
    """Write the files a dense engine reads.

    Returns:
        The forms that can be measured, by place, and why others cannot, by name.
    """
    forms = PEERS[name].forms[dtype]
    try:
        import_packages(PEERS[name])
        failed = prepare(name, dtype, model, Sequences(WORKLOADS[workload], model.checkpoint, data_dir))
    except Exception as error:  # other projects' code fails with exceptions of every kind
        return [], {name: first_line(error)}
    why = {label(name, forms[place].about): first_line(error) for place, error in failed.items()}
    if len(failed) == len(forms) and len(set(why.values())) == 1:
        why = {name: next(iter(why.values()))}
    return [place for place in range(len(forms)) if place not in failed], why


def label(name: str, about: str) -> str:
    """An engine's name with what is particular about it."""
    return f"{name} ({about})" if about else name


def build_own(name: str, model: Model, dtype: str, threads: int) -> tuple[Call, str]:
    """This package's engine as a function from a padded batch to its outputs, and what it says of itself."""
    engine = tp.compile(load(model.checkpoint, pruned=name == PRUNED), dtype=dtype, threads=threads)
    if not model.pooled:
        return lambda inputs: engine(**inputs).logits, engine.explain()

    def call(inputs: Inputs) -> Tensor:
        mask = inputs["attention_mask"].bool()
        cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        vectors: Tensor = engine.run_pooled(inputs["input_ids"][mask], cu_seqlens).vectors
        return vectors

    return call, engine.explain()


def measure(
    workload: str,
    made: dict[str, Any],
    peers: dict[tuple[str, str], list[int]],
    dtype: str,
    threads: int,
    passes: int,
    data_dir: Path | None,
) -> dict[str, Any]:
    """Seconds of every engine in every pass.

    Args:
        workload: its name.
        made: from :func:`make_model`.
        peers: the dense engines' names and dtypes, and the forms to choose from.
        dtype: of this package's engines.
        threads: of all.
        passes: that are counted.
        data_dir: with the GLUE tasks.
    """
    sequences = Sequences(WORKLOADS[workload], made["model"].checkpoint, data_dir)
    batch_size = WORKLOADS[workload].batch_size
    calls: dict[str, Call] = {}
    settings: dict[str, Setting] = {}
    left_out: dict[str, str] = {}
    difference: dict[str, float] = {}
    explained: dict[str, str] = {}
    for (peer, own_dtype), forms in peers.items():
        name = peer if own_dtype == dtype else f"{peer}, {own_dtype}"
        found = _tuned(peer, own_dtype, forms, made, threads, sequences, left_out)
        if found:
            calls[name], settings[name], difference[name] = found
            explained[name] = label(PEERS[peer].settings, PEERS[peer].forms[own_dtype][settings[name].form].about)
    for name in (UNPRUNED, PRUNED):
        try:
            call, explained[name] = build_own(name, made["model"], dtype, threads)
            difference[name] = distance(call(made["sample"]), made["expected"][name == PRUNED])
        except tp.TokenPruningError as error:
            left_out[name] = first_line(error)
            continue
        calls[name], settings[name] = call, Setting(0, batch_size, 1, 0.0)
    for name, call in calls.items():
        warm_up(call, sequences, settings[name])
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
            inputs = list(cut(sequences, batches, settings[name]))
            time.sleep(PAUSE)
            call(next(cut(sequences, [warm], settings[name])))
            seconds[name].append(timed(call, inputs))
    return {
        "sequences": counts,
        "mean_tokens": valid / sum(counts),
        "fill": valid / places,
        "seconds": seconds,
        "difference": difference,
        "settings": {
            name: {"batch_size": setting.batch_size, "width_multiple": setting.multiple, "form": setting.form}
            for name, setting in settings.items()
        },
        "explained": explained,
        "left_out": left_out,
    }


def _tuned(
    peer: str,
    dtype: str,
    forms: list[int],
    made: dict[str, Any],
    threads: int,
    sequences: Sequences,
    left_out: dict[str, str],
) -> tuple[Call, Setting, float] | None:
    """A dense engine in its fastest form and setting, with how far its outputs are off; None if none runs."""
    best: tuple[Call, Setting, float] | None = None
    for place in forms:
        form = PEERS[peer].forms[dtype][place]
        try:
            call = PEERS[peer].build(made["model"], form, dtype, threads)
            off = distance(call(made["sample"]), made["expected"][False])
            if not off <= (WRONG if dtype == "float32" else float("inf")):
                raise ValueError(f"its outputs differ from the model's by {off:.1e}")
            setting = best_setting(call, sequences, place, GIVE_UP * best[1].seconds if best else float("inf"))
        except Exception as error:  # as above
            left_out[label(peer, form.about)] = first_line(error)
            continue
        print(f"  {label(peer, form.about)}, {dtype}: {setting}", file=sys.stderr, flush=True)
        if best is None or setting.seconds < best[1].seconds:
            best = call, setting, off
        del call
        gc.collect()
    return best


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number expected; NaN where there is one."""
    return float((found.float() - expected).abs().max() / expected.abs().max())


def cut(sequences: Sequences, batches: Sequence[Sequence[Features]], setting: Setting) -> Iterator[Inputs]:
    """Batches as a setting wants them."""
    size = setting.batch_size
    for batch in batches:
        for start in range(0, len(batch), size):
            yield sequences.pad(list(batch[start : start + size]), setting.multiple)


def timed(call: Call, batches: list[Any]) -> float:
    began = time.perf_counter()
    for batch in batches:
        call(batch)
    return time.perf_counter() - began


def warm_up(call: Call, sequences: Sequences, setting: Setting) -> None:
    """One call for every shape to expect."""
    seen = set()
    for inputs in cut(sequences, list(sequences.every_shape()), setting):
        if inputs["input_ids"].shape not in seen:
            seen.add(inputs["input_ids"].shape)
            call(inputs)


def best_setting(call: Call, sequences: Sequences, form: int, limit: float = float("inf")) -> Setting:
    """How many sequences at once are fastest, then with widths padded to a multiple of what.

    Args:
        call: a dense engine.
        sequences: of the workload.
        form: its place, for the setting.
        limit: seconds per token above which nothing further is tried.
    """
    batches = sequences.draw(HELD_OUT - 1)
    tokens = sum(len(feature["input_ids"]) for feature in batches[0])
    whole = sequences.workload.batch_size
    sizes = [size for size in BATCH_SIZES if size < whole]
    if tokens <= WHOLE_TOKENS or not sizes:
        sizes = [whole, *sizes]
    best: Setting | None = None
    for size in sizes:
        setting = _tried(call, sequences, batches, Setting(form, size, 1, 0.0))
        if best is None or setting.seconds < best.seconds:
            best = setting
        elif setting.seconds > GIVE_UP * best.seconds:
            break
        if best.seconds > limit:
            return best
    assert best is not None
    for multiple in WIDTH_MULTIPLES[1:]:
        best = min(
            best,
            _tried(call, sequences, batches, Setting(form, best.batch_size, multiple, 0.0)),
            key=lambda setting: setting.seconds,
        )
    return best


def _tried(call: Call, sequences: Sequences, batches: Sequence[Sequence[Features]], setting: Setting) -> Setting:
    """A setting with its seconds per token on some evenly spaced batches of its size: the better of two turns."""
    size = setting.batch_size
    chunks = [batch[start : start + size] for batch in batches for start in range(0, len(batch), size)]
    tokens = [sum(len(feature["input_ids"]) for feature in chunk) for chunk in chunks]
    wanted = min(len(chunks), max(1, round(TUNING_TOKENS * len(chunks) / sum(tokens))))
    places = [(2 * number + 1) * len(chunks) // (2 * wanted) for number in range(wanted)]
    inputs = list(cut(sequences, [chunks[place] for place in places], setting))
    timed(call, inputs)
    seconds = min(timed(call, inputs) for _ in range(2))
    return replace(setting, seconds=seconds / sum(tokens[place] for place in places))


def memory(name: str, form: int, made: dict[str, Any], dtype: str, threads: int) -> dict[str, float] | None:
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
    if name in PEERS:
        call = PEERS[name].build(made["model"], PEERS[name].forms[dtype][form], dtype, threads)
    else:
        call, _ = build_own(name, made["model"], dtype, threads)
    call(made["sample"])
    tidy()
    return {"resident": mebibytes("VmRSS") - before, "peak": mebibytes("VmHWM") - before}


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# One run: a workload with a number of threads and a dtype


def run(
    workload: str,
    made: dict[str, Any],
    dtype: str,
    threads: int,
    wider: Sequence[tuple[str, str]],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Everything about a run, as it goes into the JSON file.

    Args:
        workload: its name.
        made: from :func:`make_model`.
        dtype: of this package's engines, and of the dense ones that have it.
        threads: of all.
        wider: dense engines that take part beside them, with their dtypes.
        arguments: the command's.
    """
    left_out: dict[str, str] = {}
    peers: dict[tuple[str, str], list[int]] = {}
    for name, own_dtype in [*((name, dtype) for name in arguments.peers if dtype in PEERS[name].forms), *wider]:
        forms, failed = in_fresh_process(
            prepare_peer, workload, name, own_dtype, made["model"], arguments.data_dir, threads=threads
        )
        left_out |= failed
        if forms:
            peers[name, own_dtype] = forms
    measured = in_fresh_process(
        measure, workload, made, peers, dtype, threads, arguments.passes, arguments.data_dir, threads=threads
    )
    left_out |= measured.pop("left_out")
    seconds = measured["seconds"]
    dense = [name for name in seconds if name not in (UNPRUNED, PRUNED)]
    best = min(dense, key=lambda name: statistics.median(seconds[name])) if dense else None
    rows = {}
    for name, values in seconds.items():
        speeds = [count / value for count, value in zip(measured["sequences"], values, strict=True)]
        row: dict[str, Any] = {"sequences_per_second": spread(speeds)}
        if best:
            row["to_best_dense"] = spread([theirs / own for theirs, own in zip(seconds[best], values, strict=True)])
        row["logit_difference"] = measured["difference"][name]
        row |= measured["settings"][name]
        row["dtype"] = name.rpartition(", ")[2] if name.rpartition(", ")[2] in DTYPES else dtype
        if arguments.memory and threads == arguments.threads[0] and row["dtype"] == dtype:
            row["memory_mib"] = in_fresh_process(memory, name, row["form"], made, dtype, threads, threads=threads)
        rows[name] = row
    result = {
        "workload": workload,
        "about": WORKLOADS[workload].about,
        "batch_size": WORKLOADS[workload].batch_size,
        "passes": arguments.passes,
        "command": this_command(arguments),
        "versions": versions(),
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
    commands = list(dict.fromkeys(done["command"] for done in result["runs"] if "command" in done))
    lines = [
        f"{about['cpu']} ({about['machine']}), {about['processors']} processors. {installed(about['versions'])}.",
        "",
        "Medians of a run's passes, with the slowest and the fastest; "
        "engines took turns in one process, on the same sequences. *To best dense*: against the fastest engine of "
        "others in the same run, of the same dtype or a wider one, median of the passes' ratios. *Memory*: resident, "
        "after building and one batch, with "
        "the peak on the way. *Outputs*: largest difference from transformers in float32, relative to the largest "
        "output; the pruned engine's from the pruned model. *Realised fraction*: how much faster pruning makes the "
        "engine, ÷ 1/relative FLOPs.",
        "",
        *(f"- {name}: {settings}." for name, settings in about["settings"].items()),
        "",
        *summary(result),
        "",
        *(["```bash", *commands, "```", ""] if commands else []),
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
                "| dtype | engine | sequences/s (slowest – fastest) | to best dense | memory (peak), MiB | outputs |",
                "|---|---|---|---|---|---|",
            ]
        else:
            lines.pop()  # the table goes on
        notes = result_notes(done)
        lines += [table_row(done, name) for name in done["engines"]]
        lines += [f"| {done['dtype']} | {name} | left out: {why} | | | |" for name, why in done["left_out"].items()]
        if notes:
            lines.append(f"| {done['dtype']} | *pruning* | {notes} | | | |")
        kernels = kernels_of(done)
        if kernels:
            lines.append(f"| {done['dtype']} | *kernels* | {kernels} | | | |")
        if done.get("versions", about["versions"]) != about["versions"]:
            lines.append(f"| {done['dtype']} | *with* | {installed(done['versions'])} | | | |")
        lines.append("")
    return "\n".join(lines)


def kernels_of(done: Mapping[str, Any]) -> str:
    """Which of this package's kernels ran, in the engine's words."""
    said = next((done["explained"][name] for name in (UNPRUNED, PRUNED) if name in done["explained"]), "")
    start = "kernels: "
    return next((line.removeprefix(start) for line in said.splitlines() if line.startswith(start)), "")


def installed(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def summary(result: dict[str, Any]) -> list[str]:
    """A line per run: the best dense engine of others, and this package's."""
    machine = result["about"]["machine"]
    lines = [
        "| workload | dtype | threads | best dense engine of others, sequences/s | unpruned engine | pruned engine | "
        "relative FLOPs | realised fraction | machine |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for done in result["runs"]:
        if not done["best_dense"]:
            continue

        def speed(name: str, done: dict[str, Any] = done) -> str:
            row = done["engines"].get(name)
            if row is None:
                return ""
            ratio = row["to_best_dense"]
            slower = f", SLOWER than {done['best_dense']}" if name == PRUNED and ratio["median"] < 1 else ""
            return f"{speeds(row)}, **{ratio['median']:.2f}×** ({ratio['lowest']:.2f} – {ratio['highest']:.2f}){slower}"

        fraction = f"{done['realised_fraction']:.2f}" if "realised_fraction" in done else ""
        cells = (
            done["workload"],
            done["dtype"],
            str(done["threads"]),
            f"{done['best_dense']} {speeds(done['engines'][done['best_dense']])}",
            speed(UNPRUNED),
            speed(PRUNED),
            f"{done['relative_flops']:.2f}",
            fraction,
            machine,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def speeds(row: Mapping[str, Any]) -> str:
    speed = row["sequences_per_second"]
    return f"{speed['median']:.1f} ({speed['lowest']:.1f} – {speed['highest']:.1f})"


def table_row(done: dict[str, Any], name: str) -> str:
    row = done["engines"][name]
    ratio, used, multiple = row.get("to_best_dense"), row.get("memory_mib"), row["width_multiple"]
    own = name in (UNPRUNED, PRUNED)
    peer = name.removesuffix(f", {row.get('dtype')}")
    form = PEERS[peer].forms[row["dtype"]][row["form"]].about if "form" in row and not own else ""
    size = row.get("batch_size", done["batch_size"])
    cells = (
        done["dtype"],
        label(name, form)
        + (f", batches of {size}" if size != done["batch_size"] else "")
        + (f", widths padded to {multiple}s" if multiple > 1 else ""),
        speeds(row),
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
    looks = dict(zip([PRUNED, UNPRUNED, *PEERS], ("C3o", "C0o", "C7x", "C7+", "C7v", "C7s", "C7^"), strict=True))
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
    axes.set_title(f"{about['cpu']} ({about['machine']})", fontsize="small", loc="left")
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
    parser.add_argument(
        "--workload", action="append", choices=WORKLOADS, help="may be repeated (default: all but trials)"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=list(PEERS), help="dense engines to compare with (default: all)"
    )
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--checkpoints", type=Path, help="folder with TASK/hard, for the workloads with real weights")
    parser.add_argument("--data-dir", type=Path, help="folder in the official GLUE layout, for the same")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave memory out")
    parser.add_argument(
        "--output", type=Path, help="write OUTPUT.json, .md and .png (default: results/cpu/MACHINE/engines)"
    )
    parser.add_argument(
        "--add", action="store_true", help="keep the runs that OUTPUT.json has and this command has not"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="as --add; and leave out those measured with as many passes and the same versions",
    )
    arguments = parser.parse_args()
    if arguments.passes < 1 or min(arguments.threads) < 1:
        parser.error("--passes and --threads must be at least 1")
    if arguments.output is None:
        arguments.output = RESULTS / this_machine()["machine"] / "engines"
    return arguments


def this_command(arguments: argparse.Namespace) -> str:
    return command({"RUNS": arguments.checkpoints, "GLUE": arguments.data_dir, "OUTPUT": arguments.output})


def earlier_runs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What OUTPUT.json has that is to stay."""
    path = json_path(arguments.output)
    if not path.exists():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    refuse_others(earlier["about"], path)
    runs: list[dict[str, Any]] = earlier["runs"] if arguments.add or arguments.resume else []
    return runs


def is_done(runs: Sequence[Mapping[str, Any]], workload: str, threads: int, dtype: str, passes: int) -> bool:
    """Whether a run was measured with as many passes and the same versions."""
    return any(
        (run["workload"], run["threads"], run["dtype"]) == (workload, threads, dtype)
        and run["passes"] >= passes
        and run.get("versions") == versions()
        for run in runs
    )


def wider_best(
    runs: Sequence[Mapping[str, Any]], workload: str, threads: int, dtype: str, peers: Sequence[str]
) -> list[tuple[str, str]]:
    """The fastest dense engine of every wider dtype, from the runs that were measured."""
    found = []
    for run in runs:
        if (run["workload"], run["threads"]) == (workload, threads):
            own = [name for name in run["engines"] if name in peers]
            if own and DTYPES.index(run["dtype"]) < DTYPES.index(dtype):
                best = max(own, key=lambda name: run["engines"][name]["sequences_per_second"]["median"])
                found.append((best, run["dtype"]))
    return found


def main() -> None:
    arguments = parse_arguments()
    result: dict[str, Any] = {
        "about": {
            **this_machine(),
            "processors": os.cpu_count(),
            "versions": versions(),
            "settings": {name: PEERS[name].settings for name in arguments.peers},
        },
        "runs": earlier_runs(arguments),
    }
    runs, skipped = result["runs"], []
    for workload in arguments.workload or [name for name in WORKLOADS if not name.startswith("trial")]:
        wanted = [
            (threads, dtype)
            for threads in arguments.threads
            for dtype in DTYPES
            if dtype in arguments.dtypes
            and not (arguments.resume and is_done(runs, workload, threads, dtype, arguments.passes))
        ]
        if not wanted:
            continue
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
            for threads, dtype in wanted:
                print(f"{workload}, {count(threads, 'thread')}, {dtype}", file=sys.stderr, flush=True)
                wider = wider_best(runs, workload, threads, dtype, arguments.peers)
                put(runs, run(workload, made, dtype, threads, wider, arguments))
                write(result, arguments.output)
    if not runs:
        raise tp.DataError(skipped[-1])
    print(markdown(result))
    if arguments.output.parent.parent == RESULTS:
        write_index(RESULTS)


if __name__ == "__main__":
    try:
        main()
    except tp.TokenPruningError as error:
        sys.exit(f"error: {error}")
