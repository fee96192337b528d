"""Every run behind README.md's tables: all-MiniLM-L6-v2, dense, calibrated, and pruned to three budgets five ways.

    python results/glue/runs.py GLUE RUNS [--tasks RTE MRPC] [--seeds 0 1 2] [--methods dense budget …] [--budgets 0.35]
    python results/glue/runs.py GLUE RUNS --model all-mpnet-base-v2 --tasks MRPC …     (RUNS: a folder of its own)

Prints each command before it runs it. A run that is complete is skipped; one that was killed continues. Nothing is
chosen on the development set: recipes were picked on slices of the training sets, thresholds are fitted to held-out
training examples, and the last model of a run is kept, not the best evaluated one.
"""

import argparse
import json
import random
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import token_pruning as tp
from token_pruning.budget.examples import as_batch
from token_pruning.budget.fitting import using
from token_pruning.checkpoint import load_model, read_checkpoint
from token_pruning.lab.cli import main
from token_pruning.lab.data import find_minilm, find_mpnet, glue_task, load_glue_folder, load_unlabelled
from token_pruning.lab.training.features import tokenize
from token_pruning.lab.training.load import load_tokenizer

TASKS = ("STSB", "MRPC", "RTE", "SST2")  # RTE's dense model starts from STSB's
BUDGETS = {"0.50": 0.49, "0.35": 0.345, "0.25": 0.245}  # a little below, since thresholds are fitted to training data
OURS = {"0.70": 0.69, **BUDGETS}
CALIBRATED = {"0.70": 0.69, "0.50": 0.49}
METHODS = (
    *("dense", "untrained", "budget", "context", "searched", "continued", "topk", "manual", "ltp"),
    *("short", "ablation", "elastic", "shallow", "states"),
)
# "context": ours with what left attended to still, and no summary tokens; "searched": calibrated, whatever wins;
# "continued": trained from there; "ablation": ours with all tokens entering the first layer; "elastic": one checkpoint
# for the three lower budgets; "shallow": the dense model's first layers, trained alike, nothing dropped;
# "states": as "context", the teacher's hidden states learned besides
SHORT = "0.5"  # "short": trained on examples up to this quantile of length, to be evaluated on all


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        find: gives its folder.
        dense: by task: the task whose dense model it starts from, learning rate, epochs.
        lr: of every pruned run.
        lr_soft: of LTP's soft stage.
        epochs: by task, of every pruned run; LTP's soft and hard stages share them.
        ltp: λ and T of each run of LTP.
    """

    find: Callable[[], Path]
    dense: Mapping[str, tuple[str | None, float, int]]
    lr: float
    lr_soft: float
    epochs: Mapping[str, int]
    ltp: Sequence[tuple[float, float]]


RECIPES = {
    "all-MiniLM-L6-v2": Recipe(
        find_minilm,
        {"STSB": (None, 1e-4, 10), "MRPC": (None, 1e-4, 5), "RTE": ("STSB", 5e-5, 10), "SST2": (None, 1e-4, 1)},
        lr=1e-4,
        lr_soft=5e-5,
        epochs={"STSB": 5, "MRPC": 5, "RTE": 5, "SST2": 1},
        ltp=((0.1, 1e-3), (0.3, 1e-3), (1.0, 1e-3), (0.3, 2e-4), (0.3, 2e-3)),
    ),
    "all-mpnet-base-v2": Recipe(
        find_mpnet,
        {"MRPC": (None, 5e-5, 3)},
        lr=5e-5,
        lr_soft=2e-5,
        epochs={"MRPC": 3},
        ltp=((0.05, 1e-3),),
    ),
}
EXAMPLES = 400
SHALLOW = {"0.50": 3, "0.35": 2}  # layers of six

Commands = Iterator[tuple[str, list[str]]]


def commands(
    recipe: Recipe, task: str, seed: int, glue: Path, runs: Path, methods: list[str], dtype: str, budgets: list[str]
) -> Commands:
    """Names and arguments of ``token-pruning`` for one task and seed, in order."""
    here = runs / task / f"seed{seed}"
    dense = str(here / "dense")
    data = ["--task", task, "--data-dir", str(glue)]
    common = [*data, "--bs", "32", *["--bf16"] * (dtype == "bfloat16"), "--seed", str(seed), "--no-load"]
    hard = ["train", *common, "--restore", dense, "--masking-mode", "hard", "--lr", str(recipe.lr)]
    epochs = ["--epoch", str(recipe.epochs[task])]
    texts = sentences(glue, runs) if task == "SST2" else None
    held_on = [] if texts is None else ["--budget-input", str(texts)]
    summaries = ["--summary-tokens", "segment"]
    budget = [*held_on, *summaries, "--target-flops"]

    if "dense" in methods:
        start, lr, passes = recipe.dense[task]
        restore = recipe.find() if start is None else runs / start / f"seed{seed}" / "dense"
        yield (
            "dense",
            ["train", *common, "--restore", str(restore), *f"--masking-mode none --lr {lr} --epoch {passes}".split()],
        )
    if "untrained" in methods:
        plain = ["eval", *data, "--restore", dense]
        for name, target in CALIBRATED.items():
            yield f"calibrated-{name}", [*calibrate(dense, data, seed, target), *summaries]
            keep_all = 3 if target > 0.6 else 1
            yield f"topk-{name}-untrained", [*plain, *topk(dense, task, texts or glue, target, keep_all)]
            yield f"manual-{name}-untrained", [*plain, *manual(dense, task, texts or glue, target)]
    if "ablation" in methods:
        for name, target in CALIBRATED.items():
            yield f"calibrated-all-{name}", [*calibrate(dense, data, seed, target), *summaries, "--no-vocabulary"]
    for name in budgets:
        target = OURS[name]
        if "budget" in methods:
            yield f"budget-{name}", [*hard, *epochs, *budget, str(target)]
        if "context" in methods:
            yield f"context-{name}", [*hard, *epochs, *held_on, "--context", "--target-flops", str(target)]
        if "states" in methods:
            besides = ["--context", "--teacher-states", "1", "--target-flops", str(target)]
            yield f"states-{name}", [*hard, *epochs, *held_on, *besides]
        if "searched" in methods:
            yield f"searched-{name}", calibrate(dense, data, seed, target)
        if "shallow" in methods and name in SHALLOW:
            taught = [*epochs, "--teacher", dense, "--masking-mode", "none", "--lr", str(recipe.lr)]
            yield f"shallow-{name}", ["train", *common, *taught, "--restore", first_layers(dense, SHALLOW[name])]
        if "continued" in methods:
            found = ["--restore", str(here / f"searched-{name}"), "--masking-mode", "hard", "--lr", str(recipe.lr)]
            yield f"continued-{name}", ["train", *common, *found, *epochs, *held_on, "--target-flops", str(target)]
    for name, target in ((name, BUDGETS[name]) for name in budgets if name in BUDGETS):
        if "ablation" in methods:
            yield f"budget-all-{name}", [*hard, *epochs, *budget, str(target), "--vocabulary-keep-rate", "1"]
        if "topk" in methods:
            yield f"topk-{name}", [*hard, *epochs, *topk(dense, task, texts or glue, target, keep_all=1)]
        if "manual" in methods:
            yield f"manual-{name}", [*hard, *epochs, *manual(dense, task, texts or glue, target)]
            costs = cost(here / f"manual-{name}")
            if costs > float(name) + 0.01 and name != "0.25":  # what training added is taken off
                lower = 2 * target - costs
                yield f"manual-{name}-again", [*hard, *epochs, *manual(dense, task, texts or glue, lower)]
    if "ltp" in methods:
        half = ["--epoch", str(recipe.epochs[task] / 2)]
        keys = "--prune-mode absolute_threshold --final-token-threshold 0.01 --scoring-mode mean"
        for strength, temperature in recipe.ltp:
            soft = f"--masking-mode soft --lambda {strength} --temperature {temperature} --lr {recipe.lr_soft}"
            soft += " --lr-threshold 2e-4"
            name = f"ltp-{strength}" if temperature == 1e-3 else f"ltp-{strength}-T{temperature}"
            yield f"{name}-soft", ["train", *common, *half, "--restore", dense, *soft.split(), *keys.split()]
            learned = ["--restore", str(here / f"{name}-soft"), "--masking-mode", "hard", "--lr", str(recipe.lr)]
            yield name, ["train", *common, *half, *learned]
    if "elastic" in methods:
        yield "elastic", [*hard, *epochs, *budget, *map(str, BUDGETS.values())]
        for name, target in BUDGETS.items():
            yield f"elastic-{name}", ["eval", *data, "--restore", str(here / "elastic"), "--budget", str(target)]
    if "short" in methods:
        start, lr, passes = recipe.dense[task]
        restore = recipe.find() if start is None else runs / start / f"seed{seed}" / "dense"
        only = ["--train-length-quantile", SHORT]
        stage = f"--masking-mode none --lr {lr} --epoch {passes}".split()
        yield "short-dense", ["train", *common, "--restore", str(restore), *stage, *only]
        dense = str(here / "short-dense")
        hard = ["train", *common, "--restore", dense, "--masking-mode", "hard", "--lr", str(recipe.lr), *epochs, *only]
        yield "short-budget-0.50", [*hard, *budget, str(BUDGETS["0.50"])]
        yield "short-topk-0.50", [*hard, *topk(dense, task, texts or glue, BUDGETS["0.50"], keep_all=1)]
        yield "short-manual-0.50", [*hard, *manual(dense, task, texts or glue, BUDGETS["0.50"])]


def first_layers(dense: str, count: int) -> str:
    """A checkpoint of a model's first layers and its head."""
    folder = Path(f"{dense}-first-{count}")
    if not folder.exists():
        AutoModelForSequenceClassification.from_pretrained(dense, num_hidden_layers=count).save_pretrained(folder)
        AutoTokenizer.from_pretrained(dense).save_pretrained(folder)
    return str(folder)


