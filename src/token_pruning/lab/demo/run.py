"""The whole workflow on a task that any machine can build: which standard-library module is a docstring from?"""

import io
import json
import logging
import math
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

from token_pruning.checkpoint import from_pretrained, load_model, read_checkpoint
from token_pruning.engine.machine import cpu_name, has_amx
from token_pruning.errors import ConfigError
from token_pruning.lab.data import TaskData, find_minilm, load_docstrings
from token_pruning.lab.demo.options import DemoOptions
from token_pruning.lab.demo.sizing import (
    BATCH_SIZE,
    EPOCHS,
    PASSES,
    Pace,
    Size,
    choose_size,
    describe,
    duration,
    sized,
    stratified,
)
from token_pruning.lab.evaluation import predict
from token_pruning.lab.files import write_json
from token_pruning.lab.report.page import write_report
from token_pruning.lab.training.features import collator, tokenize
from token_pruning.lab.training.options import TrainOptions
from token_pruning.lab.training.plan import training_examples
from token_pruning.lab.training.run_dir import RunDir, held
from token_pruning.lab.training.train import train
from token_pruning.runtime.explanation import explain_tokens

_METRIC = "accuracy"
_SAMPLES = 4
_WARM_UP_STEPS, _TIMED_STEPS = 2, 5
_SIZE_FILE = "size.json"


@dataclass(frozen=True)
class _Stage:
    name: str
    options: dict[str, Any]


_STAGES = (
    _Stage("dense", {"masking_mode": "none", "lr": 2e-4}),
    _Stage(
        "soft",
        {
            "masking_mode": "soft",
            "lr": 5e-5,
            "regularization": 0.06,
            "load_best": False,
            "pruning": {"prune_mode": "absolute_threshold", "final_token_threshold": 0.01, "scoring_mode": "mean"},
        },
    ),
    _Stage("hard", {"masking_mode": "hard", "lr": 1e-4}),
)
_LR_THRESHOLD, _STEPS_OF_LR_THRESHOLD = 2e-4, 335  # with fewer steps thresholds take larger ones, to get as far
_HIGHEST_LR_THRESHOLD = 1e-3


def run_demo(options: DemoOptions) -> Path:
    """Dense fine-tuning, soft stage, hard stage, evaluation; a table on the screen and a report.

    How many texts are used depends on how fast this machine trains. Stages that are complete in the output folder are
    not run again, and one that was interrupted continues, on the texts chosen first.

    Returns:
        The report's path; beside it lie the checkpoints and ``results.json``.

    Raises:
        TokenPruningError: if the model cannot be found or the output folder holds something else.
    """
    with held(options.output_dir):
        try:
            return _demo(options)
        except KeyboardInterrupt as stop:
            if (options.output_dir / _SIZE_FILE).exists():
                stop.__notes__ = ["the same command continues"]
            raise


def _demo(options: DemoOptions) -> Path:
    output_dir = options.output_dir
    start = str(find_minilm(options.hub))
    print("building the task from the standard library's docstrings …")
    everything = load_docstrings()
    bf16 = has_amx() or torch.cuda.is_available()
    size = _size(output_dir / _SIZE_FILE, start, everything, bf16=bf16)
    data = sized(everything, size)
    print(describe(size, len(training_examples(everything))))
    checkpoints: dict[str, Path] = {}
    pace = Pace(size)
    for number, stage in enumerate(_STAGES, start=1):
        run = _train_options(stage, start, output_dir, size, bf16=bf16)
        print(f"\n== {number} of {len(_STAGES)}: {stage.name} stage; about {duration(pace.left(stage.name))} left")
        checkpoints[stage.name] = output_dir / stage.name
        if RunDir(checkpoints[stage.name]).finished(run.identity()):
            print(f"complete in {run.output_dir}")
        else:
            began = time.monotonic()
            train(run, lambda _: data)
            pace.took(stage.name, time.monotonic() - began)
        start = str(checkpoints[stage.name])
    print(f"\n== the three models side by side; about {duration(pace.left())} left")
    results = _results(checkpoints, data, bf16=bf16)
    write_json(output_dir / "results.json", results)
    report = write_report(results, output_dir / "report.html")
    print("\n" + _table(results["stages"]))
    print(f"\nreport: {report}")
    return report


def _train_options(stage: _Stage, restore: str, output_dir: Path, size: Size, *, bf16: bool) -> TrainOptions:
    more: dict[str, Any] = {}
    if stage.name == "soft":
        steps = math.ceil(size.train_texts / BATCH_SIZE) * size.epochs["soft"]
        more["lr_threshold"] = min(_HIGHEST_LR_THRESHOLD, _LR_THRESHOLD * max(1.0, _STEPS_OF_LR_THRESHOLD / steps))
    return TrainOptions(
        restore=restore,
        task="docstrings",
        output_dir=str(output_dir / stage.name),
        batch_size=BATCH_SIZE,
        bf16=bf16,
        epochs=size.epochs[stage.name],
        **stage.options,
        **more,
    )


