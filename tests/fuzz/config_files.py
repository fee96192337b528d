"""Broken checkpoints and command lines, many of them: ``python -m tests.fuzz.config_files --seconds 600 --seed 0``.

Each case changes one or two things in the files of a tiny checkpoint, or in a command line, and runs the command in
this process. It fails if an exception gets out, the exit status is not 0 or 2, a refusal is not one line, a result is
not a number, or an unpruned result is not what transformers alone computes from the same files. A case comes from the
seed and its number alone: ``--case 17`` runs one of them again and says what it was.
"""

import argparse
import copy
import faulthandler
import io
import json
import logging
import math
import os
import random
import shutil
import signal
import struct
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_config
from tests.workspace import SPECIAL, WORDS
from token_pruning.lab.cli import main

TEXTS = ["good cat sat", "bad road"]
_SLOW = 60  # seconds for one case
_SIZES = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 24,
    "max_position_embeddings": 40,
}  # fmt: skip
_DISTILBERT = {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 8, "vocab_size": 24, "max_position_embeddings": 40}
_METHODS: dict[str, dict[str, Any]] = {
    "bert": {"prune_mode": "absolute_threshold", "final_token_threshold": 0.002},
    "roberta": {"prune_mode": "topk", "token_keep_rate": 0.3, "keep_all_layers": 1},
    "distilbert": {"prune_mode": "threshold", "token_threshold": 0.3},
    "modernbert": {"prune_mode": "rising_threshold", "final_token_threshold": 0.4},
    "deberta-v2": {"prune_mode": "absolute_threshold", "thresholds": [0.001, 0.002], "summary_tokens": "segment"},
    "electra": {
        "prune_mode": "absolute_threshold", "thresholds": [0.001, 0.002], "scoring_mode": "mean_norm",
        "budgets": [
            {"relative_flops": 0.5, "thresholds": [0.001, 0.002]}, {"relative_flops": 1.0, "thresholds": [0, 0]}
        ],
    },
    "ernie": {
        "prune_mode": "absolute_threshold", "thresholds": [0.001, 0.002], "protect": ["separators"],
        "received_from": "first_segment", "departed": "survivors", "max_tokens": 16,
    },
    "camembert": {
        "prune_mode": "absolute_threshold", "thresholds": [-0.5, 0.5], "vocabulary_threshold": 0.1, "departed": "map",
        "probe_layers": [1, 2], "map_layers": [0, 1, 2], "context_layers": [0, 1],
    },
}  # fmt: skip
# What stands beside the weights of the last of them.
_FITTED = {
    "thresholds": torch.tensor([-0.5, 0.5]), "vocabulary_scores": torch.linspace(0, 1, 24),
    "probe_weights": torch.ones(2, 9), "map_weights": torch.ones(3, 8, 9), "correction_weights": torch.eye(8, 9),
    "context_down": torch.ones(2, 3, 9), "context_up": torch.ones(2, 16, 4),
}  # fmt: skip
# Keys that are looked at besides those that a file has.
_KEYS = [
    "prune_mode", "masking_mode", "final_token_threshold", "thresholds", "token_keep_rate", "token_threshold",
    "keep_all_layers", "scoring_mode", "max_seq_length", "summary_tokens", "prune_layers", "vocabulary_threshold",
    "threshold_temperature", "protect", "received_from", "departed", "max_tokens", "chunks", "probe_layers",
    "map_layers", "context_layers", "reads", "id2label", "label2id", "num_labels", "problem_type", "dtype",
    "torch_dtype", "quant_mode", "quantization_config", "auto_map", "is_decoder", "return_dict", "use_return_dict",
    "use_cache", "output_attentions", "output_hidden_states", "pruned_heads", "tie_word_embeddings",
    "chunk_size_feed_forward", "add_cross_attention", "cross_attention_hidden_size", "torchscript",
    "attn_implementation", "_attn_implementation", "transformers_weights", "architectures", "model_type",
    "pad_token_id", "type_vocab_size", "hidden_act", "layer_norm_eps", "hidden_dropout_prob", "classifier_dropout",
    "position_embedding_type", "rope_parameters", "rope_theta", "layer_types", "sliding_window", "embedding_size",
    "prune_kwargs", "prunemode", "token_keep_rates", "final_token_treshold", "scoringmode", "transformers_version",
    "_name_or_path", "initializer_range", "head_dim", "tokenizer_class", "max_length", "bos_token_id", "eos_token_id",
    "finetuning_task", "task_specific_params", "base_model_tp_plan", "attribute_map", "sub_configs", "per_layer_config",
    "num_key_value_heads", "budgets",
]  # fmt: skip
_VALUES: list[Any] = [
    None, True, False, 0, 1, 2, 3, -1, 7, 10**6, 10**9, 2**31, 2**63, 10**30, 0.0, 0.5, 1.5, -0.1, 1e-9, 1e300,
    math.nan, math.inf, -math.inf, "", " ", "abc", "0", "2", "0.5", "nan", "none", "topk", "threshold", "soft", "hard",
    "absolute_threshold", "rising_threshold", "mean", "mean_norm", "relative", "shared", "segment", "first", "all",
    "separators", "first_segment", "state", "survivors", "map", ["separators"], ["first_segment", "separators"], 16, 24,
    "gelu", "relu", "silu", "linear", "float16", "bfloat16", "float32", "float64", "int8", "auto", "eager", "sdpa",
    "flash_attention_2", "regression", "single_label_classification", "multi_label_classification", "bert", "roberta",
    "distilbert", "gpt2", "ibert", "modernbert", "ü\u2028\x00", "\ud800", "../../etc/passwd", "a\nb", "[PAD]",
    "x" * 5000, [], {}, [None], [0], [1, 2], [0.001, 0.002], [0.1], ["a"], ["a", "b"], [[1]], [True], [math.nan, 0],
    {"0": "a"}, {"0": "a", "1": "b"}, {"1": "a", "0": "b"}, {"0": "a", "2": "b"}, {"0": 0, "1": 1},
    {"0": "a", "1": "a"}, {"a": 0, "b": 1}, {"a": "b"}, {"x": {"y": {"z": []}}}, {"0": ["q"]}, ["BertModel"],
    ["BertTokenizer"], ["RobertaForSequenceClassification"], ["AutoModel"], ["AutoTokenizer"], ["pipeline"],
    ["PreTrainedModel"], ["BertForMaskedLM"],
    {"AutoModel": "code.Own", "AutoTokenizer": ["code.Own", None], "AutoConfig": "code.Own"},
    {"quant_method": "bitsandbytes", "load_in_8bit": True}, {"rope_type": "default", "rope_theta": 10.0},
    {"special": True}, {"content": "[PAD]"}, {"type": "Nonsense"}, [{"relative_flops": 0.5, "thresholds": [0, 1]}],
    [{"relative_flops": 2, "thresholds": [0, 1]}], [{"relative_flops": 0.5, "thresholds": [0]}],
]  # fmt: skip
_WORDS = [
    "", " ", "0", "-1", "-3", "1", "2", "nan", "inf", "-inf", "1e400", "abc", "none", "soft", "hard", "mixed", "topk",
    "4294967296", "99999999999999999999", "0.5", "1.5", "1e-5", "1e30", "threshold", "absolute_threshold", "step-1",
    "0,1", "drain", "missing", "texts.txt", "CKPT", ".", "ü", "--dense", "-", "--", "x.csv", "mean", "relative",
    "segment", "first_segment", "survivors", "map", "16", "0x10", "1_0", "٣", "True",
]  # fmt: skip
_OPTIONS = [
    "--restore", "--input", "--output", "--dense", "--bs", "--batch-size", "--batch_size", "--max-length",
    "--max_length", "--bf16", "--masking-mode", "--masking_mode", "--arch", "--task", "--train-file",
    "--validation-file", "--data-dir", "--lr", "--epoch", "--epochs", "--train-length-quantile", "--weight-decay",
    "--seed", "--save-step", "--save-all", "--no-load", "--vocabulary-keep-rate", "--target-flops", "--schedule",
    "--budget-input", "--no-teacher", "--lambda", "--temperature", "--lr-threshold", "--weight-decay-threshold",
    "--teacher", "--distillation-weight", "--distillation-temperature", "--prune-mode", "--final-token-threshold",
    "--thresholds", "--token-keep-rate", "--token-threshold", "--scoring-mode", "--max-seq-length", "--summary-tokens",
    "--prune-layers", "--vocabulary-threshold", "--keep-all-layers", "--quantiles", "--samples", "--names",
    "--max-drop", "--examples", "--no-vocabulary", "--methods", "--trials", "--validate-on", "--prune-margin",
    "--study-name", "--received-from", "--departed", "--max-tokens", "--chunks", "--texts", "--inpu", "--restor",
    "--nonsense",
]  # fmt: skip