def cost(folder: Path) -> float:
    """Relative FLOPs of a run that is complete."""
    return float(json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))["relative_flops"])


def sentences(glue: Path, runs: Path) -> Path:
    """SST-2's training examples that end as sentences do: most are phrases, of half the development sentences' length.

    What methods are to cost is set on these.
    """
    examples = load_glue_folder(glue_task("SST2"), glue).train
    assert examples is not None
    file = runs / "SST2-sentences.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    texts = [text.strip() for text in examples.first if text.strip().endswith(".")]
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return file


def calibrate(dense: str, data: list[str], seed: int, target: float) -> list[str]:
    """What the calibrated rows share."""
    return ["calibrate", *data, "--restore", dense, "--target-flops", str(target), "--seed", str(seed)]


def topk(dense: str, task: str, texts: Path, target: float, keep_all: int) -> list[str]:
    """The keep rate that costs ``target`` on training examples."""
    rate = _solve(dense, task, texts, target, -6.0, 1.0, lambda x: tp.TopK(token_keep_rate=x, keep_all_layers=keep_all))
    return ["--prune-mode", "topk", "--token-keep-rate", f"{rate:.3f}", "--keep-all-layers", str(keep_all)]


def manual(dense: str, task: str, texts: Path, target: float) -> list[str]:
    """The final threshold that costs ``target`` on training examples, before any training."""
    value = _solve(dense, task, texts, target, 0.1, 0.0, lambda x: tp.FixedThreshold(final_token_threshold=x))
    return ["--prune-mode", "absolute_threshold", "--final-token-threshold", f"{value:.5f}", "--scoring-mode", "mean"]


