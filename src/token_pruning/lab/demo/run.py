"""The whole workflow on a task that any machine can build: which standard-library module is a docstring from?"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from token_pruning.checkpoint import from_pretrained
from token_pruning.engine.machine import cpu_name, has_amx
from token_pruning.lab.data import TaskData, find_minilm, load_docstrings
from token_pruning.lab.demo.options import DemoOptions
from token_pruning.lab.evaluation import predict
from token_pruning.lab.files import write_json
from token_pruning.lab.report import write_report
from token_pruning.lab.training.features import collator, tokenize
from token_pruning.lab.training.options import TrainOptions
from token_pruning.lab.training.run_dir import RunDir
from token_pruning.lab.training.train import train
from token_pruning.runtime.prune import record

_METRIC = "accuracy"
_SAMPLES = 4
_PASSES = 3  # timed passes of each model, interleaved


@dataclass(frozen=True)
class _Stage:
    name: str
    folder: str
    options: dict[str, Any]


_STAGES = (
    _Stage("dense", "dense", {"masking_mode": "none", "lr": 2e-4, "epochs": 3}),
    _Stage(
        "soft",
        "soft",
        {
            "masking_mode": "soft",
            "lr": 5e-5,
            "epochs": 2,
            "lr_threshold": 2e-4,
            "regularization": 0.06,
            "load_best": False,
            "pruning": {"prune_mode": "absolute_threshold", "final_token_threshold": 0.01, "scoring_mode": "mean"},
        },
    ),
    _Stage("hard", "hard", {"masking_mode": "hard", "lr": 1e-4, "epochs": 1}),
)


def run_demo(options: DemoOptions) -> Path:
    """Dense fine-tuning, soft stage, hard stage, evaluation; a table on the screen and a report.

    Stages that are complete in the output folder are not run again, and one that was interrupted continues.

    Returns:
        The report's path; beside it lie the checkpoints and ``results.json``.

    Raises:
        TokenPruningError: if the model cannot be found or the output folder holds something else.
    """
    output_dir = options.output_dir
    start = str(find_minilm(options.hub))
    print("building the task from the standard library's docstrings …")
    data = load_docstrings()
    bf16 = has_amx() or torch.cuda.is_available()
    checkpoints: dict[str, Path] = {}
    for number, stage in enumerate(_STAGES, start=1):
        restore = start if stage.name == "dense" else str(checkpoints[_STAGES[number - 2].name])
        run = TrainOptions(
            restore=restore,
            task="docstrings",
            output_dir=str(output_dir / stage.folder),
            batch_size=32,
            bf16=bf16,
            **stage.options,
        )
        print(f"\n== {number} of {len(_STAGES)}: {stage.name} stage")
        if RunDir(Path(run.output_dir or "")).finished(run.identity()):
            print(f"complete in {run.output_dir}")
            checkpoints[stage.name] = Path(run.output_dir or "")
        else:
            checkpoints[stage.name] = train(run, lambda _: data)
    results = _results(checkpoints, data, bf16=bf16)
    write_json(output_dir / "results.json", results)
    report = write_report(results, output_dir / "report.html")
    print("\n" + _table(results["stages"]))
    print(f"\nreport: {report}")
    return report


def _results(checkpoints: dict[str, Path], data: TaskData, *, bf16: bool) -> dict[str, Any]:
    """Everything the report shows; dense and pruned models are timed in turn, in one run."""
    examples = data.validation["validation"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints["dense"])
    models = {
        "dense": transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints["dense"]),
        "soft": from_pretrained(checkpoints["soft"]),
        "hard": from_pretrained(checkpoints["hard"]),
    }
    features = tokenize(tokenizer, examples, models["dense"], 128)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(_PASSES + 1):
        for name, model in models.items():
            took = predict(model, features, collator(tokenizer, False), batch_size=32, progress=True).seconds
            if turn:  # the first pass warms up
                seconds[name].append(took)

    stages = []
    for name, folder in checkpoints.items():
        evaluation = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
        keys = ("metrics", "gflops_per_example", "relative_flops", "tokens_kept_per_layer", "thresholds")
        stages.append({"name": name, **{key: evaluation[key] for key in keys}})
        stages[-1]["seconds"] = statistics.median(seconds[name])
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
            "batch size": 32,
            "seconds": f"float32, batches sorted by length, median of {_PASSES} passes, models taking turns",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "metric": _METRIC,
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
        with torch.inference_mode(), record(model) as trace:
            prediction = int(model(**batch).logits.argmax())
        samples.append(
            {
                "tokens": tokenizer.convert_ids_to_tokens(batch["input_ids"][0]),
                "survived_layers": trace.survived_layers[0].tolist(),
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
