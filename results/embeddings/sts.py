"""Sentence embeddings pruned without training: Spearman's correlation on STS-B, before and after.

    python results/embeddings/sts.py --data-dir GLUE --output results/embeddings/sts

Mean pooling over every valid token's last state, dropped tokens' included. Thresholds are calibrated on 128 sentences
of the training set; figures are of all 1,500 pairs of the development set. Intervals are 95 % of 2,000 bootstrap
samples of pairs, the same for both models.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from scipy.stats import spearmanr

import token_pruning as tp
from token_pruning.engine.machine import cpu_name
from token_pruning.lab.data import find_minilm, find_mpnet, glue_task, load_glue_folder

TARGETS = (0.7,)
CALIBRATION_SENTENCES = 128


def embed(model: Any, tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    """``[sentences, dim]`` float32, normalised."""
    vectors = []
    for start in range(0, len(sentences), 64):
        batch = tokenizer(sentences[start : start + 64], padding=True, truncation=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        with torch.inference_mode():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(states.dtype)
        vectors.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(vectors)


def correlation(similarities: np.ndarray, scores: np.ndarray) -> float:
    return 100 * float(spearmanr(similarities, scores).statistic)


def measure(name: str, folder: Path, data: Any) -> list[dict[str, Any]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=False).eval()
    dev, train = data.validation["validation"], data.train
    first, second = list(dev.first), list(dev.second)
    scores = np.asarray(dev.labels, dtype=float)
    texts = random.Random(0).sample([*train.first, *train.second], CALIBRATION_SENTENCES)
    examples = [{"input_ids": ids} for ids in tokenizer(texts, truncation=True)["input_ids"]]

    def similarities() -> np.ndarray:
        return (embed(model, tokenizer, first) * embed(model, tokenizer, second)).sum(-1).numpy()

    dense_vectors = embed(model, tokenizer, first)
    dense = similarities()
    rows = [{"model": name, "what": "dense", "relative_flops": 1.0, "spearman": correlation(dense, scores)}]
    tp.prune(model, tp.Unpruned())
    unpruned_vectors = embed(model, tokenizer, first)
    rows.append(
        {
            "model": name,
            "what": "nothing dropped",
            "relative_flops": 1.0,
            "spearman": correlation(similarities(), scores),
            "largest_difference": float((unpruned_vectors - dense_vectors).abs().max()),
        }
    )
    tp.unprune(model)
    gate = tp.vocabulary_gate(model, examples)
    samples = np.random.default_rng(0).integers(len(scores), size=(2000, len(scores)))
    for target in TARGETS:
        for vocabulary in (None, gate):
            started = time.perf_counter()
            found = tp.calibrate(model, examples, target_flops=target, vocabulary=vocabulary)
            seconds = time.perf_counter() - started
            with tp.record(model) as trace:
                pruned = similarities()
            losses = [correlation(dense[s], scores[s]) - correlation(pruned[s], scores[s]) for s in samples]
            rows.append(
                {
                    "model": name,
                    "what": f"calibrated to {target}" + (", vocabulary tried" if vocabulary else ""),
                    "schedule": found.chosen.schedule.name,
                    "entering": found.chosen.entering,
                    "relative_flops": tp.count_flops(model, trace).relative,
                    "spearman": correlation(pruned, scores),
                    "loss_interval": np.quantile(losses, [0.025, 0.975]).tolist(),
                    "calibration_seconds": seconds,
                }
            )
            tp.unprune(model)
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["all-mpnet-base-v2", "all-MiniLM-L6-v2"])
    arguments = parser.parse_args()
    data = load_glue_folder(glue_task("STSB"), arguments.data_dir)
    folders = {"all-mpnet-base-v2": find_mpnet, "all-MiniLM-L6-v2": find_minilm}
    rows = [row for name in arguments.models for row in measure(name, Path(folders[name]()), data)]
    found = {
        "cpu": cpu_name(), "threads": torch.get_num_threads(), "dtype": "float32", "torch": torch.__version__,
        "transformers": transformers.__version__, "pairs": 1500, "rows": rows,
    }  # fmt: skip
    arguments.output.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
