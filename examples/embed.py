"""An embedding model at 0.55 of its arithmetic: calibrate on your own texts, compile, encode, compare. Offline.

python examples/embed.py              # all-MiniLM-L6-v2 of token-pruning[demo]; some minutes on two cores
python examples/embed.py MODEL        # another folder or hub name
"""

import argparse
import time

from sentence_transformers import SentenceTransformer

import token_pruning as tp
from token_pruning.lab.data.docstrings import load_docstrings
from token_pruning.lab.data.minilm import find_minilm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder or hub name of a SentenceTransformer")
    parser.add_argument("--texts", type=int, default=500, help="to calibrate with, and as many to compare on")
    arguments = parser.parse_args()
    model = SentenceTransformer(str(arguments.model or find_minilm()), device="cpu")
    docstrings = load_docstrings().train.first  # of Python's own library
    texts, others = docstrings[: arguments.texts], docstrings[arguments.texts :][: arguments.texts]

    start = time.perf_counter()
    dense = model.encode(others, normalize_embeddings=True)
    installed = time.perf_counter() - start
    tp.calibrate(model, texts, target_flops=0.55)
    fast = tp.compile(model)
    start = time.perf_counter()
    with tp.record(fast) as trace:
        vectors = fast.encode(others, normalize_embeddings=True)
    print(f"{time.perf_counter() - start:.1f} s at {tp.count_flops(fast, trace).relative:.2f} of the FLOPs")
    print(f"{installed:.1f} s as installed; cosine to its vectors: mean {(dense * vectors).sum(1).mean():.4f}")


if __name__ == "__main__":
    main()
