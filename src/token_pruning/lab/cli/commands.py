"""Every command: its arguments, and what it runs."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from token_pruning.budget.distillation import BATCH_SIZE, EPOCHS, LEARNING_RATE, LEARNING_RATE_OF_SCORES
from token_pruning.errors import ConfigError
from token_pruning.lab.analysis.options import AnalyzeOptions
from token_pruning.lab.cli.parser import (
    add_alias,
    add_keys,
    add_options,
    build,
    command_line,
    given,
    given_keys,
    settle_aliases,
)
from token_pruning.lab.data.source import DataOptions
from token_pruning.lab.demo.options import DemoOptions
from token_pruning.lab.exporting import ExportOptions, export_checkpoint
from token_pruning.lab.options import BudgetOptions, flag_of
from token_pruning.lab.predict import PredictOptions
from token_pruning.lab.report.options import ReportOptions
from token_pruning.lab.sweep.options import SweepOptions
from token_pruning.lab.training.options import ARCHITECTURES, CalibrateOptions, DistillOptions, TrainOptions
from token_pruning.pruners import Pruner
from token_pruning.runtime.adapters import adapter_for

# Learning rates of the published code where --lr is not given.
_LEARNING_RATES = {"MRPC": 2e-5}
_LEARNING_RATE = 4e-5
_SWEEP_EPOCHS = 3.0


def add_train(commands: Any) -> None:
    """``token-pruning train``."""
    parser = commands.add_parser(
        "train",
        help="fine-tune a model: dense, or with learned or fixed pruning",
        description="Train one stage. The paper's workflow: --masking-mode none (fine-tune), soft (learn thresholds), "
        "hard (remove tokens and fine-tune). How to prune is read from config.json in the --restore folder: prune_mode "
        "(absolute_threshold, topk, threshold, rising_threshold), final_token_threshold, token_keep_rate, "
        "token_threshold, scoring_mode. A SentenceTransformer or CrossEncoder learns what it gave unpruned, from texts "
        "without labels (--texts, --target-flops), unless told otherwise with "
        f"--lr {LEARNING_RATE:g} (a reranker {LEARNING_RATE_OF_SCORES:g}), --epoch {EPOCHS:g} and --bs {BATCH_SIZE}. "
        "A killed run continues when the same command is given again.",
    )
    add_alias(parser, "MODEL", TrainOptions, "restore", help="the same as --restore")
    add_options(parser, DataOptions)
    add_options(parser, TrainOptions, restore={"required": False})
    add_options(parser, DistillOptions)
    add_alias(parser, "--texts", DistillOptions, "input", metavar="FILE", help="the same as --input")
    add_alias(parser, "--output", TrainOptions, "output_dir", metavar="DIR", help="the same as --output-dir")
    add_keys(parser)
    parser.set_defaults(run=_train)


def add_eval(commands: Any) -> None:
    """``token-pruning eval``."""
    parser = commands.add_parser(
        "eval",
        help="evaluate a checkpoint: metrics, FLOPs three ways, tokens kept, seconds",
        description="Evaluate a checkpoint with its tokens removed, or dense with --masking-mode none. Writes "
        "eval_results.json to --output-dir, or else to eval/ inside the checkpoint.",
    )
    add_options(parser, DataOptions)
    names = ("restore", "arch", "masking_mode", "batch_size", "max_length", "bf16", "output_dir")
    add_options(parser, TrainOptions, names, restore={"required": False})
    add_options(parser, BudgetOptions)
    add_keys(parser)
    parser.set_defaults(run=_evaluate)


def add_calibrate(commands: Any) -> None:
    """``token-pruning calibrate``."""
    parser = commands.add_parser(
        "calibrate",
        help="prune a model to a budget without training it",
        description="Choose which tokens leave on a few hundred examples, by how little the model's outputs change, "
        "and save the pruned model. MODEL is the folder of a classifier, a tagger or an encoder, or of a "
        "SentenceTransformer or a CrossEncoder. --target-flops needs no labels: the texts of any file (--texts), or "
        "the training examples of a task. --target-ms finds the budget that takes so long on this machine. --max-drop "
        "alone finds the cheapest pruning of a classifier whose estimated loss on a task stays inside the bound.",
    )
    add_alias(parser, "MODEL", TrainOptions, "restore", help="folder of the model, or its name on the hub")
    add_options(parser, DataOptions)
    add_options(
        parser,
        TrainOptions,
        ("restore", "target_flops", "seed", "batch_size", "max_length", "output_dir", "overwrite_output_dir"),
        restore={"required": False, "help": "the same as MODEL"},
        target_flops={
            "help": "relative FLOPs on valid tokens, such as 0.7; several, such as 0.35 0.5 0.75, for one checkpoint "
            "that holds them all"
        },
        seed={"help": f"of the choice of examples (default {TrainOptions.seed})"},
        batch_size={"help": f"batch size of the evaluation (default {TrainOptions.batch_size})"},
        output_dir={"help": "default: MODEL/calibrated"},
    )
    add_options(parser, CalibrateOptions)
    add_alias(parser, "--texts", CalibrateOptions, "input", metavar="FILE", help="the same as --input")
    add_alias(parser, "--output", TrainOptions, "output_dir", metavar="DIR", help="the same as --output-dir")
    add_keys(parser, ("summary_tokens", "prune_layers", "max_tokens"))
    parser.set_defaults(run=_calibrate)


def add_export(commands: Any) -> None:
    """``token-pruning export``."""
    parser = commands.add_parser(
        "export",
        help="write a pruned model as a graph for ONNX Runtime or OpenVINO",
        description="Write a pruned model, of transformers or sentence-transformers, as a graph that removes tokens by "
        "itself. A folder also gets config.json and the tokenizer.",
    )
    add_alias(parser, "MODEL", ExportOptions, "restore", help="folder of the pruned model")
    add_alias(parser, "OUTPUT", ExportOptions, "output", help="the same as --output")
    add_options(
        parser,
        ExportOptions,
        restore={"required": False, "help": "the same as MODEL"},
        output={"required": False},
    )
    parser.set_defaults(run=_export)


def add_predict(commands: Any) -> None:
    """``token-pruning predict``."""
    parser = commands.add_parser(
        "predict",
        help="label the texts of a file",
        description="Label every text of a CSV, TSV, JSON, JSONL, Parquet or TXT file: one JSON object per line with "
        "the label and its probability, of a multi-label classifier the labels and every probability, or the scores of "
        "a regression.",
    )
    add_options(parser, PredictOptions)
    parser.set_defaults(run=_predict)


def add_analyze(commands: Any) -> None:
    """``token-pruning analyze``."""
    parser = commands.add_parser(
        "analyze",
        help="where checkpoints drop tokens: by length, by layer, by outcome, in single texts",
        description="Evaluate checkpoints side by side on the validation examples, each pruned as its config.json says "
        "(dense if it names no prune_mode), and write analysis.md with tables and plots, analysis.json with every "
        "figure, and trajectories.html with the tokens of a few texts.",
    )
    own_file = {"help": "instead of --task: your own CSV, TSV, JSON, JSONL or Parquet"}
    add_options(parser, DataOptions, ("task", "data_dir", "validation_file"), validation_file=own_file)
    add_options(parser, AnalyzeOptions)
    parser.set_defaults(run=_analyze)


def add_report(commands: Any) -> None:
    """``token-pruning report``."""
    parser = commands.add_parser(
        "report",
        help="what a folder's pruning costs and saves on your texts, as one page",
        description="Compare a pruned model with the dense one and with truncation to the same cost: quality, FLOPs, "
        "milliseconds of the engine on this machine, what each layer keeps of short and long texts, and a few texts "
        "with what left in grey. FOLDER is any that calibrate or train wrote. Quality is the metric of a labelled "
        "task, or on texts without labels (--texts) how far the answers are the dense model's. Writes one HTML file "
        "that needs no network.",
    )
    add_alias(parser, "FOLDER", ReportOptions, "restore", help="of the pruned model")
    own_file = {"help": "instead of --task: your own CSV, TSV, JSON, JSONL or Parquet"}
    add_options(parser, DataOptions, ("task", "data_dir", "validation_file"), validation_file=own_file)
    add_options(parser, ReportOptions, restore={"required": False})
    parser.set_defaults(run=_report)


def add_sweep(commands: Any) -> None:
    """``token-pruning sweep``."""
    parser = commands.add_parser(
        "sweep",
        help="explore methods and strengths for one task: the metric against relative FLOPs",
        description="Explore pruning methods and their strengths from one dense checkpoint with Optuna: the metric is "
        "to be high, relative FLOPs low. Methods are dealt in turn: ltp (the paper's: λ and temperature; a soft and a "
        "hard stage, half of the epochs each), budget (training to a budget, with a schedule and the dense model as a "
        "teacher), calibrated (thresholds for a budget without training), topk and manual (thresholds) with a hard "
        "stage. Models are those of the last epoch: none is chosen by the metric that is reported. After every "
        "finished trial trials.csv, pareto.csv, pareto.md and pareto.png are written to --output-dir. A killed sweep "
        "continues when the same command is given again, and several machines share one study by --storage.",
    )
    add_options(parser, DataOptions)
    add_options(parser, SweepOptions)
    add_options(
        parser,
        TrainOptions,
        ("restore", "lr", "epochs", "batch_size", "max_length", "bf16", "seed"),
        restore={"help": "fine-tuned dense checkpoint", "metavar": "DENSE"},
        epochs={"help": f"epochs (default {_SWEEP_EPOCHS:g})"},
    )
    parser.set_defaults(run=_sweep)


def add_demo(commands: Any) -> None:
    """``token-pruning demo``."""
    parser = commands.add_parser(
        "demo",
        help="the whole workflow on a task built from Python's own docstrings, in a few minutes",
        description="Fine-tune all-MiniLM-L6-v2 to tell which standard-library module a docstring is from, learn "
        "thresholds, remove tokens, and compare: a table and a report.html. Needs no network.",
    )
    add_options(parser, DemoOptions)
    parser.set_defaults(run=_demo)


# Commands import what they need when they run: the train and demo extras are optional.


def _train_options(arguments: argparse.Namespace, task: str, **defaults: Any) -> TrainOptions:
    """What was given, with the learning rate of the task and the architecture's checkpoint where these were not."""
    values = {"lr": _LEARNING_RATES.get(task, _LEARNING_RATE), **defaults, **given(arguments, TrainOptions)}
    if "restore" not in values:
        mode, arch = (values.get(name, getattr(TrainOptions, name)) for name in ("masking_mode", "arch"))
        if mode != "none":
            raise ConfigError(f"--restore is missing; masking mode {mode!r} starts from a checkpoint")
        values["restore"] = ARCHITECTURES[arch][0] if arch in ARCHITECTURES else ""
    return TrainOptions(task=task, pruning=given_keys(arguments) or None, **values)


