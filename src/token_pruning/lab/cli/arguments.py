"""The arguments of every command, and what they run."""

import argparse
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from token_pruning.errors import ConfigError
from token_pruning.lab.training.options import (
    ARCHITECTURES,
    DISTILLATION_TEMPERATURE,
    DISTILLATION_WEIGHT,
    MASKING_MODES,
    TrainOptions,
    flag,
)

# Learning rates of the published code where --lr is not given.
_LEARNING_RATES = {"MRPC": 2e-5}
_LEARNING_RATE = 4e-5
_KEYS = (
    "prune_mode", "final_token_threshold", "token_keep_rate", "keep_all_layers", "token_threshold", "scoring_mode",
    "summary_tokens", "prune_layers", "vocabulary_threshold",
)  # fmt: skip


def add_train(commands: Any) -> None:
    """``token-pruning train``."""
    parser = commands.add_parser(
        "train",
        help="fine-tune a model: dense, or with learned or fixed pruning",
        description="Train one stage. The paper's workflow: --masking-mode none (fine-tune), soft (learn thresholds), "
        "hard (remove tokens and fine-tune). How to prune is read from config.json in the --restore folder: prune_mode "
        "(absolute_threshold, topk, threshold, rising_threshold), final_token_threshold, token_keep_rate, "
        "token_threshold, scoring_mode. A killed run continues when the same command is given again.",
        allow_abbrev=False,
    )
    _add_data(parser)
    _add_model(parser)
    training = parser.add_argument_group("training")
    training.add_argument("--lr", type=float, help="learning rate of the weights (default 4e-5; MRPC 2e-5)")
    training.add_argument("--epoch", "--epochs", dest="epochs", type=float, default=10.0, help="epochs (default 10)")
    training.add_argument(
        "--train-length-quantile", type=float, metavar="Q",
        help="train only on examples no longer, in tokens, than the Q-quantile of the training set (default: all)",
    )  # fmt: skip
    training.add_argument("--weight-decay", type=float, default=0.0, help="weight decay (default 0)")
    training.add_argument("--seed", type=int, default=42, help="seed of everything random (default 42)")
    training.add_argument(
        "--save-step", "--save-steps", dest="save_steps", type=int, metavar="N",
        help="evaluate, log and save every N steps (default: every epoch)",
    )  # fmt: skip
    training.add_argument("--save-all", action="store_true", help="keep every checkpoint (default: three)")
    training.add_argument(
        "--no-load", "--no-load-best", dest="load_best", action="store_false",
        help="finish with the last model instead of the best evaluated one",
    )  # fmt: skip
    training.add_argument("--overwrite-output-dir", action="store_true", help="replace a finished run")
    training.add_argument(
        "--vocabulary-keep-rate", type=float, metavar="R",
        help="let this part of the tokens into the first layer: those whose vocabulary entries receive most attention "
        "in the checkpoint's upper layers (default: what suits the budget; else 1)",
    )  # fmt: skip
    budget = parser.add_argument_group("budget (masking modes soft, mixed and hard)")
    budget.add_argument(
        "--target-flops", type=float, metavar="F",
        help="what the pruned model may cost, relative to the dense one on valid tokens, instead of --lambda; "
        "thresholds, --temperature and --lr-threshold are then for scoring mode relative",
    )  # fmt: skip
    budget.add_argument(
        "--schedule",
        help="masking mode hard: where tokens leave: step-K (all after layer K), linear, geometric, late, or the parts "
        "that leave after each layer, as 0.6,0.4; drain: all of them, as late as the budget allows "
        "(default: as the checkpoint's learned thresholds do, or drain)",
    )
    budget.add_argument(
        "--budget-input", metavar="FILE",
        help="unlabelled texts as the model will meet them, whose cost is held to the budget (default: held-out "
        "training examples, which may be shorter or longer)",
    )  # fmt: skip
    budget.add_argument("--no-teacher", action="store_true", help="learn from labels alone")
    soft = parser.add_argument_group("soft stage (masking modes soft and mixed)")
    soft.add_argument(
        "--lambda", "--lambda-threshold", dest="regularization", type=float, metavar="λ",
        help="weight of the regularizer: higher prunes more (0.01 to 0.2 is usual)",
    )  # fmt: skip
    soft.add_argument("--temperature", type=float, metavar="T", help="temperature of the soft mask (default 1e-3)")
    soft.add_argument("--lr-threshold", type=float, help="learning rate of the thresholds (default: --lr)")
    soft.add_argument("--weight-decay-threshold", type=float, help="weight decay of the thresholds (default 0)")
    teacher = parser.add_argument_group("distillation (any masking mode)")
    teacher.add_argument(
        "--teacher", metavar="CKPT",
        help="dense checkpoint, folder or hub name, whose outputs are learned beside the labels",
    )  # fmt: skip
    teacher.add_argument(
        "--distillation-weight", type=float, metavar="α",
        help=f"the teacher's share of the loss, up to 1 (default {DISTILLATION_WEIGHT:g})",
    )  # fmt: skip
    teacher.add_argument(
        "--distillation-temperature", type=float, metavar="τ",
        help=f"temperature of both models' probabilities (default {DISTILLATION_TEMPERATURE:g}); not for a regression",
    )  # fmt: skip
    parser.set_defaults(run=_train)


