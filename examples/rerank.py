"""A reranker at 0.6 of its arithmetic: calibrate on its own pairs, compile, rank, compare.

    python examples/rerank.py --model cross-encoder/ms-marco-MiniLM-L6-v2 --pairs pairs.tsv
    python examples/rerank.py --toy

``pairs.tsv`` has a query, a tab and a passage per line, at least 64 lines, such as candidates from your own logs. No
labels. A sentence-transformers ``CrossEncoder`` is such a model; its folder or hub name will do.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from toy import model as toy_model
from toy import texts as toy_texts
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import token_pruning as tp


def rank(model: Any, tokenizer: Any, query: str, passages: list[str]) -> tuple[list[int], float]:
    """Passages from best to worst, and the milliseconds that took."""
    start, scores = time.perf_counter(), []
    for first in range(0, len(passages), 32):
        some = passages[first : first + 32]
        batch = tokenizer([query] * len(some), some, padding=True, truncation=True, return_tensors="pt")
        scores.append(model(**batch).logits[:, -1])
    order: list[int] = torch.cat(scores).argsort(descending=True).tolist()
    return order, 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub name")
    parser.add_argument("--pairs", type=Path, help="query, tab, passage per line")
    parser.add_argument("--toy", action="store_true", help="a tiny random model and random texts")
    parser.add_argument("--target-flops", type=float, default=0.6, help="relative FLOPs on valid tokens")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model
        if arguments.toy:
            path = toy_model(Path(folder), AutoModelForSequenceClassification, num_labels=1)
            pairs = list(zip(toy_texts(80, 6), toy_texts(80, seed=1), strict=True))
        else:
            lines = arguments.pairs.read_text(encoding="utf-8").splitlines()
            pairs = [(query, passage) for query, passage in (line.split("\t") for line in lines)]
        model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=False).eval()
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    dense = tp.compile(model)

    examples = [tokenizer(query, passage, truncation=True) for query, passage in pairs]
    gate = tp.vocabulary_gate(model, examples)
    found = tp.calibrate(model, examples, target_flops=arguments.target_flops, vocabulary=gate)
    pruned = tp.compile(model)
    print(f"relative FLOPs {found.chosen.relative_flops:.2f}, tokens leave by {found.chosen.schedule.name}")

    query, passages = pairs[0][0], [passage for _, passage in pairs]
    for engine in (dense, pruned):
        rank(engine, tokenizer, query, passages)  # warm
    (before, slow), (after, fast) = (rank(engine, tokenizer, query, passages) for engine in (dense, pruned))
    print(f"dense {slow:.1f} ms, pruned {fast:.1f} ms for {len(passages)} passages")
    print(f"of the dense model's best ten, {len({*before[:10]} & {*after[:10]})} are among the pruned model's")
    print(f"best: {passages[after[0]]}")


if __name__ == "__main__":
    main()