def _train(arguments: argparse.Namespace) -> None:
    settle_aliases(arguments)
    restore = given(arguments, TrainOptions).get("restore", "")
    labelled = given(arguments, DataOptions)  # then a model of sentence-transformers is where a classifier starts from
    if given(arguments, DistillOptions) or (restore and not labelled and adapter_for(Path(restore)) is not None):
        _distill(arguments)
        return
    data = build(arguments, DataOptions)
    options = _train_options(arguments, data.name())

    from token_pruning.lab.training.train import train

    # The dense stage gets a head for a file's own labels; later stages and evaluation keep the checkpoint's.
    train(options, partial(data.load, train=True, own_labels=options.masking_mode == "none"))


def _distill(arguments: argparse.Namespace) -> None:
    from token_pruning.lab.training.distilled import OPTIONS, distill_folder

    found = given(arguments, TrainOptions)
    if "restore" not in found:
        raise ConfigError("MODEL is missing; give the folder of the model")
    others: list[tuple[type, str]] = [(TrainOptions, name) for name in found if name not in OPTIONS]
    others += [(cls, name) for cls in (DataOptions, Pruner) for name in given(arguments, cls)]
    for cls, name in others:
        raise ConfigError(f"{flag_of(cls, name)} is for training on labels; models of sentence-transformers have none")
    values = {"epochs": EPOCHS, "batch_size": BATCH_SIZE, **found}
    source = given(arguments, DistillOptions).get("input")
    base = TrainOptions(task=source.stem if source else "", **values)
    distill_folder(build(arguments, DistillOptions, base=base, learning_rate=found.get("lr")))


