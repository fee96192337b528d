"""sentence-transformers' models: pruned in place, compiled, saved, loaded; stock ones read the same folders."""

import copy
import json
import logging
import math
import pickle
import shutil
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import Tensor

import token_pruning as tp
from tests.tiny import tiny_config
from tests.workspace import MANY_WORDS, write_transformers
from token_pruning.integrations.sentence_transformers import batches
from token_pruning.runtime import adapters

DIM = 32
LONGEST = 64  # tokens that the tokenizer keeps
PRUNER = tp.FixedThreshold(thresholds=[0.5, 0.7, 0.9], scoring_mode="relative")
POOLINGS: dict[str, dict[str, Any]] = {
    "mean": {},
    "cls": {"pooling_mode": "cls"},
    "max": {"pooling_mode": "max"},
    "weighted": {"pooling_mode": "weightedmean"},
    "sqrt": {"pooling_mode": "mean_sqrt_len_tokens"},
    "two": {"pooling_mode": ("cls", "mean")},
    "no prompt": {"include_prompt": False},
}


def texts(count: int, longest: int = 50, seed: int = 0, shortest: int = 1) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(MANY_WORDS, rng.integers(shortest, longest))) for _ in range(count)]


TEXTS = [*texts(30), "", "w1", "unknown words", texts(1, 500)[0]]
PAIRS = list(zip(texts(30, 8, seed=1), texts(30, seed=2), strict=True))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with the transformers: ``encoder``, ``ranker`` of one label and ``classifier`` of three."""
    return write_transformers(tmp_path_factory.mktemp("home"), "encoder", layers=3, longest=LONGEST)


def embedder(home: Path, *, tail: bool = True, **pooling: Any) -> Any:
    modules: list[Any] = [Transformer(str(home / "encoder")), Pooling(DIM, **pooling)]
    if tail:
        torch.manual_seed(1)
        modules += [Dense(modules[1].get_embedding_dimension(), 24), LayerNorm(24), Normalize()]
    return SentenceTransformer(modules=modules, device="cpu", prompts={"query": "w1 w2 w3 ", "document": ""})


def ranker(home: Path, name: str = "ranker") -> Any:
    return CrossEncoder(str(home / name), device="cpu")


def fitted(departed: str = "map", **settings: Any) -> tp.Pruner:
    """A method with every tensor that one can have."""
    rng = torch.Generator().manual_seed(0)

    def affine(*shape: int) -> Tensor:
        return torch.randn(*shape, DIM, DIM + 1, generator=rng) / DIM**0.5

    return tp.FixedThreshold(
        thresholds=[0.5, 0.7, 0.9],
        scoring_mode="relative",
        vocabulary=tp.VocabularyGate(torch.rand(200, generator=rng), 0.2),
        departed=departed,  # type: ignore[arg-type]
        maps=tp.DepartureMaps(layers=[0, 1, 2, 3], weights=affine(4)) if departed == "map" else None,
        correction=tp.Correction(weights=affine()),
        **settings,
    )


def context(*layers: int, rank: int = 9) -> tp.LinearContext:
    """What tokens that left give to those that stay, about as large as their own keys and values."""
    rng = torch.Generator().manual_seed(1)
    down = torch.randn(len(layers), rank, DIM + 1, generator=rng) / DIM**0.5
    return tp.LinearContext(layers, down, torch.randn(3, 2 * DIM, rank + 1, generator=rng) / rank**0.5)


CONTEXTS: dict[str, dict[str, Any]] = {
    "none": {},
    "of all": {"context": context(0, 1, 2, 3)},
    "of the gate's": {"context": context(0, rank=1)},
    "of what entered": {"context": context(1, 2, rank=DIM)},
}


def furthest(one: Any, other: Any) -> float:
    return max(
        (
            float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())
            for a, b in zip(one, other, strict=True)
        ),
        default=0.0,
    )


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(one, other, strict=True))


@contextmanager
def nothing_said() -> Iterator[None]:
    """Neither library warns of anything inside."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("transformers", "sentence_transformers")]
    for logger in loggers:
        logger.addHandler(listener)
    yield
    for logger in loggers:
        logger.removeHandler(listener)
    assert not said


