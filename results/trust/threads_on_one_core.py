"""Milliseconds of one small call with more threads than there are cores: run it under ``taskset -c 0``."""

import os
import statistics
import time
import warnings

import torch
import transformers

import token_pruning as tp


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    config = transformers.BertConfig(
        num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536, vocab_size=3000
    )
    model = transformers.BertForSequenceClassification(config).eval()
    ids = torch.randint(5, 3000, (1, 32))
    engines = {threads: tp.compile(model, "float32", threads=threads) for threads in (1, 2, 8, 32)}
    seconds: dict[int, list[float]] = {threads: [] for threads in engines}
    for engine in engines.values():
        engine(ids)
    for _ in range(30):
        for threads, engine in engines.items():
            for _ in range(3):
                began = time.perf_counter()
                engine(ids)
                seconds[threads].append(time.perf_counter() - began)
    print(f"{len(os.sched_getaffinity(0))} cores; medians in ms by threads asked for:")
    print({threads: round(1000 * statistics.median(found), 2) for threads, found in seconds.items()})


if __name__ == "__main__":
    main()
