"""Answers in a text and named entities: heads that read every token, so that each token that leaves may be missed.

    python benchmarks/spans.py --data DATA --model FOLDER --threads 1 --output results/spans/quality

The model is all-MiniLM-L6-v2 with a head for each task (span_tasks.py), fine-tuned here. It stands beside itself after
more epochs; pruned by ``calibrate`` alone; pruned so and then trained for as many more epochs, thresholds and probes
fitted to the budget again and again; pruned by top-k and trained alike; truncated; and its first three layers alone,
trained for as many epochs as all. Losses are against the dense model that has the better first score, intervals of
2,000 bootstrap samples of questions or sentences, the same for both. Every run is kept in FOLDER as it ends: the same
command goes on after it was killed.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comparison
import numpy as np
import torch
from comparison import Rows
from numpy.typing import NDArray
from span_tasks import Answers, Row, Tagging, read_answers, read_tagging
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoTokenizer, Trainer, TrainingArguments, set_seed

import token_pruning as tp
from token_pruning.budget.examples import as_batch
from token_pruning.budget.holding import CalibratedHolder
from token_pruning.engine.machine import has_amx
from token_pruning.families import shape_of
from token_pruning.lab.data import find_minilm
from token_pruning.runtime.flops import relative_flops

READERS: dict[str, Callable[[Path, Any], Answers | Tagging]] = {"answers": read_answers, "tagging": read_tagging}
EPOCHS = {"answers": (2, 1), "tagging": (3, 1)}  # of the dense model, and what every trained model gets besides
LEARNING_RATE, BATCH_SIZE, WARM_UP = 2e-4, 16, 0.1
DENSE, LONGER = "dense", "dense, trained on"
DONE = "done"

Found = tuple[float, NDArray[np.float64]]
"""Relative FLOPs and an outcome."""


# Training


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """A padded batch; padding has no label."""
    found = {}
    for name, value in rows[0].items():
        if isinstance(value, int):
            found[name] = torch.tensor([row[name] for row in rows])
        else:
            padding = -100 if name == "labels" else 0
            found[name] = pad_sequence([torch.tensor(row[name]) for row in rows], True, padding)
    return found


def start(task: Answers | Tagging, seed: int, **settings: Any) -> Any:
    """all-MiniLM-L6-v2 with an untrained head; ``settings`` are of its config.

    Attention has no dropout: on a CPU that takes longer than all else.
    """
    set_seed(seed)
    settings["attention_probs_dropout_prob"] = 0.0
    return task.head.from_pretrained(find_minilm(), num_labels=task.labels, **settings)


def fine_tune(model: Any, task: Answers | Tagging, epochs: float, seed: int, callbacks: Sequence[Any] = ()) -> Any:
    """AdamW, the learning rate rising for a tenth of the steps and then falling; texts of a batch are about as long."""
    with tempfile.TemporaryDirectory(prefix="token-pruning-") as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            warmup_steps=WARM_UP,
            train_sampling_strategy="group_by_length",
            bf16=has_amx(),
            seed=seed,
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to="none",
        )
        Trainer(model, arguments, collate, task.training, callbacks=list(callbacks)).train()
    return model.eval()


def kept(folder: Path, make: Callable[[], Any], load: Callable[[Path], Any]) -> Any:
    """What was made in an earlier run, or now."""
    if not (folder / DONE).exists():
        make().save_pretrained(folder)
        (folder / DONE).touch()
    return load(folder)


class Holder(CalibratedHolder):
    """Holds a budget; thirty refits would take as long as so short a training."""

    refits = 10


# Runs


def dense_model(task: Answers | Tagging, here: Path, seed: int, *, longer: bool = False) -> Any:
    """The dense one after its epochs, or after those that the others get besides."""
    first, more = EPOCHS[task.name]

    def make() -> Any:
        if longer:
            return fine_tune(dense_model(task, here, seed), task, more, seed + 1)
        return fine_tune(start(task, seed), task, first, seed)

    return kept(here / (LONGER if longer else DENSE), make, task.head.from_pretrained)


def calibrated(task: Answers | Tagging, here: Path, seed: int, budget: float) -> Any:
    def make() -> Any:
        model = dense_model(task, here, seed)
        found = tp.calibrate(model, inputs_of(task.held_out), target_flops=budget)
        print(f"{task.name}, seed {seed}, {budget}: {found.chosen.rule}", flush=True)
        return model

    return kept(here / f"calibrated-{budget}", make, tp.from_pretrained)


def trained(task: Answers | Tagging, here: Path, seed: int, budget: float) -> Any:
    """The calibrated model after further epochs, held at its budget."""
    model, dense = calibrated(task, here, seed, budget), dense_model(task, here, seed)
    batch = as_batch(inputs_of(task.held_out), 0)
    holder = Holder(model, dense, batch, budget, has_amx())
    fine_tune(model, task, EPOCHS[task.name][1], seed + 1, [holder])
    holder.finish(model)
    return model


def topk(task: Answers | Tagging, here: Path, seed: int, budget: float) -> Any:
    """Top-k after as many epochs, at the rate that costs the budget on the held-out texts."""
    model = dense_model(task, here, seed)
    tp.prune(model, topk_for(model.config, [len(row["input_ids"]) for row in task.held_out], budget))
    return fine_tune(model, task, EPOCHS[task.name][1], seed + 1)


def topk_for(config: Any, lengths: Sequence[int], budget: float) -> tp.TopK:
    """Its first three layers keep all above 0.6 of the FLOPs, below it only the first."""
    shape, counts, low, high = shape_of(config), torch.tensor(lengths), -6.0, 1.0
    for _ in range(30):
        method = tp.TopK(token_keep_rate=(low + high) / 2, keep_all_layers=3 if budget > 0.6 else 1)
        rates = [1.0, *(method.keep_rate(layer + 1, shape.num_layers) for layer in range(shape.num_layers))]
        left = torch.stack([(counts.double() * rate).round().clamp(min=1) for rate in rates])
        dear = float(relative_flops(shape, counts, left, first_only=False)) > budget
        low, high = (low, method.token_keep_rate) if dear else (method.token_keep_rate, high)
    return method


def shallow(task: Answers | Tagging, seed: int) -> Any:
    layers = shape_of(AutoConfig.from_pretrained(find_minilm())).num_layers // 2
    model = start(task, seed, num_hidden_layers=layers)
    first, more = EPOCHS[task.name]
    return fine_tune(fine_tune(model, task, first, seed), task, more, seed + 1)


# Measuring


def inputs_of(rows: Sequence[Row]) -> list[Row]:
    return [{name: row[name] for name in ("input_ids", "token_type_ids", "attention_mask")} for row in rows]


def measured(model: Any, task: Answers | Tagging, cost: float | None = None) -> Found:
    """In the engine, float32; the cost of a pruned model is counted on the way."""
    fast = tp.compile(model, dtype="float32", threads=torch.get_num_threads())
    logits: list[Tensor] = []

    def run() -> None:
        for place in range(0, len(task.rows), BATCH_SIZE):
            rows = inputs_of(task.rows[place : place + BATCH_SIZE])
            output = fast(**collate(rows))
            found = output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], -1)
            logits.extend(each[: len(row["input_ids"])] for each, row in zip(found, rows, strict=True))

    if cost is None:
        with tp.record(fast) as trace:
            run()
        cost = tp.count_flops(fast, trace).relative
    else:
        run()
    return cost, task.outcome(logits)


def truncated(task: Answers | Tagging, here: Path, seed: int, budget: float) -> Found:
    """The better one of the dense models, contexts cut so that the texts cost about the budget."""
    assert isinstance(task, Answers)
    scores = [task.score(read_run(here, name)[1], task.groups["all"]) for name in (DENSE, LONGER)]
    model = dense_model(task, here, seed, longer=scores[1] > scores[0])
    lengths = [len(row["input_ids"]) for row in task.rows]
    [length] = comparison.truncation_lengths(model.config, lengths, [budget], first_only=False)
    rows, questions = task.cut(length)
    cost = comparison.truncation_cost(model.config, lengths, length, first_only=False)
    return measured(model, replace(task, rows=rows, questions=questions), cost)


def runs(task: Answers | Tagging, here: Path, seed: int, budgets: Sequence[float]) -> Iterator[tuple[str, Any]]:
    """Everything that is measured, each under its name."""
    yield DENSE, lambda: measured(dense_model(task, here, seed), task, 1.0)
    yield LONGER, lambda: measured(dense_model(task, here, seed, longer=True), task, 1.0)
    for budget in budgets:
        yield f"calibrated to {budget}", lambda b=budget: measured(calibrated(task, here, seed, b), task)
        yield f"calibrated to {budget}, then trained", lambda b=budget: measured(trained(task, here, seed, b), task)
        yield f"top-k at {budget}, trained", lambda b=budget: measured(topk(task, here, seed, b), task)
        if isinstance(task, Answers):
            yield f"truncated to {budget}", lambda b=budget: truncated(task, here, seed, b)
    yield "the first half of the layers, trained", lambda: measured(shallow(task, seed), task, 0.5)


def run_of(here: Path, what: str) -> Path:
    return here / f"{what}.json"


def read_run(here: Path, what: str) -> Found:
    found = json.loads(run_of(here, what).read_text(encoding="utf-8"))
    return found["cost"], np.array(found["outcome"])


def table_of(task: Answers | Tagging, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """A table of what has been run so far, means over seeds; None before both dense models of a seed have."""
    rows: list[dict[str, Any]] = []
    folders = {seed: arguments.model / f"{task.name}-seed{seed}" for seed in arguments.seeds}
    items = task.groups["all"]
    for what, _ in runs(task, Path(), 0, arguments.budgets):
        done = {seed: here for seed, here in folders.items() if all(run_of(here, x).exists() for x in (LONGER, what))}
        if not done:
            continue
        found = {name: [read_run(here, name) for here in done.values()] for name in (DENSE, LONGER, what)}
        outcomes = {name: np.stack([outcome for _, outcome in each], axis=1) for name, each in found.items()}
        longer_is_better = task.score(outcomes[LONGER], items) > task.score(outcomes[DENSE], items)
        made = Rows(task, outcomes[LONGER if longer_is_better else DENSE], list(task.groups))
        each = {seed: task.score(outcome[:, None], items) for seed, (_, outcome) in zip(done, found[what], strict=True)}
        made.add(what, float(np.mean([cost for cost, _ in found[what]])), outcomes[what], by_seed=each)
        rows += made.rows
    first, more = EPOCHS[task.name]
    about = (
        f"{task.about} {first} epochs, and {more} more for all but the first row and what was only calibrated. Seeds: "
        f"{', '.join(map(str, arguments.seeds))}."
    )
    return comparison.table(task.title, about, task.measure, rows, arguments) if rows else None


def measure(arguments: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(find_minilm())
    for name in arguments.tasks:
        task = READERS[name](arguments.data, tokenizer)
        for seed in arguments.seeds:
            here = arguments.model / f"{name}-seed{seed}"
            here.mkdir(parents=True, exist_ok=True)
            for what, run in runs(task, here, seed, arguments.budgets):
                path, started = run_of(here, what), time.perf_counter()
                if path.exists():
                    continue
                cost, outcome = run()
                seconds = time.perf_counter() - started
                path.write_text(json.dumps({"cost": cost, "seconds": seconds, "outcome": outcome.tolist()}))
                score = task.score(outcome[:, None], task.groups["all"])
                print(f"{name}, seed {seed}, {what}: {score:.2f} at {cost:.3f}, {seconds:.0f} s", flush=True)
                if found := table_of(task, arguments):
                    comparison.publish(found, arguments, comparison.quality_lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(command="measure", add=True)  # tables of other tasks stay
    parser.add_argument("--data", type=Path, required=True, help="folder with squad2 and wnut17")
    parser.add_argument(
        "--model",
        type=Path,
        default=Path(tempfile.gettempdir()) / "token-pruning" / "spans",
        help="where runs are kept (default: %(default)s)",
    )
    parser.add_argument("--tasks", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.6, 0.45], help="relative FLOPs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the training")
    comparison.add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    comparison.carry_out(parse_arguments(), {"measure": measure})