# Pruned in place.


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_pruned_compiled_saved_loaded_and_dense_again(home: Path, pooling: str, tmp_path: Path) -> None:
    model = embedder(home, **POOLINGS[pooling])
    dense = model.encode(TEXTS)
    assert tp.prune(model, PRUNER) is model
    pruned, with_prompt = model.encode(TEXTS), model.encode(TEXTS, prompt_name="query")
    assert furthest(pruned, dense) > 1e-2
    fast = tp.compile(model, dtype="float32")
    assert type(fast) is SentenceTransformer
    compiled = fast.encode(TEXTS)
    assert furthest(compiled, pruned) < 1e-4
    assert furthest(fast.encode(TEXTS, prompt_name="query"), with_prompt) < 1e-4
    assert same(compiled, [fast.encode(text) for text in TEXTS])
    states = model.encode(TEXTS, output_value="token_embeddings")
    assert furthest(fast.encode(TEXTS, output_value="token_embeddings"), states) < 1e-4
    for number, saved in enumerate((model, fast)):
        saved.save_pretrained(str(tmp_path / str(number)))
        with nothing_said():
            anybody = SentenceTransformer(str(tmp_path / str(number)), device="cpu")
        assert same(anybody.encode(TEXTS), dense)
        loaded = tp.from_pretrained(tmp_path / str(number))
        assert type(loaded) is SentenceTransformer and not loaded.training
        assert same(loaded.encode(TEXTS), pruned)
    assert tp.unprune(model) is model
    assert same(model.encode(TEXTS), dense)
    assert not {"save", "preprocess"} & vars(model[0]).keys()


@pytest.mark.parametrize("given", CONTEXTS)
@pytest.mark.parametrize("departed", ["state", "survivors", "map"])
def test_every_tensor_of_a_method_is_saved_and_compiled(home: Path, departed: str, given: str, tmp_path: Path) -> None:
    model = tp.prune(embedder(home), fitted(departed, **CONTEXTS[given]))
    assert model[0].model.config.reads == "mean"
    pruned = model.encode(TEXTS)
    fast = tp.compile(model, dtype="float32")
    assert furthest(fast.encode(TEXTS), pruned) < 1e-4
    means = [rows.mean(0) for rows in fast.encode(TEXTS, output_value="token_embeddings")]
    features = {"token_embeddings": torch.stack(means)[:, None], "attention_mask": torch.ones(len(means), 1)}
    for module in list(fast)[1:]:  # what anybody's mean makes of the states is the pooled vector
        features = module(features)
    assert furthest(features["sentence_embedding"].detach(), pruned) < 1e-4
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "token_pruner.safetensors").exists()
    with nothing_said():
        SentenceTransformer(str(tmp_path), device="cpu")
    loaded = tp.from_pretrained(tmp_path)
    assert same(loaded.encode(TEXTS), pruned)
    assert repr(loaded[0].model.token_pruner.pruner.context) == repr(CONTEXTS[given].get("context"))
    assert same(tp.compile(loaded, dtype="float32").encode(TEXTS), fast.encode(TEXTS))
    if given != "none":
        without = tp.prune(embedder(home), fitted(departed))
        assert furthest(without.encode(TEXTS), pruned) > 1e-2
    tp.unprune(model).save_pretrained(str(tmp_path / "dense"))
    assert not (tmp_path / "dense" / "token_pruner.safetensors").exists()


