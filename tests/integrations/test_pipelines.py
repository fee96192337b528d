"""transformers.pipeline with a pruned model and with an engine inside."""

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import token_pruning as tp
from tests.tiny import assert_close, tiny_config
from tests.workspace import SPECIAL, WORDS

FAMILIES = ("bert", "distilbert", "modernbert", "deberta-v2")
TASKS = {
    "text-classification": hf.AutoModelForSequenceClassification,
    "zero-shot-classification": hf.AutoModelForSequenceClassification,
    "token-classification": hf.AutoModelForTokenClassification,
    "feature-extraction": hf.AutoModel,
    "fill-mask": hf.AutoModelForMaskedLM,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "text-classification": {"top_k": None},
    "zero-shot-classification": {"candidate_labels": ["cat", "dog ran", "road"]},
    "fill-mask": {"top_k": 3},
}
PRUNER = tp.FixedThreshold(thresholds=[0.5, 0.7, 0.9, 0.9], scoring_mode="relative")
TEXTS = [" ".join(WORDS[(start * 5 + step) % len(WORDS)] for step in range(1 + start % 13)) for start in range(24)]


def tokenizer(side: str = "right") -> Any:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    return hf.BertTokenizerFast(vocab=vocabulary, padding_side=side, model_input_names=["input_ids", "attention_mask"])


def model(family: str, task: str) -> Any:
    config = tiny_config(family, num_labels=3, initializer_range=0.3)
    config.label2id = {"entailment": 0, "neutral": 1, "contradiction": 2}
    config.id2label = {number: name for name, number in config.label2id.items()}
    hf.set_seed(0)
    return TASKS[task].from_config(config).eval()


def texts(task: str) -> list[str]:
    return [f"{text} [MASK] on" for text in TEXTS] if task == "fill-mask" else TEXTS


def run(task: str, model: Any, side: str = "right", **options: Any) -> Any:
    pipe = hf.pipeline(task, model=model, tokenizer=tokenizer(side), device="cpu")
    return pipe(texts(task), **OPTIONS.get(task, {}), **options)


def numbers(found: Any) -> torch.Tensor:
    """All that a pipeline says of its texts, as numbers, but for a token's place, which counts padding."""
    if isinstance(found, dict):
        return torch.cat([numbers(found[name]) for name in sorted(found) if name != "index"])
    if isinstance(found, list):
        return torch.cat([numbers(each) for each in found]) if found else torch.zeros(0)
    if isinstance(found, str):
        return torch.tensor([float(sum(found.encode()))])
    return torch.tensor([0.0 if found is None else float(found)])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_says_what_the_pruned_model_says(family: str, task: str) -> None:
    dense = model(family, task)
    before = run(task, dense)
    tp.prune(dense, PRUNER)
    alone = run(task, dense)
    engine = tp.compile(dense, dtype="float32")
    assert_close(numbers(run(task, engine)), numbers(alone), atol=2e-4)
    if task != "feature-extraction":  # which has rows for padding too
        for size, side in ((5, "right"), (24, "left")):
            batched = run(task, engine, side, batch_size=size)
            assert_close(numbers(batched), numbers(alone), atol=2e-4)
            assert_close(numbers(run(task, dense, side, batch_size=size)), numbers(alone), atol=2e-4)
    assert (numbers(before) - numbers(alone)).abs().max() > 1e-2
    tp.unprune(dense)
    assert torch.equal(numbers(run(task, dense)), numbers(before))


def test_features_of_padding_are_zero() -> None:
    dense = model("bert", "feature-extraction")
    tp.prune(dense, PRUNER)
    engine = tp.compile(dense, dtype="float32")
    alone, batched = run("feature-extraction", engine), run("feature-extraction", engine, batch_size=24)
    for (one,), (other,) in zip(alone, batched, strict=True):
        assert other[: len(one)] == one
        assert not torch.tensor(other[len(one) :]).any()


def test_a_model_is_pruned_and_unpruned_inside_a_pipeline() -> None:
    dense = model("bert", "text-classification")
    pipe = hf.pipeline("text-classification", model=dense, tokenizer=tokenizer(), device="cpu")
    before = pipe(TEXTS)
    tp.prune(dense, PRUNER)
    engine = hf.pipeline(
        "text-classification", model=tp.compile(dense, dtype="float32"), tokenizer=tokenizer(), device="cpu"
    )
    assert_close(numbers(pipe(TEXTS)), numbers(engine(TEXTS)))
    assert pipe(TEXTS) != before
    tp.unprune(dense)
    assert pipe(TEXTS) == before


def test_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Pipelines complain about classes that they do not know."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        for task in TASKS:
            run(task, tp.compile(model("bert", task)))
    finally:
        logger.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_engine_shows_what_it_is() -> None:
    engine = tp.compile(model("bert", "text-classification"))
    pipe = hf.pipeline("text-classification", model=engine, tokenizer=tokenizer(), device="cpu")
    assert "'model': 'BertForSequenceClassification'" in repr(pipe) and "'dtype': 'float32'" in repr(pipe)
    for other in (engine, copy.copy(engine), copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert isinstance(other, tp.Engine) and type(other) is type(engine)
    assert type(tp.compile(model("bert", "feature-extraction"))) is not type(engine)


def test_an_engine_has_nothing_to_save(tmp_path: Path) -> None:
    engine = tp.compile(model("bert", "text-classification"))
    pipe = hf.pipeline("text-classification", model=engine, tokenizer=tokenizer(), device="cpu")
    with pytest.raises(AttributeError, match="an engine has no attribute 'save_pretrained'"):
        pipe.save_pretrained(tmp_path)
    assert not hasattr(engine, "hf_device_map")


def test_an_engine_stays_on_the_cpu() -> None:
    engine = tp.compile(model("bert", "text-classification"))
    assert engine.to("cpu:0") is engine and engine.to(torch.device("cpu")) is engine
    with pytest.raises(tp.ConfigError, match="device is 'cuda:1'; an engine runs on the CPU"):
        hf.pipeline("text-classification", model=engine, tokenizer=tokenizer(), device="cuda:1")


def test_a_pipeline_of_a_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    from transformers.pipelines.pt_utils import KeyDataset

    engine = tp.compile(model("bert", "text-classification"))
    pipe = hf.pipeline("text-classification", model=engine, tokenizer=tokenizer(), device="cpu")
    data = datasets.Dataset.from_dict({"text": TEXTS})
    found = list(pipe(KeyDataset(data, "text"), batch_size=7))
    assert found == pipe(TEXTS) == list(pipe(text for text in TEXTS))
