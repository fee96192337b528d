"""transformers' own common model tests, on pruned models that drop nothing.

``ModelTesterMixin`` of transformers' ``tests/test_modeling_common.py`` holds every model of that library to some 200
rules: saving, loading, copying, training, resizing, padding, outputs. Here every model those tests build is pruned by
``tp.Unpruned()`` as soon as it is built. Nothing is dropped, so a pruned model has to pass what the plain one passes.

    python results/trust/common_tests.py 2>/dev/null

The tests come with the sdist of the installed transformers, which pip downloads into a temporary folder. The sdist has
no model's own test file; the small configs below stand in for them.

The exit status is 1 if a test fails on pruned models, passes on plain ones, and is not in :data:`EXPECTED`.
"""

import argparse
import functools
import importlib
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import types
import unittest
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers.models.auto import modeling_auto

import token_pruning as tp

BATCH, WIDTH, VOCABULARY, CHOICES = 5, 7, 99, 4
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 37, "max_position_embeddings": 64, "type_vocab_size": 2,
}  # fmt: skip
IDS = {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "cls", "sep", "mask"))}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37},
    "electra": {"embedding_size": 16},
    "mpnet": {},
    "albert": {"embedding_size": 16, "num_hidden_groups": 2},
    "deberta-v2": {**DISENTANGLED, "max_relative_positions": 16},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2, **IDS},
    "nomic_bert": {},
    "xlm-roberta": {},
    "camembert": {},
    "data2vec-text": {},
    "deberta": {**DISENTANGLED, "max_relative_positions": 16},
    "ernie": {"use_task_id": True},
    "eurobert": {"num_key_value_heads": 2, "head_dim": 8, **IDS},
    "gte": {},
    "jina_embeddings_v3": {},
    "megatron-bert": {},
    "xlm-roberta-xl": {},
    "vit": {"image_size": 16, "patch_size": 4, "encoder_stride": 4},
    "deit": {"image_size": 16, "patch_size": 4, "encoder_stride": 4},
}
HEADS = ("", "_FOR_PRETRAINING", "_FOR_MASKED_LM", "_FOR_SEQUENCE_CLASSIFICATION", "_FOR_TOKEN_CLASSIFICATION",
         "_FOR_QUESTION_ANSWERING", "_FOR_MULTIPLE_CHOICE", "_FOR_NEXT_SENTENCE_PREDICTION",
         "_FOR_IMAGE_CLASSIFICATION", "_FOR_MASKED_IMAGE_MODELING")  # fmt: skip
LAST_STATES = "packed, last states"
EXECUTIONS = ("packed", LAST_STATES, "masked")

# What a pruned model does otherwise on purpose: the execution ("" for both), a pattern of the tests' names, a pattern
# of what they fail with, and the reason.
EXPECTED: list[tuple[str, str, str, str]] = [
    (
        "packed", ".*", r"output_(attentions|hidden_states)=True is not possible in packed execution",
        "packed execution has no hidden states or attentions to give: its layers hold different tokens",
    ),
    (
        "", "test_model_rope_scaling_from_config_1_dynamic", "rope_type 'dynamic' cannot be pruned",
        "dynamic rotary positions depend on the longest text of a batch: refused",
    ),
    (
        "", "test_training_gradient_checkpointing.*", "has forward pre hooks, which would be skipped",
        "the test hooks into every layer; pruning computes layers itself, and refuses hooks it would skip",
    ),
]  # fmt: skip

# Tests that ask packed execution for hidden states only along the way: run again without asking.
ASK_FOR_LAST_STATES = ("test_batching_equivalence", "test_model_outputs_equivalence")