@dataclass
class Summary:
    """What came of a number of cases."""

    cases: int = 0
    refused: int = 0
    accepted: int = 0
    compared: int = 0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.cases} cases: {self.refused} refused, {self.accepted} accepted ({self.compared} compared with "
            f"transformers), {len(self.failures)} failures"
        )


class Fuzzer:
    """Tiny checkpoints in a folder of its own, and cases made from them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        self.bases = {family: _write_base(folder / family, family, keys) for family, keys in _METHODS.items()}
        (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
        (folder / "rows.csv").write_text(
            "text,label\ngood cat,1\nbad dog,0\nfine mat,1\ndull road,0\n", encoding="utf-8"
        )
        (folder / "pairs.csv").write_text("a,b\ngood cat,bad dog\nfine,dull road\n", encoding="utf-8")

    def case(self, seed: int, number: int) -> "Case":
        """One case: files that were changed, and a command line."""
        rng = random.Random(f"{seed}:{number}")
        case = self.unchanged(rng.choice([*self.bases, "bert", "bert"]), self._command(rng))
        argv, changes = case.argv, case.changes
        if rng.random() < 0.25:
            case.argv = _changed_words(rng, argv)
            changes.append("command line")
        else:
            for _ in range(rng.choice([1, 1, 1, 2])):
                with suppress(Exception):  # the second change may find nothing left to change
                    changes.append(rng.choice(_MUTATIONS)(rng, self.work / "CKPT"))
        return case

    def unchanged(self, family: str, argv: list[str]) -> "Case":
        """A family's checkpoint as it was made, and a command line; the folder is that of the last case."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.bases[family], self.work / "CKPT")
        return Case(self.work, argv, [], family)

    def _command(self, rng: random.Random) -> list[str]:
        chance = rng.random()
        if chance < 0.03:
            mode = rng.choice([["none"], ["hard"], ["soft", "--lambda", "0.1"]])
            return [
                "train", "--restore", "CKPT", "--masking-mode", *mode, "--train-file", "../rows.csv",
                "--validation-file", "../rows.csv", "--epochs", "1", "--bs", "4", "--max-length", "16",
                "--output-dir", "out",
            ]  # fmt: skip
        if chance < 0.15:
            return [
                "eval", "--restore", "CKPT", "--validation-file", "../rows.csv", "--max-length", "16",
                "--output-dir", "out", *rng.choice([[], ["--masking-mode", "none"]]),
            ]  # fmt: skip
        texts = rng.choice(["../texts.txt", "../texts.txt", "../pairs.csv"])
        return ["predict", "--restore", "CKPT", "--input", texts, "--max-length", "16", *rng.choice([[], ["--dense"]])]