def _solve(
    dense: str, task: str, texts: Path, target: float, cheap: float, dear: float, method: Callable[[float], tp.Pruner]
) -> float:
    """The setting that costs ``target`` on training examples: ``texts`` is the GLUE folder, or a file of some."""
    checkpoint = read_checkpoint(dense)
    model = tp.prune(load_model(checkpoint), tp.FixedThreshold()).eval()
    examples = load_unlabelled(texts) if texts.is_file() else load_glue_folder(glue_task(task), texts).train
    assert examples is not None
    features = tokenize(load_tokenizer(checkpoint), examples, model, 128)
    batch = as_batch(random.Random(0).sample(features, EXAMPLES), 0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    for _ in range(12):
        middle = (cheap + dear) / 2
        with using(model, method(middle)), torch.inference_mode(), tp.record(model) as trace:
            model(**inputs)
        if tp.count_flops(model, trace).relative > target:
            dear = middle
        else:
            cheap = middle
    return cheap


def finished(folder: Path) -> bool:
    """Whether a run is complete: a training evaluates meanwhile, too. An evaluation has no state but its result."""
    state = folder / "run.json"
    if not state.exists():
        return (folder / "eval_results.json").exists()
    try:
        return bool(json.loads(state.read_text(encoding="utf-8"))["finished"])
    except (OSError, ValueError, KeyError):
        return False


def run(
    recipe: Recipe,
    glue: Path,
    runs: Path,
    tasks: list[str],
    seeds: list[int],
    methods: list[str],
    dtype: str,
    budgets: list[str],
) -> None:
    """All of them, one after the other."""
    for seed in seeds:
        for task in tasks:
            for name, arguments in commands(recipe, task, seed, glue, runs, methods, dtype, budgets):
                folder = runs / task / f"seed{seed}" / name
                if finished(folder):
                    continue
                arguments += ["--output-dir", str(folder)]
                print(f"\ntoken-pruning {shlex.join(arguments)}", flush=True)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "command.txt").write_text(f"token-pruning {shlex.join(arguments)}\n", encoding="utf-8")
                if main(arguments) != 0:
                    sys.exit(f"{task} seed {seed} {name} failed")
                for checkpoint in folder.glob("checkpoint-*"):  # a quarter of a gigabyte each, and of no more use
                    shutil.rmtree(checkpoint)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("glue", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--model", choices=RECIPES, default="all-MiniLM-L6-v2")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="all that there is a recipe for, unless given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of autocast in training")
    parser.add_argument("--budgets", nargs="+", default=list(OURS), choices=OURS, help="of the methods with a budget")
    given = parser.parse_args()
    recipe = RECIPES[given.model]
    tasks = given.tasks or [task for task in TASKS if task in recipe.dense]
    if missing := set(tasks) - recipe.dense.keys():
        parser.error(f"{given.model} has no recipe for {', '.join(sorted(missing))}")
    run(recipe, given.glue, given.runs, tasks, given.seeds, given.methods, given.dtype, given.budgets)