def add_eval(commands: Any) -> None:
    """``token-pruning eval``."""
    parser = commands.add_parser(
        "eval",
        help="evaluate a checkpoint: metrics, FLOPs three ways, tokens kept, seconds",
        description="Evaluate a checkpoint with its tokens removed, or dense with --masking-mode none. Writes "
        "eval_results.json to --output-dir, or else to eval/ inside the checkpoint.",
        allow_abbrev=False,
    )
    _add_data(parser)
    _add_model(parser)
    parser.set_defaults(run=_evaluate)


def add_calibrate(commands: Any) -> None:
    """``token-pruning calibrate``."""
    parser = commands.add_parser(
        "calibrate",
        help="prune a checkpoint to a budget without training it",
        description="Choose thresholds on a few hundred examples, by how little the model's outputs change, and save "
        "the pruned checkpoint. --target-flops needs no labels: the training examples of a task, or the texts of any "
        "file (--input). --max-drop finds the cheapest pruning whose estimated loss stays inside the bound.",
        allow_abbrev=False,
    )
    _add_data(parser)
    parser.add_argument("--restore", "--restore-file", dest="restore", required=True, metavar="CKPT", help="checkpoint")
    parser.add_argument("--input", type=Path, help="one or two text columns, or one text per line (.txt), unlabelled")
    parser.add_argument("--target-flops", type=float, metavar="F", help="relative FLOPs on valid tokens, such as 0.7")
    parser.add_argument("--max-drop", type=float, metavar="POINTS", help="how much the metric may fall, such as 1.0")
    parser.add_argument("--examples", type=int, default=400, help="how many are used (default 400, at least 32)")
    parser.add_argument("--summary-tokens", default="none", help="none, shared or segment (default none)")
    parser.add_argument("--no-vocabulary", action="store_true", help="let every token into the first layer")
    _add_prune_layers(parser)
    parser.add_argument("--seed", type=int, default=42, help="of the choice of examples (default 42)")
    parser.add_argument("--bs", "--batch-size", dest="batch_size", type=int, default=32,
                        help="batch size of the evaluation (default 32)")  # fmt: skip
    parser.add_argument("--output-dir", help="default: CKPT/calibrated")
    parser.add_argument("--overwrite-output-dir", action="store_true", help="replace a finished run")
    parser.set_defaults(run=_calibrate)


def add_predict(commands: Any) -> None:
    """``token-pruning predict``."""
    parser = commands.add_parser(
        "predict",
        help="label the texts of a file",
        description="Label every text of a CSV, TSV, JSON, JSONL or TXT file: one JSON object per line with the label "
        "and its probability, or the score of a regression.",
        allow_abbrev=False,
    )
    parser.add_argument("--restore", "--restore-file", dest="restore", required=True, metavar="CKPT", help="checkpoint")
    parser.add_argument(
        "--input", type=Path, required=True, help="one or two text columns, or one text per line (.txt)"
    )
    parser.add_argument("--output", type=Path, help="where to write (default: standard output)")
    _add_inference(parser)
    parser.add_argument("--dense", action="store_true", help="leave the checkpoint's pruning off")
    parser.set_defaults(run=_predict)


