"""MTEB on an embedding model at 0.55 of its arithmetic, beside the dense model: an STS task from a file. Offline.

python examples/mteb.py MODEL --pairs FILE   # FILE: text, text and score from 0 to 5 a line, between tabs; no header
python examples/mteb.py                      # all-MiniLM-L6-v2, and docstrings of which some words were swapped
"""

import argparse
import itertools
import random
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer

import token_pruning as tp
from token_pruning.lab.data.docstrings import load_docstrings
from token_pruning.lab.data.minilm import find_minilm

sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]  # this is mteb.py
import mteb  # noqa: E402


class LocalSTS(mteb.abstasks.AbsTaskSTS):
    metadata = mteb.TaskMetadata(
        name="LocalSTS",
        description="pairs of texts from a file",
        type="STS",
        dataset={"path": "local", "revision": "1"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="cosine_spearman",
    )

    def __init__(self, pairs: list[tuple[str, str, float]]) -> None:
        super().__init__()
        self.pairs = pairs

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        first, second, score = map(list, zip(*self.pairs, strict=True))
        self.dataset = {"test": Dataset.from_dict({"sentence1": first, "sentence2": second, "score": score})}
        self.data_loaded = True


def read_pairs(file: Path) -> list[tuple[str, str, float]]:
    lines = (line.split("\t") for line in file.read_text(encoding="utf-8").splitlines())
    return [(first, second, float(score)) for first, second, score in lines]


def make_pairs(texts: list[str]) -> list[tuple[str, str, float]]:
    """Each text with a copy that has some of its words from another text; the score is the share of its own."""
    rng, made = random.Random(0), []
    for text, other in itertools.pairwise(texts):
        share, strange = rng.random(), other.split()
        second = [word if rng.random() < share else rng.choice(strange) for word in text.split()]
        made.append((text, " ".join(second), 5 * share))
    return made


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", help="folder or hub name of a SentenceTransformer")
parser.add_argument("--pairs", type=Path, help="the task, as above")
parser.add_argument("--texts", type=int, default=500, help="docstrings to calibrate with, and to make pairs of")
arguments = parser.parse_args()
docstrings = [text for text in load_docstrings().train.first if text.split()]
texts, others = docstrings[: arguments.texts], docstrings[arguments.texts :][: arguments.texts]
task = LocalSTS(read_pairs(arguments.pairs) if arguments.pairs else make_pairs(others))
model = SentenceTransformer(str(arguments.model or find_minilm()), device="cpu")


def score(model: SentenceTransformer) -> float:
    results = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    return 100 * results[0].get_score()


dense = score(model)
tp.calibrate(model, texts, target_flops=0.55)
print(f"Spearman × 100: {score(tp.compile(model)):.2f}; {dense:.2f} dense")
