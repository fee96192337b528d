"""An embedding model at 0.7 of its arithmetic: calibrate on its own texts, compile, compare with the dense vectors.

    python examples/embeddings.py --model sentence-transformers/all-MiniLM-L6-v2 --texts texts.txt
    python examples/embeddings.py --model BAAI/bge-small-en-v1.5 --texts texts.txt --pooling cls
    python examples/embeddings.py --toy

``texts.txt`` has a text per line, at least 64.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from toy import model as toy_model
from toy import texts as toy_texts
from transformers import AutoModel, AutoTokenizer

import token_pruning as tp


def embed(model: Any, tokenizer: Any, texts: list[str], pooling: str) -> tuple[Tensor, float]:
    """``[texts, dim]`` of length 1, and the milliseconds that took."""
    start, vectors = time.perf_counter(), []
    for first in range(0, len(texts), 32):
        batch = tokenizer(texts[first : first + 32], padding=True, truncation=True, return_tensors="pt")
        states = model(**batch).last_hidden_state
        if pooling == "cls":
            vectors.append(states[:, 0])
        else:  # over all tokens: a dropped one has the state it left with
            mask = batch["attention_mask"][:, :, None].to(states.dtype)
            vectors.append((states * mask).sum(1) / mask.sum(1))
    return normalize(torch.cat(vectors), dim=1), 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub name")
    parser.add_argument("--texts", type=Path, help="a text per line")
    parser.add_argument("--pooling", choices=("mean", "cls"), default="mean", help="as the model was trained")
    parser.add_argument("--toy", action="store_true", help="a tiny random model and random texts")
    parser.add_argument("--target-flops", type=float, default=0.7, help="relative FLOPs on valid tokens")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = toy_model(Path(folder), AutoModel) if arguments.toy else arguments.model
        texts = toy_texts(80) if arguments.toy else arguments.texts.read_text(encoding="utf-8").splitlines()
        model = AutoModel.from_pretrained(path, trust_remote_code=False).eval()
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)

    # Mean pooling reads every token's last state, CLS pooling the first token's only.
    reads = "first" if arguments.pooling == "cls" else "all"
    dense = tp.compile(model, reads=reads)
    examples = [tokenizer(text, truncation=True) for text in texts]
    found = tp.calibrate(model, examples, target_flops=arguments.target_flops, reads=reads)
    pruned = tp.compile(model)
    print(f"relative FLOPs {found.chosen.relative_flops:.2f}, tokens leave by {found.chosen.schedule.name}")

    for engine in (dense, pruned):
        embed(engine, tokenizer, texts, arguments.pooling)  # warm
    (before, slow), (after, fast) = (embed(engine, tokenizer, texts, arguments.pooling) for engine in (dense, pruned))
    cosine = (before * after).sum(1)
    print(f"dense {slow:.1f} ms, pruned {fast:.1f} ms for {len(texts)} texts")
    print(f"cosine to the dense vectors: mean {cosine.mean():.4f}, lowest {cosine.min():.4f}")


if __name__ == "__main__":
    main()