def add_analyze(commands: Any) -> None:
    """``token-pruning analyze``."""
    parser = commands.add_parser(
        "analyze",
        help="where checkpoints drop tokens: by length, by layer, by outcome, in single texts",
        description="Evaluate checkpoints side by side on the validation examples, each pruned as its config.json says "
        "(dense if it names no prune_mode), and write analysis.md with tables and plots, analysis.json with every "
        "figure, and trajectories.html with the tokens of a few texts.",
        allow_abbrev=False,
    )
    parser.add_argument("--restore", nargs="+", required=True, metavar="CKPT", help="one or more checkpoints")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="what to call them (default: their folders' names)")
    parser.add_argument("--task", help="RTE, MRPC, STSB, SST2, QNLI, QQP or MNLI")
    parser.add_argument("--data-dir", type=Path, help="folder in the official GLUE layout (default: the hub's GLUE)")
    parser.add_argument("--validation-file", type=Path, help="instead of --task: your own CSV, TSV, JSON or JSONL")
    parser.add_argument("--output-dir", type=Path, required=True, help="where to write; an older analysis is replaced")
    parser.add_argument("--quantiles", type=int, default=4, help="groups of examples by length (default 4)")
    parser.add_argument("--samples", type=int, default=8, help="texts whose tokens are shown, 0 for none (default 8)")
    _add_inference(parser)
    parser.set_defaults(run=_analyze, train_file=None)


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
        allow_abbrev=False,
    )
    _add_data(parser)
    parser.add_argument("--restore", required=True, metavar="DENSE", help="fine-tuned dense checkpoint")
    parser.add_argument("--output-dir", type=Path, required=True, help="where to write, and to continue")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", default=["ltp", "budget", "calibrated", "topk", "manual"],
        help="ltp, budget, calibrated, topk, manual (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--trials", type=int, default=40,
        help="finished trials of the study, over all machines (default 40); a higher number goes on",
    )  # fmt: skip
    parser.add_argument(
        "--storage", metavar="URL",
        help="database of the study, as SQLAlchemy writes it: sqlite:///FILE, mysql://…, postgresql://… "
        "(default: study.db in --output-dir)",
    )  # fmt: skip
    parser.add_argument("--study-name", metavar="NAME", help="in the database (default: the task's name)")
    parser.add_argument(
        "--validate-on", default="train",
        help="train: measure on up to 1000 examples, at most a fifth, that are held out of the training set; dev: on "
        "the validation set (default train)",
    )  # fmt: skip
    parser.add_argument(
        "--prune-margin", type=float, default=5.0, metavar="POINTS",
        help="from the middle of its epochs on, stop a training after an evaluation if a finished trial of any method "
        "costs no more and is better by more than this (default 5)",
    )  # fmt: skip
    parser.add_argument("--keep-checkpoints", action="store_true", help="keep the models of all complete trials")
    parser.add_argument("--lr", type=float, help="learning rate (default 4e-5; MRPC 2e-5)")
    parser.add_argument("--epoch", "--epochs", dest="epochs", type=float, default=3.0, help="epochs (default 3)")
    parser.add_argument("--bs", "--batch-size", dest="batch_size", type=int, default=32, help="batch size (default 32)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast: faster on a CPU with AMX, or a GPU")
    parser.add_argument("--seed", type=int, default=42, help="seed of everything random (default 42)")
    parser.add_argument(
        "--summary-tokens",
        help="none, shared or segment, for every method (default: none; budget and calibrated try segment too)",
    )
    parser.set_defaults(run=_sweep, masking_mode="hard", arch="pibert-base")


def add_demo(commands: Any) -> None:
    """``token-pruning demo``."""
    parser = commands.add_parser(
        "demo",
        help="the whole workflow on a task built from Python's own docstrings, in a few minutes",
        description="Fine-tune all-MiniLM-L6-v2 to tell which standard-library module a docstring is from, learn "
        "thresholds, remove tokens, and compare: a table and a report.html. Needs no network.",
        allow_abbrev=False,
    )
    parser.add_argument("--output-dir", type=Path, default=Path("demo_output"), help="default: demo_output")
    parser.add_argument("--hub", action="store_true", help="take the model from the hub, not from the PyPI package")
    parser.set_defaults(run=_demo)


def _add_inference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bs", "--batch-size", dest="batch_size", type=int, default=32, help="batch size (default 32)")
    parser.add_argument("--max-length", type=int, default=128, help="longer texts are truncated (default 128 tokens)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")


