"""The reranker of the benchmark: all-MiniLM-L6-v2 fine-tuned on a few thousand question × paragraph pairs.

No trained reranker comes in a package, so that one has to be made. It has learned nothing about pruning.
"""

import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from sentence_transformers import CrossEncoder
from torch.nn.functional import binary_cross_entropy_with_logits

import token_pruning as tp
from token_pruning.lab.data import find_minilm

LEARNING_RATE, BATCH_SIZE, WARM_UP, MAX_TOKENS = 1e-4, 32, 0.1, 256
SORTED_TOGETHER = 8 * BATCH_SIZE
DONE = "trained"


def train(pairs: Sequence[tuple[str, str, bool]], folder: Path, *, seed: int = 0) -> float:
    """One epoch of binary cross-entropy, AdamW, float32; the model goes to ``folder``. Returns the seconds it took."""
    torch.manual_seed(seed)
    model = CrossEncoder(str(find_minilm()), num_labels=1, device="cpu", local_files_only=True)
    model.max_seq_length = MAX_TOKENS
    batches = by_length(pairs, seed)
    steps = len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARM_UP * steps), (steps - step) / ((1 - WARM_UP) * steps))
    )
    model.train()
    started = time.perf_counter()
    for step, batch in enumerate(batches):
        features = model.preprocess([(question, passage) for question, passage, _ in batch])
        scores = model(features)["scores"].squeeze(-1)
        loss = binary_cross_entropy_with_logits(scores, torch.tensor([float(own) for *_, own in batch]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            print(
                f"step {step + 1} of {steps}, loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True
            )
    seconds = time.perf_counter() - started
    model.max_seq_length = model[0].config.max_position_embeddings
    model.save_pretrained(str(folder))
    (folder / DONE).touch()
    return seconds


def by_length(pairs: Sequence[tuple[str, str, bool]], seed: int) -> list[list[tuple[str, str, bool]]]:
    """Full batches of pairs about as long, which need little padding, in random order."""
    ordered = [
        pair
        for start in range(0, len(pairs), SORTED_TOGETHER)
        for pair in sorted(pairs[start : start + SORTED_TOGETHER], key=lambda pair: len(pair[1]))
    ]
    batches = [ordered[start : start + BATCH_SIZE] for start in range(0, len(ordered) - BATCH_SIZE + 1, BATCH_SIZE)]
    random.Random(seed).shuffle(batches)
    return batches


def load(folder: Path) -> CrossEncoder:
    """The trained model in evaluation mode.

    Raises:
        CheckpointError: if ``folder`` holds none.
    """
    if not (folder / DONE).exists():
        raise tp.CheckpointError(f"{folder}: no trained model; run `python benchmarks/reranking.py train` first")
    model = CrossEncoder(str(folder), device="cpu", local_files_only=True)
    return model.eval()