@dataclass
class Case:
    """One changed checkpoint and the command that is run on it, in ``folder``."""

    folder: Path
    argv: list[str]
    changes: list[str]
    family: str

    def run(self, summary: Summary) -> str | None:
        """What is wrong, or None."""
        summary.cases += 1
        output, errors, logged = io.StringIO(), io.StringIO(), _Records()
        try:
            with (
                _inside(self.folder),
                _time_limit(),
                _logging_to(logged),
                redirect_stdout(output),
                redirect_stderr(errors),
            ):
                status = _status(self.argv)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return "".join(traceback.format_exception(error)[-14:])
        said = errors.getvalue()
        if status == 2:
            summary.refused += 1
            lines = [line for line in said.splitlines() if line.strip() and "evaluating:" not in line]
            lines = [line for line in lines if not line.startswith("../")]  # what was taken for what in a file
            return None if len(lines) == 1 and "error:" in said else f"status 2 with {said!r}"
        if status != 0:
            return f"status {status}: {said}"
        summary.accepted += 1
        if "Traceback" in said:
            return f"traceback in {said!r}"
        return self._wrong(output.getvalue(), summary) if self.argv[0] == "predict" else None

    def _wrong(self, text: str, summary: Summary) -> str | None:
        if "--output" in self.argv or any(not line.startswith("{") for line in text.splitlines()):
            return None
        rows = [json.loads(line, parse_constant=lambda name: math.nan) for line in text.splitlines()]
        numbers = [value for row in rows for value in _floats(row)]
        if not all(math.isfinite(value) for value in numbers):
            return f"not a number: {text}"
        if "--dense" not in self.argv or "command line" in self.changes:
            return None
        expected = _by_transformers(self.folder, self.argv)
        if expected is None:
            return None
        summary.compared += 1
        if any(not math.isfinite(value) for value in expected):
            return f"transformers gives {expected}, here it is {text}"
        found = [_largest(row) for row in rows]
        if any(abs(one - two) > 1e-3 * max(1.0, abs(two)) for one, two in zip(found, expected, strict=True)):
            return f"transformers gives {expected}, here it is {text}"
        return None