def test_an_engine_on_pytorch(home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TOKEN_PRUNING_KERNELS", "torch")
    hf.AutoModel.from_config(tiny_config("deberta-v2")).save_pretrained(tmp_path)
    hf.AutoTokenizer.from_pretrained(home / "encoder").save_pretrained(tmp_path)
    model = SentenceTransformer(modules=[Transformer(str(tmp_path)), Pooling(DIM)], device="cpu")
    tp.prune(model, tp.RelativeThreshold(token_threshold=0.3))
    fast = tp.compile(model, dtype="float32")
    assert not fast[0].model.engine.is_native
    assert furthest(fast.encode(TEXTS), model.encode(TEXTS)) < 1e-4


def test_a_ranker_whose_head_pools(home: Path, tmp_path: Path) -> None:
    config = tiny_config("modernbert", classifier_pooling="mean", num_labels=1)
    hf.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    hf.AutoTokenizer.from_pretrained(home / "ranker").save_pretrained(tmp_path)
    model = tp.prune(ranker(tmp_path, ""), tp.RelativeThreshold(token_threshold=0.3))
    fast = tp.compile(model, dtype="float32")
    scores = fast.predict(PAIRS)
    assert furthest(scores, model.predict(PAIRS)) < 1e-4
    assert furthest(fast.predict(PAIRS[3:4]), scores[3:4]) < 1e-5


def test_forward_and_other_ways_in(home: Path) -> None:
    model = tp.prune(embedder(home), PRUNER)
    fast = tp.compile(model, dtype="float32")
    with torch.no_grad():
        features = fast(fast.preprocess(TEXTS[:5]))
    assert furthest(features["sentence_embedding"], model.encode(TEXTS[:5])) < 1e-4
    assert "kernels" in fast[0].model.engine.explain()
    assert fast.get_embedding_dimension() == 24 and fast.device == torch.device("cpu")
    assert "Transformer" in repr(fast)


def test_what_is_recorded(home: Path) -> None:
    flops = []
    model = tp.prune(embedder(home), PRUNER)
    for one in (model, tp.compile(model, dtype="float32")):
        with tp.record(one) as trace:
            one.encode(TEXTS)
        flops.append(tp.count_flops(one, trace).relative)
    assert flops[0] == pytest.approx(flops[1]) and flops[0] < 0.9
    for one in (tp.prune(ranker(home), PRUNER), tp.compile(ranker(home))):
        with tp.record(one) as trace:
            one.predict(PAIRS)
        assert len(trace.input_lengths) == len(PAIRS) and tp.count_flops(one, trace).pruned > 0


# Compiled.


@cache
def fast_embedder(home: Path, given: str = "none") -> Any:
    return tp.compile(tp.prune(embedder(home), fitted(**CONTEXTS[given])), dtype="float32")


@cache
def alone(home: Path, given: str) -> list[Any]:
    return [fast_embedder(home, given).encode(text) for text in TEXTS]


@given(st.lists(st.integers(0, len(TEXTS) - 1), max_size=40), st.integers(1, 300), st.sampled_from([*CONTEXTS]))
@settings(max_examples=60)
def test_a_text_has_the_same_vector_in_any_batch(home: Path, places: list[int], tokens: int, given: str) -> None:
    fast = fast_embedder(home, given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "BATCH_TOKENS", tokens)
        patch.setattr(batches, "_TOKENIZED_AT_ONCE", 7)
        assert same(fast.encode([TEXTS[place] for place in places]), [alone(home, given)[place] for place in places])


@given(st.lists(st.integers(0, len(PAIRS) - 1), max_size=40), st.integers(1, 300))
@settings(max_examples=40)
def test_a_pair_has_the_same_score_in_any_batch(home: Path, places: list[int], tokens: int) -> None:
    fast, scores = fast_ranker(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "BATCH_TOKENS", tokens)
        assert same(fast.predict([PAIRS[place] for place in places]), [scores[place] for place in places])


@cache
def fast_ranker(home: Path) -> tuple[Any, list[Any]]:
    fast = tp.compile(tp.prune(ranker(home), PRUNER), dtype="float32")
    return fast, [fast.predict(pair) for pair in PAIRS]


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "w9 w8"},
        {"prompt_name": "query"},
        {"truncate_dim": 5},
        {"truncate_dim": 5, "normalize_embeddings": True},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"precision": "binary"},
        {"batch_size": 1},
        {"processing_kwargs": {"text": {"max_length": 9}}},
        {"processing_kwargs": {"text": {"padding": "max_length"}}},
    ],
    ids=str,
)
def test_options_of_encode(home: Path, options: dict[str, Any]) -> None:
    model = tp.prune(embedder(home), PRUNER)
    fast = tp.compile(model, dtype="float32")
    expected, found = (one.encode(TEXTS, **options) for one in (model, fast))
    assert type(found) is type(expected) and type(found[0]) is type(expected[0])
    if options.get("precision") == "binary":
        assert found.dtype == expected.dtype and (found != expected).mean() < 0.05  # a bit of a number near zero
    else:
        assert furthest(found, expected) < 1e-4
    if options == {"truncate_dim": 5}:
        with fast.truncate_embeddings(5):
            assert same(fast.encode(TEXTS), found)