def _size(file: Path, start: str, data: TaskData, *, bf16: bool) -> Size:
    """The size chosen by an earlier run in this folder, or for this machine.

    Raises:
        ConfigError: if the file cannot be read.
    """
    if file.exists():
        try:
            return Size(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{file} cannot be read: {error}; delete it, or give another --output-dir") from None
    print("timing a few training steps …")
    seconds = step_seconds(start, data, bf16=bf16)
    examples, validation = training_examples(data), data.validation["validation"]
    size = choose_size(seconds, len(examples), len(validation))
    write_json(file, asdict(size))
    return size


class _Timed(Exception):
    """Enough steps were taken."""


class _StepTimes(TrainerCallback):  # type: ignore[misc]
    """Ends a run after the steps to be timed, with their times."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) == _WARM_UP_STEPS + _TIMED_STEPS:
            raise _Timed


def step_seconds(start: str, data: TaskData, *, bf16: bool) -> float:
    """The seconds of a dense training step on this machine, the median of a few after the first ones."""
    few = stratified(training_examples(data).labels or (), (_WARM_UP_STEPS + _TIMED_STEPS) * BATCH_SIZE)
    texts = replace(data, train=training_examples(data).select(few))
    times = _StepTimes()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        whole = Size(len(few), 0, EPOCHS, 0.0)
        options = _train_options(_STAGES[0], start, Path(folder), whole, bf16=bf16)
        logging.disable(logging.WARNING)  # that a new head is trained is said when it is
        try:
            train(options, lambda _: texts, callbacks=[times])
        except _Timed:
            pass
        finally:
            logging.disable(logging.NOTSET)
    return statistics.median(after - before for before, after in pairwise(times.ends[_WARM_UP_STEPS - 1 :]))


def _results(checkpoints: dict[str, Path], data: TaskData, *, bf16: bool) -> dict[str, Any]:
    """Everything the report shows; dense and pruned models are timed in turn, in one run."""
    examples = data.validation["validation"]
    folder = checkpoints["dense"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # nosec B615  # a folder
    models = {
        "dense": load_model(read_checkpoint(folder)),
        "soft": from_pretrained(checkpoints["soft"]),
        "hard": from_pretrained(checkpoints["hard"]),
    }
    features = tokenize(tokenizer, examples, models["dense"], 128)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(PASSES + 1):
        for name, model in models.items():
            took = predict(model, features, collator(tokenizer, False), batch_size=BATCH_SIZE, progress=True).seconds
            if turn:  # the first pass warms up
                seconds[name].append(took)

    stages = []
    for name, folder in checkpoints.items():
        evaluation = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
        keys = ("metrics", "gflops_per_example", "relative_flops", "tokens_kept_per_layer", "thresholds")
        stages.append({"name": name, **{key: evaluation[key] for key in keys}})
        stages[-1]["seconds"] = statistics.median(seconds[name])
        stages[-1]["times"] = {"Seconds": stages[-1]["seconds"]}
        entering = evaluation["tokens_entering"]
    dense, *_, hard = stages
    return {
        "title": "all-MiniLM-L6-v2 on Python's docstrings",
        "summary": (
            f"Which of {data.task.num_labels} standard-library modules is a docstring from? A dense model was fine-"
            "tuned, then thresholds were learned with the weights (soft stage), then tokens below them were removed "
            f"and the weights fine-tuned again (hard stage). Accuracy went from {dense['metrics'][_METRIC]:.1%} to "
            f"{hard['metrics'][_METRIC]:.1%} with {hard['relative_flops']:.0%} of the arithmetic, and "
            f"{len(examples)} texts take {hard['seconds']:.2f} s instead of {dense['seconds']:.2f} s. (The pruned "
            "model was trained for more epochs, which helps it too.)"
        ),
        "environment": {
            "CPU": cpu_name(),
            "threads": torch.get_num_threads(),
            "training": "bfloat16 autocast" if bf16 else "float32",
            "batch size": BATCH_SIZE,
            "seconds": f"float32, batches sorted by length, median of {PASSES} passes, models taking turns",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "metric": _METRIC,
        "note": "“Padded” is the dense model with every text padded to the maximum length, for orientation only.",
        "stages": stages,
        "tokens_entering": entering,
        "curve": [
            {
                "label": stage["name"],
                "relative_flops": stage["relative_flops"],
                "metric": stage["metrics"][_METRIC],
                "kind": "dense" if stage["name"] == "dense" else "learned",
            }
            for stage in stages
        ],
        "samples": _samples(models["hard"], tokenizer, data),
        "num_layers": len(hard["tokens_kept_per_layer"]),
    }


def _samples(model: Any, tokenizer: Any, data: TaskData) -> list[dict[str, Any]]:
    """Which tokens of a few texts of middling length survive to which layer."""
    examples = data.validation["validation"]
    labels = data.task.labels or ()
    chosen = [i for i, text in enumerate(examples.first) if 25 <= len(text.split()) <= 40][:_SAMPLES]
    samples = []
    for index in chosen:
        batch = tokenizer(examples.first[index], truncation=True, max_length=128, return_tensors="pt")
        with torch.inference_mode():
            prediction = int(model(**batch).logits.argmax())
        explanation = explain_tokens(model, {name: rows[0].tolist() for name, rows in batch.items()}, tokenizer)
        samples.append(
            {
                "tokens": [asdict(token) for token in explanation.tokens],
                "label": labels[int((examples.labels or [])[index])],
                "prediction": labels[prediction],
            }
        )
    return samples


def _table(stages: list[dict[str, Any]]) -> str:
    header = ["", _METRIC, "GFLOPs padded", "dense", "pruned", "relative", "seconds", "speed-up"]
    rows = [header]
    for stage in stages:
        gflops = [f"{stage['gflops_per_example'][kind]:.3f}" for kind in ("padded", "dense", "pruned")]
        speed_up = f"{stages[0]['seconds'] / stage['seconds']:.2f}x"
        relative, seconds = f"{stage['relative_flops']:.3f}", f"{stage['seconds']:.2f}"
        rows.append([stage["name"], f"{stage['metrics'][_METRIC]:.4f}", *gflops, relative, seconds, speed_up])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