def run(fuzzer: Fuzzer, seed: int, numbers: Iterator[int] | range, until: float = math.inf) -> Summary:
    """Run cases until they end, or a moment of :func:`time.monotonic`."""
    summary = Summary()
    for number in numbers:
        if time.monotonic() > until:
            break
        case = fuzzer.case(seed, number)
        if problem := case.run(summary):
            summary.failures.append(
                f"case {number} ({case.family}; {'; '.join(case.changes)}): {' '.join(case.argv)}\n{problem}"
            )
    return summary


def _write_base(folder: Path, family: str, keys: dict[str, Any]) -> Path:
    special = {"pad_token_id": 0} if family != "modernbert" else {}
    sizes = _DISTILBERT if family == "distilbert" else _SIZES
    config = tiny_config(family, num_labels=2, **{**sizes, **special})
    hf.set_seed(0)
    hf.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(SPECIAL + WORDS) + "\n", encoding="utf-8")
    hf.BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    if family != "electra":  # whose tokenizer is there twice
        vocabulary.unlink()
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | keys), encoding="utf-8")
    if "probe_layers" in keys:
        _add_tensors(folder, _FITTED)
    return folder


def _add_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A method's tensors, among the weights."""
    file = folder / "model.safetensors"
    ours = {f"token_pruner.{name}": tensor for name, tensor in tensors.items()}
    save_file(load_file(file) | ours, file, {"format": "pt"})


def _status(argv: list[str]) -> int:
    try:
        return main(argv)
    except SystemExit as leaving:  # argparse's way
        return int(leaving.code or 0)


# Changes, each of which says what it did.


