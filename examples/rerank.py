"""A reranker at 0.5 of its arithmetic: calibrate on your own pairs, compile, rank. Offline.

python examples/rerank.py MODEL       # a folder or hub name, such as cross-encoder/ms-marco-MiniLM-L6-v2
python examples/rerank.py             # a toy: all-MiniLM-L6-v2, trained for half a minute to find a docstring's rest
"""

import argparse

import torch
from sentence_transformers import CrossEncoder

import token_pruning as tp
from token_pruning.lab.data.docstrings import load_docstrings
from token_pruning.lab.data.minilm import find_minilm


def train(model: CrossEncoder, pairs: list[tuple[str, str]], steps: int = 60) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(steps):
        some = pairs[step * 8 : step * 8 + 8]
        wrong = [(query, passage) for (query, _), (_, passage) in zip(some, some[1:] + some[:1], strict=True)]
        scores = model(model.preprocess(some + wrong))["scores"].squeeze(1)
        right = torch.arange(len(scores)) < len(some)
        torch.nn.functional.binary_cross_entropy_with_logits(scores, right.float()).backward()
        optimizer.step(), optimizer.zero_grad()


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", nargs="?", help="folder or hub name of a CrossEncoder")
arguments = parser.parse_args()
model = CrossEncoder(str(arguments.model or find_minilm()), num_labels=1, device="cpu")
pairs = [(first, rest) for first, _, rest in (text.partition(". ") for text in load_docstrings().train.first) if rest]
if arguments.model is None:
    train(model, pairs)
queries = [query for query, _ in pairs[500:540]]
examples = [(query, passage) for query in queries for _, passage in pairs[500:508]]  # candidates of each query
tp.calibrate(model, examples, target_flops=0.5)
fast = tp.compile(model)
for result in fast.rank(*[pairs[600][0], [passage for _, passage in pairs[600:620]]], top_k=3, return_documents=True):
    print(f"{result['score']:.3f}  {result['text'][:80]}")