def _evaluate(arguments: argparse.Namespace) -> None:
    data = build(arguments, DataOptions)
    options = _train_options(arguments, data.name())
    budget = build(arguments, BudgetOptions).budget

    from token_pruning.lab.training.evaluate import evaluate_checkpoint

    evaluate_checkpoint(options, partial(data.load, train=False), budget)


def _calibrate(arguments: argparse.Namespace) -> None:
    settle_aliases(arguments)
    if "restore" not in given(arguments, TrainOptions):
        raise ConfigError("MODEL is missing; give the folder of the model")
    source = given(arguments, CalibrateOptions).get("input")
    given_data = given(arguments, DataOptions)
    labelled = ("task" in given_data) + ("train_file" in given_data or "validation_file" in given_data)
    if labelled + (source is not None) != 1:
        raise ConfigError("give one of --task (a GLUE task), --train-file with --validation-file, and --texts")
    data = DataOptions(**given_data)
    base = TrainOptions(task=source.stem if source else data.name(), **given(arguments, TrainOptions))
    if source is not None and "batch_size" in given(arguments, TrainOptions):
        raise ConfigError(f"--bs is {base.batch_size}; texts without labels are not evaluated: leave it out")
    if "max_length" in given(arguments, TrainOptions) and adapter_for(Path(base.restore)) is not None:
        raise ConfigError(f"--max-length is {base.max_length}; {base.restore} has its own, max_seq_length")
    options = build(arguments, CalibrateOptions, base=base, **given_keys(arguments))

    from token_pruning.lab.training.calibrated import calibrate_checkpoint

    calibrate_checkpoint(options, partial(data.load, train=True))


