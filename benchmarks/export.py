"""Seconds of a call in ONNX Runtime and OpenVINO: the exported pruned graph beside the exported dense model, float32.

    python benchmarks/export.py
    python benchmarks/export.py --shapes minilm-l6 --threads 2 --passes 30
    python benchmarks/export.py --quick

Models have random weights and thresholds that cost 0.55 of the FLOPs. Every text has the same number of tokens, drawn
anew for every pass, so that the pruned graph meets numbers of rows that it has not met. The dense model takes part in
every form of peers.py, and is as fast as its fastest one. Engines take turns (A B C A B C), all on the same
batch; a ratio is the median of the passes' ratios. Figures go to results/export/MACHINE.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from hardware import this_machine
from output import command, spread, write
from peers import PEERS, Call, Form, Model, prepare, versions
from random_weights import final_keep_for, linear_thresholds, make_model
from torch import Tensor
from workloads import LENGTHS, Lengths, Sequences, Workload

import token_pruning as tp

RESULTS = Path(__file__).parents[1] / "results" / "export"
TARGET_FLOPS = 0.55
FILES = {"ONNX Runtime": "pruned.onnx", "OpenVINO": "pruned.xml"}
WARM = 3  # passes that are not counted


def make(shape: str, tokens: int, folder: Path) -> tuple[Model, Sequences, dict[str, Any]]:
    """A pruned checkpoint, its exported graphs, and what they cost and give."""
    LENGTHS["equal"] = Lengths(tokens, tokens)
    model = make_model(shape)
    final_keep = final_keep_for(TARGET_FLOPS, model.config, [tokens], first_only=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (16, tokens), generator=generator)
    batch = batch_of(ids, model.config.type_vocab_size > 1)
    tp.prune(model, linear_thresholds(model, batch, final_keep))
    with torch.inference_mode(), tp.record(model) as trace:
        expected = model(**batch).logits
    model.save_pretrained(folder / "checkpoint")
    for file in FILES.values():
        tp.export(model, folder / file)
    made = Model(folder / "checkpoint", folder, ("input_ids", "attention_mask"))
    sequences = Sequences(Workload(16, shape, "equal"), made.checkpoint, None)
    found = {
        "relative_flops": tp.count_flops(model, trace).relative,
        "kept": (trace.ffn_lengths.double().mean(1) / tokens).tolist(),
        "batch": batch,
        "expected": expected,
    }
    return made, sequences, found


def batch_of(ids: Tensor, token_types: bool) -> dict[str, Tensor]:
    """Texts without padding, as graphs take them."""
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | ({"token_type_ids": torch.zeros_like(ids)} if token_types else {})


def engines(runtime: str, made: Model, names: tuple[str, ...], sequences: Sequences, threads: int) -> dict[str, Call]:
    """The pruned graph, whose inputs have these names, and every form of the dense model."""
    failed = prepare(runtime, "float32", made, sequences)
    forms = PEERS[runtime].forms["float32"]
    calls = {
        f"dense, {form.about or 'as exported'}": PEERS[runtime].build(made, form, "float32", threads)
        for place, form in enumerate(forms)
        if place not in failed
    }
    if not calls:
        raise tp.TokenPruningError(f"{runtime} has no dense model: {next(iter(failed.values()))}")
    options = dict(forms[0].options or {})
    exported = replace(made, names=names)
    calls["pruned"] = PEERS[runtime].build(exported, Form(file=FILES[runtime], options=options), "float32", threads)
    return calls


def measure(
    calls: dict[str, Call], vocabulary: int, token_types: bool, batch_size: int, tokens: int, passes: int
) -> dict[str, Any]:
    """Seconds of every engine in every pass, and how many times as fast the pruned one is as the fastest dense one."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-WARM, passes):
        generator = torch.Generator().manual_seed(number + WARM)
        batch = batch_of(torch.randint(3, vocabulary, (batch_size, tokens), generator=generator), token_types)
        for name, call in calls.items():
            began = time.perf_counter()
            call(batch)
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    best = min((name for name in calls if name != "pruned"), key=lambda name: statistics.median(seconds[name]))
    ratios = [dense / pruned for dense, pruned in zip(seconds[best], seconds["pruned"], strict=True)]
    return {"seconds": seconds, "fastest_dense": best, "times_as_fast": spread(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["minilm-l6", "base"], help="keys of random_weights.SHAPES")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a tiny model and two passes, to try the script out")
    parser.add_argument("--output", type=Path, help="default: results/export/MACHINE")
    options = parser.parse_args()
    if options.quick:
        options.shapes, options.tokens, options.passes = ["tiny"], 40, 2
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    about = this_machine()
    rows = []
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as folder:
            made, sequences, found = make(shape, options.tokens, Path(folder))
            batch, expected = found.pop("batch"), found.pop("expected")
            for runtime in FILES:
                calls = engines(runtime, made, tuple(batch), sequences, options.threads)
                off = float((calls["pruned"](batch) - expected).abs().max())
                for size in options.batch_sizes:
                    shown = sequences.vocabulary, "token_type_ids" in batch, size, options.tokens, options.passes
                    figures = measure(calls, *shown)
                    rows.append(
                        {"shape": shape, "runtime": runtime, "batch_size": size, "off": off, **found, **figures}
                    )
                    print(line(rows[-1]), flush=True)
    result = {
        **about,
        "threads": options.threads,
        "tokens": options.tokens,
        "passes": options.passes,
        "command": command({}),
        "versions": versions(),
        "rows": rows,
    }
    write(result, page(result), options.output or RESULTS / about["machine"] / "export")


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    median = {name: statistics.median(values) * 1000 for name, values in row["seconds"].items()}
    times = row["times_as_fast"]
    cells = [
        row["shape"],
        row["runtime"],
        str(row["batch_size"]),
        f"{median[row['fastest_dense']]:.1f} ({row['fastest_dense'].removeprefix('dense, ')})",
        f"{median['pruned']:.1f}",
        f"{times['median']:.2f} ({times['lowest']:.2f} – {times['highest']:.2f})",
        f"{row['relative_flops']:.2f}",
        f"{row['off']:.0e}",
    ]
    return f"| {' | '.join(cells)} |"


def page(result: dict[str, Any]) -> str:
    """All for a reader."""
    header = (
        "shape",
        "runtime",
        "batch size",
        "dense, ms",
        "pruned, ms",
        "times as fast",
        "relative FLOPs",
        "logits off by",
    )
    return "\n".join(
        [
            "# Exported graphs",
            "",
            f"{result['cpu']}, float32, {result['threads']} thread(s), texts of {result['tokens']} tokens each; "
            f"medians of {result['passes']} passes in turn, ratios with the lowest and the highest. Random weights, "
            f"thresholds for {TARGET_FLOPS} of the FLOPs. The dense model is exported in the forms of "
            "`benchmarks/peers.py`; its fastest one counts.",
            "",
            f"| {' | '.join(header)} |",
            "|" + "---|" * len(header),
            *map(line, result["rows"]),
            "",
            "```bash",
            result["command"],
            "```",
            "",
        ]
    )


if __name__ == "__main__":
    main()
