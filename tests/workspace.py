"""A checkpoint and data small enough to train on in a second, as a user would have them on disk."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from tests.tiny import tiny_config
from token_pruning.lab.training.run_dir import RunDir

WORDS = ["good", "bad", "fine", "dull", "cat", "dog", "sat", "ran", "on", "the", "mat", "road"]
MANY_WORDS = [f"w{number}" for number in range(150)]  # of write_transformers' models
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_checkpoint(folder: Path, *, labels: int = 2, head: str = "sequence", **keys: Any) -> Path:
    """A tiny BERT with a tokenizer; ``keys`` are written into config.json as a user would by hand."""
    config = tiny_config("bert", num_labels=labels, vocab_size=40, max_position_embeddings=130, hidden_dropout_prob=0.0)
    config.attention_probs_dropout_prob = 0.0
    classes = {"sequence": hf.AutoModelForSequenceClassification, "encoder": hf.AutoModel}
    hf.set_seed(0)
    classes[head].from_config(config).save_pretrained(folder)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(SPECIAL + WORDS) + "\n", encoding="utf-8")
    hf.BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    edit_config(folder, **keys)
    return folder


def write_transformers(home: Path, encoder: str, *, layers: int, longest: int, **settings: float) -> Path:
    """Folders for sentence-transformers, each with a tokenizer: ``encoder``, ``ranker`` and ``classifier``.

    Args:
        home: the folder around them.
        encoder: the name of the one without a head.
        layers: of each model.
        longest: tokens that the tokenizer truncates to.
        settings: of the config.
    """
    tokenizer = hf.BertTokenizerFast(
        vocab={word: i for i, word in enumerate(SPECIAL + MANY_WORDS)}, model_max_length=longest
    )
    config = tiny_config("bert", layers=layers, **settings)
    torch.manual_seed(0)
    for name, kind, labels in (
        (encoder, hf.AutoModel, 3),
        ("ranker", hf.AutoModelForSequenceClassification, 1),
        ("classifier", hf.AutoModelForSequenceClassification, 3),
    ):
        config.num_labels = labels
        kind.from_config(config).save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    return home


def assert_same_training(one: dict[str, Tensor], two: dict[str, Tensor], atol: float = 2e-5) -> None:
    """The weights that two runs end with, equal but for rounding, of which Adam makes up to a fifth of a step here."""
    assert one.keys() == two.keys()
    for name in one:
        if not name.endswith("key.bias"):  # softmax ignores it, so all of its gradient is rounding
            assert (one[name] - two[name]).abs().max() <= atol, name


class Killed(BaseException):
    """As sudden as a signal, but in this process."""


@contextmanager
def killed_before_publishing(number: int) -> Iterator[None]:
    """A run inside is killed before its so-manieth checkpoint, counted from 1, appears under its name."""
    publish, calls = RunDir.publish, []

    def die(self: RunDir, staging: Path) -> Path:
        calls.append(staging)
        if len(calls) == number:
            raise Killed
        return publish(self, staging)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunDir, "publish", die)
        yield


def edit_config(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | keys), encoding="utf-8")


def write_sst2(folder: Path, *, train: int = 32, dev: int = 12) -> Path:
    """SST-2 in the official layout; the label is whether the sentence starts with "good"."""
    rng = random.Random(0)
    for name, count in (("train", train), ("dev", dev)):
        rows = []
        for number in range(count):
            words = [rng.choice(WORDS) for _ in range(rng.randint(1, 8))]
            rows.append(f"{' '.join(['good' if number % 2 else 'bad', *words])} \t{number % 2}")
        file = folder / "SST-2" / f"{name}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(["sentence\tlabel", *rows]) + "\n", encoding="utf-8")
    return folder


def write_stsb(folder: Path) -> Path:
    header = [
        "index",
        "genre",
        "filename",
        "year",
        "old_index",
        "source1",
        "source2",
        "sentence1",
        "sentence2",
        "score",
    ]
    rng = random.Random(0)
    for name, count in (("train", 24), ("dev", 10)):
        rows = [
            [*"fghijkl", " ".join(rng.choices(WORDS, k=3)), " ".join(rng.choices(WORDS, k=4)), f"{number % 6}"]
            for number in range(count)
        ]  # fmt: skip
        file = folder / "STS-B" / f"{name}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join("\t".join(row) for row in [header, *rows]) + "\n", encoding="utf-8")
    return folder


def write_mnli(folder: Path) -> Path:
    columns = "index promptID pairID genre s1b s2b s1p s2p sentence1 sentence2 label1"
    names = ["entailment", "neutral", "contradiction"]
    rng = random.Random(0)
    for name, extra, count in (("train", "", 18), ("dev_matched", " label2 label3 label4 label5", 9),
                               ("dev_mismatched", " label2 label3 label4 label5", 6)):  # fmt: skip
        header = (columns.replace("s1b s2b s1p s2p", "sentence1_binary_parse sentence2_binary_parse sentence1_parse "
                                  "sentence2_parse") + extra + " gold_label").split()  # fmt: skip
        rows = []
        for i in range(count):
            row = dict.fromkeys(header, "x")
            row |= {"sentence1": " ".join(rng.choices(WORDS, k=3)), "sentence2": rng.choice(WORDS)}
            row["gold_label"] = names[i % 3]
            rows.append("\t".join(row[column] for column in header))
        file = folder / "MNLI" / f"{name}.tsv"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(["\t".join(header), *rows]) + "\n", encoding="utf-8")
    return folder