class Tester:
    """What the tests ask for a model: a config and a batch, with holes in its mask."""

    batch_size, seq_length, num_choices, num_hidden_layers = BATCH, WIDTH, CHOICES, 2
    hidden_size, num_attention_heads, vocab_size, is_training = 32, 4, VOCABULARY, True
    image_size, patch_size, num_masks, mask_length = 16, 4, 8, 16

    def __init__(self, family: str) -> None:
        self.family = family
        self.of_images = "image_size" in FAMILIES[family]
        if self.of_images:
            self.seq_length = (self.image_size // self.patch_size) ** 2 + 1 + (family == "deit")

    def get_config(self) -> Any:
        """A config of the family, small."""
        sizes = {**SIZES, **FAMILIES[self.family]}
        if self.family == "distilbert":
            sizes = {n: x for n, x in sizes.items() if n not in hf.DistilBertConfig.attribute_map}
        return hf.AutoConfig.for_model(self.family, **sizes)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """As the models' own test files make them: random ids, and a random mask that has the first column."""
        if self.of_images:
            return self.get_config(), {"pixel_values": torch.rand(BATCH, 3, self.image_size, self.image_size)}
        ids = torch.randint(6, VOCABULARY, (BATCH, WIDTH))
        mask = torch.randint(0, 2, (BATCH, WIDTH))
        mask[:, 0] = 1
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


def model_classes(family: str) -> tuple[type, ...]:
    """All encoders of a family: its base model and those with heads."""
    found: dict[type, None] = {}
    for head in HEADS:
        name = getattr(modeling_auto, f"MODEL{head}_MAPPING_NAMES").get(family)
        for one in (name,) if isinstance(name, str) else name or ():
            if one.endswith("WithTeacher"):  # DeiT's, which has no loss
                continue
            found[getattr(hf, one)] = None
    return tuple(found)


@contextmanager
def built_pruned(classes: tuple[type, ...], execution: str | None) -> Iterator[None]:
    """Every model of these classes that is built inside the block is pruned at the end of its ``__init__``.

    Of a model within a model only the outer one is; for None, none.
    """
    own = {cls: cls.__init__ for cls in classes if execution is not None}
    wanted = {"output_hidden_states": False, "output_attentions": False}
    depth = 0

    def wrapped(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def build(self: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal depth
            depth += 1
            try:
                init(self, *args, **kwargs)
            finally:
                depth -= 1
            if depth == 0:
                if execution == LAST_STATES:
                    self.config.update(wanted)
                tp.prune(self, tp.Unpruned(), execution=execution.partition(",")[0])

        return build

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return torch.nn.Module.__call__(self, *args, **{**kwargs, **wanted})

    for cls, init in own.items():
        cls.__init__ = wrapped(init)  # type: ignore[misc]
        if execution == LAST_STATES:
            cls.__call__ = call
    try:
        yield
    finally:
        for cls, init in own.items():
            cls.__init__ = init
            if "__call__" in cls.__dict__:
                del cls.__call__


class Results(unittest.TestResult):
    """Per test ``""`` if it passed, ``None`` if it was skipped, else what it failed with."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str | None] = {}

    def startTest(self, test: Any) -> None:
        super().startTest(test)
        self.found.setdefault(name_of(test), "")

    def addSkip(self, test: Any, reason: str) -> None:
        self.found[name_of(test)] = self.found.get(name_of(test)) or None

    def _failed(self, test: Any, error: Any) -> None:
        self.found[name_of(test)] = f"{error[0].__name__}: {error[1]}".strip()

    def addError(self, test: Any, err: Any) -> None:
        self._failed(test, err)

    def addFailure(self, test: Any, err: Any) -> None:
        self._failed(test, err)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self._failed(test, err)


def name_of(test: Any) -> str:
    return str(test.id().rpartition(".")[2])


def run(mixin: type, family: str, execution: str | None, only: str) -> dict[str, str | None]:
    """Every test of the mixin on the models of a family; see :class:`Results`."""
    classes = model_classes(family)

    def prepare(self: Any, inputs: Any, model_class: Any, return_labels: bool = False) -> Any:
        inputs = mixin._prepare_for_class(self, inputs, model_class, return_labels)
        if return_labels and model_class.__name__.endswith("ForPreTraining"):  # as the models' own test files do
            inputs["labels"] = torch.zeros(BATCH, WIDTH, dtype=torch.long)
            for name in {"next_sentence_label", "sentence_order_label"} & {*signature(model_class.forward).parameters}:
                inputs[name] = torch.zeros(BATCH, dtype=torch.long)
        return inputs

    members = {
        "all_model_classes": classes,
        "_prepare_for_class": prepare,
        "test_resize_embeddings": not Tester(family).of_images,
        "setUp": lambda self: setattr(self, "model_tester", Tester(family)),
    }
    case = type(f"{family}ModelTest", (mixin, unittest.TestCase), members)
    names = [name for name in unittest.TestLoader().getTestCaseNames(case) if re.search(only, name)]
    results = Results()
    with built_pruned(classes, execution), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unittest.TestSuite(map(case, names)).run(results)
    return results.found


def common_tests(folder: Path) -> type:
    """``ModelTesterMixin`` of an unpacked sdist; what it imports besides and the sdist has not, is empty."""
    sys.path.insert(0, str(folder))
    for name, member in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        if not (folder / "tests" / name.replace(".", "/")).with_suffix(".py").exists():
            package = name.partition(".")[0]
            sys.modules[f"tests.{package}"] = types.ModuleType(f"tests.{package}")
            sys.modules[f"tests.{name}"] = module = types.ModuleType(f"tests.{name}")
            setattr(module, member, type(member, (), {}))
    found: type = importlib.import_module("tests.test_modeling_common").ModelTesterMixin
    return found


def download(folder: Path) -> Path:
    """The sdist of the installed transformers, unpacked; and ``parameterized``, which its tests import."""
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    sdist = f"transformers=={hf.__version__}"
    subprocess.run([*pip, "download", "--no-deps", "--no-binary", ":all:", "--dest", folder, sdist], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", "parameterized"], check=True)
    sys.path.append(str(folder / "site"))
    with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.glob("transformers-*") if path.is_dir())


def reason_for(execution: str, test: str, error: str) -> str | None:
    """Why a pruned model fails a test by design; None if it should not."""
    for where, name, message, reason in EXPECTED:
        if where in ("", execution) and re.fullmatch(name, test) and re.search(message, error):
            return reason
    return None


def main() -> int:
    """Run them and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help="transformers' sdist, unpacked; downloaded unless given")
    parser.add_argument("--family", action="append", choices=[*FAMILIES], help="may be given again; default: all")
    parser.add_argument("--only", default="", help="a pattern of tests' names")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        mixin = common_tests(options.sdist or download(Path(scratch)))
        return report(mixin, options.family or [*FAMILIES], options.only)


def report(mixin: type, families: list[str], only: str) -> int:
    """One row per family and execution, then what failed."""
    print("| family | models | execution | passed | skipped | plain fails too | expected | unexpected | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    reasons: Counter[str] = Counter()
    plain_failures: dict[str, list[str]] = {}
    unexpected: list[str] = []
    for family in families:
        plain = run(mixin, family, None, only)
        for test, error in plain.items():
            if error:
                plain_failures.setdefault(f"`{one_name(test)}`: {first_line(error)}", []).append(family)
        for execution in EXECUTIONS:
            started = time.perf_counter()
            pattern = "|".join(ASK_FOR_LAST_STATES) if execution == LAST_STATES else only
            counts: Counter[str] = Counter()
            for test, error in run(mixin, family, execution, pattern).items():
                if error == "" or (error is None and plain[test] is None):
                    counts["passed" if error == "" else "skipped"] += 1
                elif error is None:
                    counts["unexpected"] += 1
                    unexpected.append(f"{family}, {execution}, `{test}`: skipped, unlike on plain models")
                elif plain[test]:
                    counts["plain"] += 1
                elif reason := reason_for(execution, test, error):
                    counts["expected"] += 1
                    reasons[f"{execution}, `{one_name(test)}`: {reason}"] += 1
                else:
                    counts["unexpected"] += 1
                    unexpected.append(f"{family}, {execution}, `{test}`: {error}")
            cells = [counts[name] for name in ("passed", "skipped", "plain", "expected", "unexpected")]
            row = [family, len(model_classes(family)), execution, *cells, f"{time.perf_counter() - started:.0f}"]
            print(f"| {' | '.join(map(str, row))} |", flush=True)
    print("\nExpected failures, and in how many rows:\n")
    for reason, times in sorted(reasons.items()):
        print(f"- {times} × {reason}")
    print("\nPlain models fail these, too:\n")
    for failure, where in sorted(plain_failures.items()):
        print(f"- {failure} ({', '.join(dict.fromkeys(where))})")
    print(f"\nUnexpected failures: {len(unexpected)}")
    for error in unexpected:
        print(f"\n- {error}")
    return bool(unexpected)


def one_name(test: str) -> str:
    """One for all cases of a test."""
    return re.sub(r"_[0-9]{2}_.*", "_*", test)


def first_line(error: str) -> str:
    return error.splitlines()[0][:160]


if __name__ == "__main__":
    sys.exit(main())