def test_all_features_of_each_text(home: Path) -> None:
    model = tp.prune(embedder(home), fitted())
    fast = tp.compile(model, dtype="float32")
    expected, found = (one.encode(TEXTS[:9], output_value=None, prompt_name="query") for one in (model, fast))
    vectors = fast.encode(TEXTS[:9], prompt_name="query")
    for theirs, ours, vector in zip(expected, found, vectors, strict=True):
        length = int(theirs["attention_mask"].sum())
        assert theirs.keys() == ours.keys()
        assert ours["prompt_length"] == theirs["prompt_length"] and ours["modality"] == "text"
        for name in ("input_ids", "attention_mask", "token_type_ids", "token_embeddings"):
            assert len(ours[name]) == length and furthest(ours[name], theirs[name][:length]) < 1e-4
        assert np.array_equal(ours["sentence_embedding"], vector)
        assert furthest(ours["sentence_embedding"], theirs["sentence_embedding"]) < 1e-4
    one = fast.encode(TEXTS[0], output_value=None)
    assert isinstance(one, dict)


def test_nothing_one_text_and_ten_thousand(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = embedder(home)
    fast = tp.compile(model)
    for options in ({}, {"convert_to_tensor": True}, {"output_value": "token_embeddings"}, {"convert_to_numpy": False}):
        expected, found = (one.encode([], **options) for one in (model, fast))
        assert type(found) is type(expected) and len(found) == 0
    assert fast.encode("").shape == (24,) and fast.encode(["", ""]).shape == (2, 24)
    many = (texts(100, 9) * 100)[:10_000]
    found = fast.encode(many, show_progress_bar=True)
    assert "Texts" in capsys.readouterr().err
    assert same(found, np.tile(fast.encode(many[:100]), (100, 1)))
    assert not capsys.readouterr().err
    assert fast.similarity(found[:2], found[:3]).shape == (2, 3)
    assert same(fast.encode(np.array(many[:3])), found[:3])


@pytest.mark.parametrize("pruner", [PRUNER, fitted(**CONTEXTS["of all"])], ids=["thresholds", "everything"])
def test_copies_casts_and_moves(home: Path, pruner: tp.Pruner, tmp_path: Path) -> None:
    model = tp.prune(embedder(home), pruner)
    fast = tp.compile(model, dtype="float32")
    before = fast.encode(TEXTS)
    copies = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), fast.half(), fast.to("cpu", torch.float16)]
    for other in copies:
        assert isinstance(other, SentenceTransformer) and same(other.encode(TEXTS), before)
    assert copies[0][0].model.source.model is model[0].model  # of the original's weights there is no copy
    tp.unprune(model)  # what was compiled stays what it was
    for number, other in enumerate(copies[:3]):
        other.prompts = {"query": "w5"}
        other.save_pretrained(str(tmp_path / str(number)))
        loaded = tp.from_pretrained(tmp_path / str(number))
        assert furthest(loaded.encode(TEXTS), before) < 1e-4 and loaded.prompts["query"] == "w5"
    assert same(model.encode(TEXTS), SentenceTransformer(str(tmp_path / "0"), device="cpu").encode(TEXTS))