def _export(arguments: argparse.Namespace) -> None:
    settle_aliases(arguments)
    for name, what in (("restore", "MODEL"), ("output", "OUTPUT")):
        if name not in given(arguments, ExportOptions):
            raise ConfigError(f"{what} is missing; give the folder of the model, and where the graph goes")
    export_checkpoint(build(arguments, ExportOptions))


def _predict(arguments: argparse.Namespace) -> None:
    options = build(arguments, PredictOptions)

    from token_pruning.lab.predict import predict_file

    predict_file(options)


def _analyze(arguments: argparse.Namespace) -> None:
    data = build(arguments, DataOptions)
    if not (data.task or data.validation_file):
        raise ConfigError("give either --task (a GLUE task) or --validation-file")
    options = build(arguments, AnalyzeOptions)

    from token_pruning.lab.analysis.run import analyze

    analyze(options, partial(data.load, train=False), command=command_line("analyze", options, data))


def _report(arguments: argparse.Namespace) -> None:
    settle_aliases(arguments)
    if "restore" not in given(arguments, ReportOptions):
        raise ConfigError("FOLDER is missing; give the folder of a pruned model")
    data = build(arguments, DataOptions)
    options = build(arguments, ReportOptions)
    labelled = bool(data.task or data.validation_file)
    if labelled == (options.texts is not None):
        raise ConfigError("give one of --task (a GLUE task), --validation-file, and --texts")

    from token_pruning.lab.report.run import report

    load_data = partial(data.load, train=False) if labelled else None
    report(options, load_data, command=command_line("report", options, data))


def _sweep(arguments: argparse.Namespace) -> None:
    data = build(arguments, DataOptions)
    base = _train_options(arguments, data.name(), epochs=_SWEEP_EPOCHS, load_best=False)
    options = build(arguments, SweepOptions, base=base)

    from token_pruning.lab.sweep.study import run_sweep

    run_sweep(options, partial(data.load, train=True))


def _demo(arguments: argparse.Namespace) -> None:
    options = build(arguments, DemoOptions)

    from token_pruning.lab.demo.run import run_demo

    run_demo(options)