def _of_config(rng: random.Random, folder: Path) -> str:
    file = folder / "config.json"
    if rng.random() < 0.1:
        return _of_text(rng, file)
    config = json.loads(file.read_text(encoding="utf-8"))
    key = rng.choice([*config, *_KEYS])
    if rng.random() < 0.1:
        config.pop(key, None)
        said = f"config.json without {key}"
    elif rng.random() < 0.05:
        text = json.dumps(config)
        file.write_text(f'{{"{key}": {json.dumps(rng.choice(_VALUES))}, {text[1:]}', encoding="utf-8")
        return f"config.json with {key} twice"
    elif isinstance(config.get(key), list | dict | str) and rng.random() < 0.3:
        value = _bent(rng, config[key])
        config[key] = value
        said = f"config.json {key} = {value!r}"
    else:
        config[key] = rng.choice(_VALUES)
        said = f"config.json {key} = {config[key]!r}"[:300]
    file.write_text(json.dumps(config), encoding="utf-8")
    return said


def _of_json(name: str) -> Callable[[random.Random, Path], str]:
    def change(rng: random.Random, folder: Path) -> str:
        file = folder / name
        if not file.exists():
            file.write_text(json.dumps({"pad_token": "[PAD]", "unk_token": rng.choice(_VALUES)}), encoding="utf-8")
        if rng.random() < 0.15:
            return _of_text(rng, file)
        content = json.loads(file.read_text(encoding="utf-8"))
        said = _bend_inside(rng, content)
        file.write_text(json.dumps(content), encoding="utf-8")
        return f"{name}: {said}"[:300]

    return change


def _of_text(rng: random.Random, file: Path) -> str:
    """What happens to text, of whatever kind."""
    text = file.read_bytes()
    place = rng.randrange(len(text) + 1)
    kind = rng.choice(["truncated", "empty", "mark", "bytes", "deep", "number", "comma", "gone", "list", "folder"])
    if kind in ("gone", "folder"):
        file.unlink()
        if kind == "folder":
            file.mkdir()
        return f"{file.name} {kind}"
    changed = {
        "truncated": text[:place], "empty": b"", "mark": b"\xef\xbb\xbf" + text,
        "bytes": text[:place] + b"\xff\x00" + text[place:], "deep": b'{"a":' * 100_000,
        "number": text.replace(b"1", b"1" * 5000, 1), "comma": text[:-1] + b",}",
        "list": b"[" + text + b"]",
    }[kind]  # fmt: skip
    file.write_bytes(changed)
    return f"{file.name} {kind} at {place}"