def test_a_dense_model_compiled_is_saved_dense(home: Path, tmp_path: Path) -> None:
    model = embedder(home)
    fast = tp.compile(model, dtype="float32")
    assert furthest(fast.encode(TEXTS), model.encode(TEXTS)) < 1e-4
    tp.prune(model, PRUNER)
    fast.save_pretrained(str(tmp_path))
    assert "prune_mode" not in json.loads((tmp_path / "config.json").read_text())
    tp.unprune(model)
    assert same(SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS), model.encode(TEXTS))


@pytest.mark.parametrize("given", ["none", "of all"])
def test_pools_of_processes(home: Path, given: str) -> None:
    fast = tp.compile(tp.prune(embedder(home), fitted(**CONTEXTS[given])), threads=1)
    assert same(fast.encode(TEXTS, device=["cpu"], chunk_size=10), fast.encode(TEXTS))


# Cross encoders.

GATED = replace(
    PRUNER,
    vocabulary=tp.VocabularyGate(torch.rand(200, generator=torch.Generator().manual_seed(0)), 0.3),
    received_from="first_segment",
    protect=("first_segment", "separators"),
)


@pytest.mark.parametrize("given", CONTEXTS)
@pytest.mark.parametrize("name", ["ranker", "classifier"])
def test_cross_encoders(home: Path, name: str, given: str, tmp_path: Path) -> None:
    model = ranker(home, name)
    dense = model.predict(PAIRS)
    tp.prune(model, PRUNER if given == "none" else replace(GATED, **CONTEXTS[given]))
    fast = tp.compile(model, dtype="float32")
    assert type(fast) is CrossEncoder
    options: tuple[dict[str, Any], ...] = (
        {}, {"apply_softmax": True}, {"activation_fn": torch.nn.Tanh()}, {"convert_to_tensor": True}
    )  # fmt: skip
    for some in options:
        expected, found = (one.predict(PAIRS, **some) for one in (model, fast))
        assert type(found) is type(expected) and found.shape == expected.shape and furthest(found, expected) < 1e-4
    pruned = model.predict(PAIRS)
    assert furthest(pruned, dense) > 1e-3
    assert len(fast.predict([])) == 0 and np.shape(fast.predict(PAIRS[0])) == pruned[0].shape
    for number, saved in enumerate((model, fast)):
        saved.save_pretrained(str(tmp_path / str(number)))
        with nothing_said():
            assert same(CrossEncoder(str(tmp_path / str(number)), device="cpu").predict(PAIRS), dense)
        loaded = tp.from_pretrained(tmp_path / str(number))
        assert type(loaded) is CrossEncoder and same(loaded.predict(PAIRS), pruned)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), fast.half()):
        assert same(other.predict(PAIRS), fast.predict(PAIRS))
    assert same(tp.unprune(model).predict(PAIRS), dense)


def test_ranking(home: Path) -> None:
    model = tp.prune(ranker(home), PRUNER)
    passages = [passage for _, passage in PAIRS]
    models = model, tp.compile(model, dtype="float32")
    expected, found = (one.rank(PAIRS[0][0], passages, return_documents=True) for one in models)
    scores = [{result["corpus_id"]: result["score"] for result in results} for results in (expected, found)]
    assert all(math.isclose(scores[0][i], scores[1][i], abs_tol=1e-4) for i in range(len(passages)))
    assert [result["score"] for result in found] == sorted((result["score"] for result in found), reverse=True)
    assert all(result["text"] == passages[result["corpus_id"]] for result in found)


def test_a_cross_encoder_made_of_modules(home: Path) -> None:
    torch.manual_seed(2)
    score = Dense(DIM, 1, activation_function=None, module_output_name="scores")
    model = CrossEncoder(modules=[Transformer(str(home / "encoder")), Pooling(DIM, "cls"), score], device="cpu")
    tp.prune(model, PRUNER)
    assert model[0].model.config.reads == "first"
    fast = tp.compile(model, dtype="float32")
    assert furthest(fast.predict(PAIRS), model.predict(PAIRS)) < 1e-4
    assert same([fast.predict(pair) for pair in PAIRS], fast.predict(PAIRS))


