"""This version against another on the clock: evaluation and training steps of models with random weights.

    git worktree add ../other v0.1.0
    python benchmarks/versions.py --against ../other/src --output results/core/versions

Each version runs in a process of its own. The two take turns on the same ragged batches; the first two turns warm up.
Times are CPU seconds of one thread, so that other work on the machine disturbs them little. Pruned models keep all in
the first layer, then fewer tokens in every layer down to none but the first (top-k): about half of the arithmetic.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
MODELS = {"MiniLM classifier": (MINILM, False), "MiniLM tagger": (MINILM, True), "BERT-base classifier": ({}, False)}
TASKS = ("evaluation", "one text at a time", "training step")
DTYPES = ("float32", "bfloat16")
VARIANTS = ("dense", "packed", "pruned")
WARM_UP = 2


def make_model(name: str, variant: str) -> Any:
    import token_pruning as tp  # the version that this process was started with

    sizes, tagger = MODELS[name]
    torch.manual_seed(0)
    auto = transformers.AutoModelForTokenClassification if tagger else transformers.AutoModelForSequenceClassification
    model = auto.from_config(transformers.BertConfig(num_labels=2, **sizes))
    if variant == "packed":
        tp.prune(model, tp.Unpruned())
    if variant == "pruned":
        tp.prune(model, tp.TopK(token_keep_rate=-0.2, keep_all_layers=1))
    return model


def make_batch(size: int, seed: int) -> dict[str, torch.Tensor]:
    """19 to 57 tokens, 38 on average."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(19, 58, (size,), generator=generator)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return {"input_ids": torch.randint(5, 30000, mask.shape, generator=generator) * mask, "attention_mask": mask}


def workload(name: str, task: str, dtype: str, variant: str) -> Callable[[int], float]:
    """From a turn's number to CPU seconds."""
    model = make_model(name, variant)
    training, half = task == "training step", dtype == "bfloat16"
    model.train(training)
    if half and not training:
        model.to(torch.bfloat16)

    def run(turn: int) -> float:
        count = 8 if task == "one text at a time" else 1
        batches = [make_batch(1 if count > 1 else 32, 100 * turn + number) for number in range(count)]
        if training:
            shape = batches[0]["input_ids"].shape if "tagger" in name else (32,)
            batches[0]["labels"] = torch.zeros(shape, dtype=torch.long)
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=training and half), torch.set_grad_enabled(training):
            for batch in batches:
                output = model(**batch)
                if training:
                    output.loss.backward()
        return (time.process_time() - started) / count

    return run


def serve() -> None:
    """Answer a line with a workload and a turn with the seconds it took."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    runs: dict[str, Callable[[int], float]] = {}
    for line in sys.stdin:
        key, turn = line.rstrip("\n").rsplit("|", 1)
        if key not in runs:
            runs.clear()
            runs[key] = workload(*key.split("|"))
        print(runs[key](int(turn)), flush=True)


class Version:
    """A process with one of the two."""

    def __init__(self, source: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(source.resolve())}
        command = [sys.executable, __file__, "--serve"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)  # type: ignore[call-overload]

    def ask(self, key: str, turn: int) -> float:
        self.process.stdin.write(f"{key}|{turn}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="the other version's src folder")
    parser.add_argument("--output", type=Path, default=Path("versions"))
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return

    from output import spread, write

    from token_pruning.engine.machine import cpu_name
    from token_pruning.lab.tables import table

    other, this = Version(arguments.against), Version(Path(__file__).parents[1] / "src")
    rows: list[dict[str, Any]] = []
    for key in [
        f"{name}|{task}|{dtype}|{variant}"
        for name in arguments.models for task in TASKS for dtype in DTYPES for variant in VARIANTS
    ]:  # fmt: skip
        before, after = [], []
        for turn in range(WARM_UP + arguments.turns):
            for version, seconds in [(other, before), (this, after)][:: 1 if turn % 2 else -1]:
                took = version.ask(key, turn)
                if turn >= WARM_UP:
                    seconds.append(took)
        ratio = statistics.median(b / a for a, b in zip(before, after, strict=True))
        names = dict(zip(("model", "task", "dtype", "variant"), key.split("|"), strict=True))
        rows.append({**names, "before": spread(before), "after": spread(after), "ratio": ratio})
        print(f"{key}: {ratio:.3f}", flush=True)
    cells = [
        [
            row["model"], row["task"], row["dtype"], row["variant"], f"{1000 * row['before']['median']:.1f}",
            f"{1000 * row['after']['median']:.1f}", f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    header = ["model", "task", "dtype", "variant", "other version, ms", "this version, ms", "this ÷ other"]
    text = table(header, cells) + f"\n\n{cpu_name()}, one thread, torch {torch.__version__}; medians of CPU time.\n"
    write({"cpu": cpu_name(), "torch": torch.__version__, "rows": rows}, text, arguments.output)


if __name__ == "__main__":
    main()
