"""Tiny random models with a tokenizer, so that the examples run offline. They rank and embed nothing of use."""

import random
from pathlib import Path

import torch
import transformers as hf

WORDS = [
    "the",
    "a",
    "of",
    "in",
    "on",
    "and",
    "to",
    "river",
    "bank",
    "money",
    "water",
    "bridge",
    "stone",
    "loan",
    "fish",
    "boat",
    "rate",
    "old",
    "new",
    "deep",
]


def texts(count: int, longest: int = 40, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, longest))) for _ in range(count)]


def model(folder: Path, kind: type, **settings: int) -> str:
    """A checkpoint of a four-layer BERT in ``folder``; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8")
    hf.BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    torch.manual_seed(0)
    config = hf.BertConfig(vocab_size=40, initializer_range=0.2, **sizes, **settings)
    kind.from_config(config).save_pretrained(folder)
    return str(folder)