# Long texts.


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("given", ["none", "of all"])
def test_max_tokens_sees_the_whole_text(home: Path, chunks: bool, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def warned(message: str, *_: Any) -> None:
        raise AssertionError(message)

    monkeypatch.setattr(hf.tokenization_utils_base.logger, "warning", warned)
    long = [*texts(3, 400, seed=5, shortest=100), *texts(2, 20, seed=6)]
    other_end = [text + " w7" * 20 for text in long]
    model = embedder(home)
    dense = model.encode(long)
    assert furthest(model.encode(other_end)[:3], dense[:3]) < 1e-5  # truncated before that
    tp.prune(model, fitted(max_tokens=32, chunks=chunks, **CONTEXTS[given]))
    pruned = model.encode(long)
    assert furthest(model.encode(other_end)[:1], pruned[:1]) > 1e-3
    assert [len(row) for row in model.encode(long, output_value="token_embeddings")] == [
        len(text.split()) + 2 for text in long
    ]
    short = {"processing_kwargs": {"text": {"truncation": True}}}
    assert furthest(model.encode(other_end, **short)[:3], model.encode(long, **short)[:3]) < 1e-5
    fast = tp.compile(model, dtype="float32")
    for one in (fast, copy.deepcopy(fast), copy.deepcopy(model)):
        assert furthest(one.encode(long), pruned) < 1e-4
    assert same([fast.encode(text) for text in long], fast.encode(long))
    assert same(tp.unprune(model).encode(long), dense)


def test_max_tokens_of_pairs_and_folders(home: Path, tmp_path: Path) -> None:
    pairs = [(query, passage * 5) for query, passage in PAIRS]
    model = tp.prune(ranker(home), tp.RelativeThreshold(token_threshold=0.1, max_tokens=40))
    pruned = model.predict(pairs)
    assert furthest(model.predict([(query, passage + " w7" * 9) for query, passage in pairs]), pruned) > 1e-3
    assert furthest(tp.compile(model, dtype="float32").predict(pairs), pruned) < 1e-4
    model.save_pretrained(str(tmp_path))
    assert same(tp.from_pretrained(tmp_path).predict(pairs), pruned)


# What is refused, in one line.


def decoder(home: Path, tmp_path: Path) -> Any:
    config = hf.GPT2Config(vocab_size=200, n_embd=32, n_layer=1, n_head=2)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    hf.AutoTokenizer.from_pretrained(home / "encoder").save_pretrained(tmp_path)
    return Transformer(str(tmp_path), transformer_task="text-generation")


REFUSED: dict[str, Any] = {
    "SparseEncoder": lambda t, tmp: SparseEncoder(modules=[t, SpladePooling()], device="cpu"),
    "MultiVectorEncoder": lambda t, tmp: MultiVectorEncoder(modules=[t, Dense(DIM, 8)], device="cpu"),
    "begins with a Router": lambda t, tmp: SentenceTransformer(
        modules=[Router({"query": [t, Pooling(DIM)], "document": [t, Pooling(DIM)]})], device="cpu"
    ),
    "pooling_mode is lasttoken": lambda t, tmp: SentenceTransformer(modules=[t, Pooling(DIM, "lasttoken")]),
    "comes a Normalize": lambda t, tmp: SentenceTransformer(modules=[t, Normalize()], device="cpu"),
    "comes nothing": lambda t, tmp: SentenceTransformer(modules=[t], device="cpu"),
    "is for text-generation": lambda t, tmp: CrossEncoder(
        modules=[decoder(Path(t.model.name_or_path).parent, tmp), LogitScore(3, 4)], device="cpu"
    ),
    "Transformer of sentence-transformers": lambda t, tmp: t,
}


@pytest.mark.parametrize("message", REFUSED)
def test_models_that_are_refused_by_name(home: Path, message: str, tmp_path: Path) -> None:
    model = REFUSED[message](Transformer(str(home / "encoder")), tmp_path)
    for call in (lambda: tp.prune(model, PRUNER), lambda: tp.compile(model)):
        with pytest.raises(tp.UnsupportedModelError, match=message) as found:
            call()
        assert "\n" not in str(found.value)


def test_wrong_calls(home: Path) -> None:
    model = embedder(home)
    with pytest.raises(tp.ConfigError, match="what comes after the transformer of this model reads 'mean'"):
        tp.prune(model, PRUNER, reads="first")
    with pytest.raises(tp.ConfigError, match="not pruned"):
        tp.unprune(model)
    fast = tp.compile(model)
    for call in (lambda: tp.prune(fast, PRUNER), lambda: tp.compile(fast)):
        with pytest.raises(tp.ConfigError, match="is compiled"):
            call()
    with pytest.raises(tp.ConfigError, match="device is 'cuda'; a compiled model runs on the CPU"):
        fast.encode("w1", device="cuda")
    with pytest.raises(tp.ConfigError, match="output_value is 'states'"):
        fast.encode("w1", output_value="states")
    with pytest.raises(tp.ConfigError, match="runs a base model"):
        tp.compile(ranker(home))[0].model.engine.run_pooled(torch.tensor([1]), torch.tensor([0, 1]))


@pytest.fixture(scope="module")
def saved(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tp.prune(embedder(home), PRUNER).save_pretrained(str(folder))
    return folder


def edit(file: Path, change: Any) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def as_pickle(folder: Path) -> None:
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")


BROKEN: dict[str, Any] = {
    "type is 'thief.Module'": lambda f: edit(f / "modules.json", lambda m: m[2].update(type="thief.Module")),
    "path is '../other'": lambda f: edit(f / "modules.json", lambda m: m[2].update(path="../other")),
    "lists 3": lambda f: edit(f / "modules.json", lambda m: m.append(3)),
    "holds a dict": lambda f: (f / "modules.json").write_text("{}"),
    "modules.json cannot be read": lambda f: (f / "modules.json").write_text("["),
    "model_type is 'SparseEncoder'": lambda f: edit(
        f / "config_sentence_transformers.json", lambda c: c.update(model_type="SparseEncoder")
    ),
    "is a pickle": as_pickle,
    "attn_implementation is 'a/b'": lambda f: edit(
        f / "sentence_bert_config.json", lambda c: c.update(model_kwargs={"attn_implementation": "a/b"})
    ),
    "has no \\*.safetensors weights": lambda f: [file.unlink() for file in f.glob("*.safetensors")],
    "hidden_size": lambda f: edit(f / "config.json", lambda c: c.update(hidden_size="wide")),
    "prune_mode is missing": lambda f: edit(f / "config.json", lambda c: c.pop("prune_mode")),
    "cannot be loaded": lambda f: (f / "tokenizer.json").write_text("{}"),
    "has no tokenizer: none of tokenizer.json": lambda f: (f / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("message", BROKEN)
def test_folders_that_are_refused(saved: Path, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    BROKEN[message](folder)
    with pytest.raises(tp.TokenPruningError, match=message) as found:
        tp.from_pretrained(folder)
    assert "\n" not in str(found.value)


def test_arguments_of_from_pretrained(saved: Path) -> None:
    model = tp.from_pretrained(saved, tp.TopK(token_keep_rate=0.5), dtype=torch.float64, truncate_dim=7)
    assert model.encode("w1").shape == (7,) and model[0].model.dtype == torch.float64
    assert model[0].model.token_pruner.pruner.prune_mode == "topk"
    with pytest.raises(tp.ConfigError, match="trust_remote_code"):
        tp.from_pretrained(saved, trust_remote_code=True)
    encoder = tp.from_pretrained(saved, model_class=hf.AutoModel)
    assert isinstance(encoder, hf.BertModel) and encoder.token_pruner.thresholds is not None


def test_a_library_in_a_version_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_INTEGRATIONS", {})
    adapters.register_adapter(
        "elsewhere", module="token_pruning.nowhere", package="else-where", extra="e", mark="e.json"
    )
    home = types.ModuleType("elsewhere")
    monkeypatch.setitem(sys.modules, "elsewhere", home)
    model = type("Model", (), {"__module__": "elsewhere.models"})()
    with pytest.raises(tp.UnsupportedModelError, match="models of else-where need it installed"):
        tp.prune(model, PRUNER)