def _of_weights(rng: random.Random, folder: Path) -> str:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    if rng.random() < 0.3:
        place = rng.choice([rng.randrange(8), rng.randrange(8 + size), rng.randrange(len(content))])
        if rng.random() < 0.5:
            file.write_bytes(content[:place])
            return f"weights cut at {place}"
        if place >= 8 + size:  # numbers are what they are
            place = 3
        file.write_bytes(content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :])
        return f"weights changed at {place}"
    header = json.loads(content[8 : 8 + size])
    name = rng.choice(list(header))
    entry = header[name]
    kind = rng.choice(["dtype", "shape", "offsets", "name", "gone", "value", "thresholds", "more"])
    if kind == "gone":
        del header[name]
    elif kind == "name":
        header[rng.choice(["", "x", "token_pruner.thresholds", name + ".weight", "pruner.keep_threshold"])] = (
            header.pop(name)
        )
    elif kind == "dtype":
        entry["dtype"] = rng.choice(["F16", "BF16", "I32", "I64", "U8", "BOOL", "F64", "F8_E4M3", "NONSENSE", 3, None])
    elif kind == "shape":
        entry["shape"] = rng.choice([[], [1], [0], [8, 8], [-1], [2**40], "8", None, entry.get("shape", [])[::-1]])
    elif kind == "offsets":
        entry["data_offsets"] = rng.choice([[0, 0], [0, 10**9], [-1, 3], [8, 4], None, "a"])
    elif kind == "value":
        header[name] = rng.choice(_VALUES)
    elif kind == "thresholds":
        for other, found in list(header.items()):
            if found.get("shape") in ([2], [8]) and other != "__metadata__":
                header[rng.choice(["token_pruner.thresholds", "token_pruner.vocabulary_scores"])] = header.pop(other)
                break
    else:
        header["extra"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    return f"weights {kind} of {name}"


def _of_folder(rng: random.Random, folder: Path) -> str:
    kind = rng.choice(["index", "adapter", "pickle", "generation", "added", "vocab", "thresholds"])
    if kind == "index":
        shards = {"a": rng.choice(["model.safetensors", "../x", "pytorch_model.bin", 3, "none.safetensors"])}
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        content = rng.choice(
            [{"weight_map": shards}, {}, {"weight_map": []}, [], {"weight_map": shards, "metadata": {}}]
        )
        (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")
    elif kind == "adapter":
        (folder / "adapter_config.json").write_text(json.dumps(rng.choice(_VALUES)), encoding="utf-8")
    elif kind == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif kind == "generation":
        (folder / "generation_config.json").write_text(
            json.dumps({"temperature": rng.choice(_VALUES)}), encoding="utf-8"
        )
    elif kind == "added":
        added = {rng.choice(["new", "[PAD]", ""]): rng.choice([20, 24, 25, 10**6, -1, "a", None])}
        (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    elif kind == "vocab":
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.txt").write_text(
            rng.choice(["", "a", "\n\n", "[PAD]\n[PAD]\n", "[UNK]\nb\n" * 30]), encoding="utf-8"
        )
    else:
        name = rng.choice([*_FITTED, "thresholds"])
        shapes = [(2,), (1,), (), (2, 2), (0,), (24,), (2, 9), (3, 9), (2, 8, 9), (3, 8, 9), (8, 9), (9, 8)]
        shapes += [(2, 3, 9), (2, 16, 4), (2, 16, 5)]
        tensor = torch.rand(rng.choice(shapes)) / 500
        if rng.random() < 0.3:
            tensor.fill_(rng.choice([math.nan, math.inf, 1e30]))
        _add_tensors(folder, {name: tensor.to(rng.choice([torch.float32, torch.float32, torch.float16, torch.int64]))})
    return f"folder: {kind}"


_MUTATIONS: list[Callable[[random.Random, Path], str]] = [
    *[_of_config] * 10,
    *[_of_json("tokenizer.json")] * 3,
    *[_of_json("tokenizer_config.json")] * 3,
    _of_json("special_tokens_map.json"),
    *[_of_weights] * 3,
    _of_folder,
]


def _bend_inside(rng: random.Random, content: Any) -> str:
    """Change one value somewhere inside a JSON object, in place."""
    path, place = [], content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return "nothing"
        key = rng.choice(keys)
        path.append(key)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        if rng.random() < 0.15:
            del place[key]
            return f"{path} deleted"
        place[key] = _bent(rng, place[key]) if rng.random() < 0.3 else copy.deepcopy(rng.choice(_VALUES))
        return f"{path} = {place[key]!r}"


def _bent(rng: random.Random, value: Any) -> Any:
    """Nearly the same value."""
    if isinstance(value, bool) or value is None:
        return rng.choice(_VALUES)
    if isinstance(value, int | float):
        return rng.choice([value + 1, value - 1, -value, value * 1000, str(value), float(value), [value]])
    if isinstance(value, str):
        return rng.choice([value[:-1], value + "s", value.upper(), [value], value * 2])
    if isinstance(value, list):
        return rng.choice(
            [value[:-1], [*value, *value], value[::-1], [rng.choice(_VALUES)], dict.fromkeys(map(str, value))]
        )
    keys = list(value)
    return rng.choice(
        [dict(list(value.items())[:-1]), keys, {**value, "new": rng.choice(_VALUES)}, dict.fromkeys(keys)]
    )


def _changed_words(rng: random.Random, argv: list[str]) -> list[str]:
    argv = list(argv)
    for _ in range(rng.choice([1, 1, 2, 3])):
        kind = rng.choice(["value", "option", "option", "option", "gone", "command", "twice"])
        place = rng.randrange(1, len(argv))
        if kind == "value":
            argv[place] = rng.choice(_WORDS)
        elif kind == "option":
            argv[place:place] = [rng.choice(_OPTIONS), *rng.choice([[], [rng.choice(_WORDS)], [rng.choice(_WORDS)]])]
            if rng.random() < 0.7:  # at the end it stands alone
                argv = [*argv[:1], *argv[place + 2 :], *argv[1 : place + 2]]
        elif kind == "gone" and len(argv) > 2:
            del argv[place]
        elif kind == "command":
            argv[0] = rng.choice(["predict", "eval", "analyze", "calibrate", "nonsense", "train"])
        else:
            argv += argv[place:]
    return argv


# What transformers alone makes of the same files.


def _by_transformers(folder: Path, argv: list[str]) -> list[float] | None:
    level = hf.logging.get_verbosity()
    hf.logging.set_verbosity(hf.logging.CRITICAL)
    try:
        with _inside(folder), torch.no_grad(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            model = hf.AutoModelForSequenceClassification.from_pretrained(
                "CKPT", dtype=torch.float32, trust_remote_code=False, use_safetensors=True
            ).eval()
            tokenizer = hf.AutoTokenizer.from_pretrained("CKPT", trust_remote_code=False)
            pairs = [line.split(",") for line in Path(argv[4]).read_text(encoding="utf-8").splitlines()]
            first = [pair[0] for pair in pairs]
            second = [pair[1] for pair in pairs] if len(pairs[0]) > 1 else None
            if second is not None:
                first, second = first[1:], second[1:]
            batch = tokenizer(first, second, padding=True, truncation=True, max_length=16, return_tensors="pt")
            logits = model(**batch).logits
            if logits.shape[1] == 1:
                return [float(value) for value in logits[:, 0]]
            meaning = {"multi_label_classification": logits.sigmoid(), "regression": logits}
            outputs = meaning.get(str(model.config.problem_type), logits.softmax(-1))
            return [float(value) for value in outputs.max(-1).values]
    except Exception:
        return None
    finally:
        hf.logging.set_verbosity(level)


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _floats(inner)
    elif isinstance(value, float):
        yield value


def _largest(row: dict[str, Any]) -> float:
    return max(_floats(row), default=math.nan)


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def _logging_to(handler: logging.Handler) -> Iterator[None]:
    """Whoever had a handler before has it again afterwards."""
    root, theirs = logging.getLogger(), logging.getLogger("transformers")
    before, before_theirs = root.handlers[:], theirs.handlers[:]
    root.handlers, theirs.handlers = [handler], [handler]
    try:
        yield
    finally:
        root.handlers, theirs.handlers = before, before_theirs


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class _TooLong(BaseException):
    pass


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _TooLong(f"more than {_SLOW} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SLOW)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one alone")
    given = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    hf.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder))
        numbers: Any = range(10**9) if given.case is None else [given.case]
        summary = run(fuzzer, given.seed, numbers, time.monotonic() + given.seconds)
        if given.case is not None:
            case = fuzzer.case(given.seed, given.case)
            print(case.changes, " ".join(case.argv))
    kinds = Counter(failure.strip().splitlines()[-1][:150] for failure in summary.failures)
    for failure in summary.failures:
        print(failure)
    for kind, count in kinds.most_common():
        print(f"{count} × {kind}")
    print(f"seed {given.seed}, {given.seconds:g} s: {summary}")
    return 1 if summary.failures else 0


if __name__ == "__main__":
    raise SystemExit(_main())