def _add_data(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--task", help="RTE, MRPC, STSB, SST2, QNLI, QQP or MNLI")
    data.add_argument("--data-dir", type=Path, help="folder in the official GLUE layout (default: the hub's GLUE)")
    data.add_argument(
        "--train-file", type=Path, help="your own CSV, TSV, JSON or JSONL, one or two text columns, label"
    )
    data.add_argument("--validation-file", type=Path, help="the same, to evaluate on")
    data.add_argument("--max-length", type=int, default=128, help="longer texts are truncated (default 128 tokens)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--restore", "--restore-file", dest="restore", metavar="CKPT",
        help="checkpoint folder, or a hub name (default with --masking-mode none: the hub's RoBERTa of --arch)",
    )  # fmt: skip
    model.add_argument(
        "--arch",
        default="pibert-base",
        help=f"{', '.join(ARCHITECTURES)}: names the output folder (default pibert-base)",
    )
    model.add_argument(
        "--masking-mode", default="hard",
        help=f"{', '.join(MASKING_MODES)} (default hard); none is dense",
    )  # fmt: skip
    model.add_argument("--bs", "--batch-size", dest="batch_size", type=int, default=32,
                       help="examples per step over all processes (default 32)")  # fmt: skip
    model.add_argument("--bf16", action="store_true", help="bfloat16 autocast: faster on a CPU with AMX, or a GPU")
    model.add_argument("--output-dir", help="default: the paper's folder, checkpoints/base/TASK/… or CKPT/hard/lr_…")
    keys = parser.add_argument_group("instead of config.json's keys")
    keys.add_argument("--prune-mode", help="absolute_threshold, topk, threshold or rising_threshold")
    keys.add_argument("--final-token-threshold", type=float, help="threshold of the last layer")
    keys.add_argument("--token-keep-rate", type=float, help="top-k: keep rate of the last layer")
    keys.add_argument("--keep-all-layers", type=int, help="top-k: first layers that keep everything (default 3)")
    keys.add_argument("--token-threshold", type=float, help="threshold mode: relative to the largest score")
    keys.add_argument("--scoring-mode", help="mean, mean_norm or relative")
    keys.add_argument("--summary-tokens", help="none, shared or segment: what is dropped lives on as summary tokens")
    _add_prune_layers(keys)
    keys.add_argument(
        "--vocabulary-threshold", type=float,
        help="tokens whose vocabulary entry's score is lower never enter the first layer; 0 for none",
    )  # fmt: skip


def _add_prune_layers(parser: Any) -> None:
    parser.add_argument(
        "--prune-layers", type=int, nargs="+", metavar="L",
        help="the layers, the first is 1, at which tokens may leave (default: all)",
    )  # fmt: skip


# Commands import what they need when they run: the train and demo extras are optional.


def _options(arguments: argparse.Namespace, **given: Any) -> TrainOptions:
    own_files = arguments.train_file or arguments.validation_file
    if bool(arguments.task) == bool(own_files):
        raise ConfigError("give either --task (a GLUE task) or --train-file and --validation-file")
    if arguments.task:
        from token_pruning.lab.data import glue_task

        task = glue_task(arguments.task).name
    elif arguments.data_dir:
        raise ConfigError(f"--data-dir is {arguments.data_dir}; it applies to --task, not to --validation-file")
    else:
        task = (arguments.train_file or arguments.validation_file).stem
    restore = arguments.restore
    if restore is None:
        if arguments.masking_mode != "none":
            raise ConfigError(f"--restore is missing; masking mode {arguments.masking_mode!r} starts from a checkpoint")
        if arguments.arch in ARCHITECTURES:
            restore = ARCHITECTURES[arguments.arch][0]
    return TrainOptions(
        restore=restore or "",
        task=task,
        arch=arguments.arch,
        masking_mode=arguments.masking_mode,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        bf16=arguments.bf16,
        output_dir=arguments.output_dir,
        pruning={key: value for key in _KEYS if (value := getattr(arguments, key)) is not None} or None,
        **given,
    )


def _load_data(arguments: argparse.Namespace, need_train: bool, checkpoint: Any) -> Any:
    from token_pruning.lab.data import glue_task, load_files, load_glue_folder, load_glue_hub

    if arguments.task:
        task = glue_task(arguments.task)
        if arguments.data_dir:
            return load_glue_folder(task, arguments.data_dir, need_train=need_train)
        return load_glue_hub(task)
    if arguments.validation_file is None:
        raise ConfigError("--validation-file is missing; --train-file needs it")
    if need_train and arguments.train_file is None:
        raise ConfigError("--train-file is missing; training on your own data needs it and --validation-file")
    # The dense stage gets a head for the file's own labels; later stages and evaluation keep the checkpoint's.
    dense = getattr(arguments, "masking_mode", None) == "none"
    labels = None if need_train and dense else checkpoint.label_names()
    return load_files(arguments.train_file if need_train else None, arguments.validation_file, labels=labels)


def _train(arguments: argparse.Namespace) -> None:
    names = (
        "epochs", "weight_decay", "seed", "save_steps", "save_all", "load_best", "overwrite_output_dir",
        "train_length_quantile", "regularization", "temperature", "lr_threshold", "weight_decay_threshold",
        "target_flops", "budget_input", "vocabulary_keep_rate", "schedule", "no_teacher", "teacher",
        "distillation_weight", "distillation_temperature",
    )  # fmt: skip
    options = _options(arguments, lr=_learning_rate(arguments), **{name: getattr(arguments, name) for name in names})

    from token_pruning.lab.training.train import train

    train(options, partial(_load_data, arguments, True))


def _learning_rate(arguments: argparse.Namespace) -> float:
    if arguments.lr is None:
        return _LEARNING_RATES.get(str(arguments.task).upper(), _LEARNING_RATE)
    return float(arguments.lr)


def _calibrate(arguments: argparse.Namespace) -> None:
    labelled = bool(arguments.task) + bool(arguments.train_file or arguments.validation_file)
    if labelled + bool(arguments.input) != 1:
        raise ConfigError("give one of --task (a GLUE task), --train-file with --validation-file, and --input")
    own_file = arguments.input or arguments.train_file or arguments.validation_file
    options = TrainOptions(
        restore=arguments.restore,
        task=own_file.stem if own_file else arguments.task,
        masking_mode="hard",
        target_flops=arguments.target_flops,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        seed=arguments.seed,
        output_dir=arguments.output_dir,
        overwrite_output_dir=arguments.overwrite_output_dir,
    )

    from token_pruning.lab.training.calibrated import calibrate_checkpoint

    calibrate_checkpoint(
        options,
        None if arguments.input else partial(_load_data, arguments, True),
        arguments.input,
        max_drop=arguments.max_drop,
        examples=arguments.examples,
        summary_tokens=arguments.summary_tokens,
        prune_layers=arguments.prune_layers,
        vocabulary=not arguments.no_vocabulary,
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    options = _options(arguments)

    from token_pruning.lab.training.evaluate import evaluate_checkpoint

    evaluate_checkpoint(options, partial(_load_data, arguments, False))


def _predict(arguments: argparse.Namespace) -> None:
    from token_pruning.lab.predict import predict_file

    predict_file(
        arguments.restore,
        arguments.input,
        arguments.output,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        bf16=arguments.bf16,
        dense=arguments.dense,
    )


def _analyze(arguments: argparse.Namespace) -> None:
    if bool(arguments.task) == bool(arguments.validation_file):
        raise ConfigError("give either --task (a GLUE task) or --validation-file")
    if arguments.data_dir and not arguments.task:
        raise ConfigError(f"--data-dir is {arguments.data_dir}; it applies to --task, not to --validation-file")

    from token_pruning.lab.analysis.run import analyze

    names = ("names", "quantiles", "samples", "batch_size", "max_length", "bf16")
    analyze(
        arguments.restore,
        partial(_load_data, arguments, False),
        arguments.output_dir,
        command=_command("analyze", arguments),
        **{name: getattr(arguments, name) for name in names},
    )


def _command(name: str, arguments: argparse.Namespace) -> str:
    """The command line that gives these arguments, with what was left at None or off left out."""
    words = ["token-pruning", name]
    for key, value in vars(arguments).items():
        if key == "run" or value is None or value is False:
            continue
        words.append(flag(key))
        if value is not True:
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return shlex.join(words)


def _sweep(arguments: argparse.Namespace) -> None:
    names = (
        "methods", "trials", "storage", "study_name", "summary_tokens", "validate_on", "prune_margin", "output_dir",
        "keep_checkpoints",
    )  # fmt: skip
    given = {name: getattr(arguments, name) for name in names}
    common = argparse.Namespace(**{**vars(arguments), **dict.fromkeys(_KEYS), "output_dir": None})
    base = _options(common, lr=_learning_rate(arguments), epochs=arguments.epochs, seed=arguments.seed, load_best=False)

    from token_pruning.lab.sweep.study import SweepOptions, run_sweep

    run_sweep(SweepOptions(base=base, **given), partial(_load_data, arguments, True))


def _demo(arguments: argparse.Namespace) -> None:
    from token_pruning.lab.demo import run_demo

    run_demo(arguments.output_dir, prefer_hub=arguments.hub)
