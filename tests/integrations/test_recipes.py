"""What docs/ecosystem.md shows is what works, with the libraries that are installed."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from sentence_transformers import CrossEncoder, SentenceTransformer

import token_pruning as tp
from tests.pages import sections
from tests.workspace import WORDS, write_checkpoint

PRUNER = tp.FixedThreshold(thresholds=[0.5, 0.7, 0.9, 0.9], scoring_mode="relative")
RECIPES = sections("docs/ecosystem.md", "python")
FOLDERS = "Classes that load a folder by its name"
TEXTS = [" ".join(WORDS[(start + step) % len(WORDS)] for step in range(3 + start % 19)) for start in range(60)]
Names = dict[str, Any]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with the pruned ``embedder``, ``reranker``, ``classifier`` and ``reader``."""
    home = tmp_path_factory.mktemp("home")
    for name, head, kind in (("embedder", "encoder", SentenceTransformer), ("reranker", "sequence", CrossEncoder)):
        write_checkpoint(home / "dense" / name, head=head, labels=1, initializer_range=0.3)
        model: Any = kind(str(home / "dense" / name), device="cpu")
        tp.prune(model, PRUNER)
        model.save_pretrained(str(home / name))
    write_checkpoint(home / "classifier", labels=3)
    tokenizer = hf.AutoTokenizer.from_pretrained(home / "classifier")
    reader = hf.AutoModelForQuestionAnswering.from_config(
        hf.AutoConfig.from_pretrained(home / "classifier", num_labels=2)
    )
    tp.prune(reader.eval(), PRUNER)
    for part in (tokenizer, reader):
        part.save_pretrained(home / "reader")
    return home


@pytest.fixture
def names(home: Path, monkeypatch: pytest.MonkeyPatch) -> Names:
    """What the page takes for granted."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    monkeypatch.setenv("LLAMA_INDEX_CACHE_DIR", str(home / "cache"))
    names: Names = {
        "__name__": "recipes",
        "tp": tp,
        "texts": TEXTS,
        "query": TEXTS[0],
        "passages": TEXTS[1:],
        "labels": [len(text) % 2 for text in TEXTS],
        "model": hf.AutoModelForSequenceClassification.from_pretrained("classifier").eval(),
        "tokenizer": hf.AutoTokenizer.from_pretrained("classifier"),
    }
    for code in RECIPES[FOLDERS]:
        exec(code, names)
    return names


def run(code: str, names: Names) -> Names:
    """The block, if all that it imports is installed."""
    for module in re.findall(r"^(?:from|import) ([\w.]+)", code, re.M):
        pytest.importorskip(module)
    exec(code, names)
    return names


def assert_vectors(found: Any, names: Names, *, normalized: bool = False) -> None:
    expected = names["embedder"].encode(TEXTS, normalize_embeddings=normalized)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    dense = SentenceTransformer("embedder", device="cpu").encode(TEXTS, normalize_embeddings=normalized)
    assert np.abs(expected - dense).max() > 1e-2


def assert_ranking(found: list[str], names: Names) -> None:
    expected = names["reranker"].rank(TEXTS[0], TEXTS[1:], top_k=3, return_documents=True)
    assert found == [result["text"] for result in expected]


def test_every_recipe_is_tested() -> None:
    tested = {"transformers.pipeline", "Question answering", "evaluate", FOLDERS}
    assert {*RECIPES} == tested | {"LangChain", "LlamaIndex", "Haystack", "SetFit"}


def test_pipeline(names: Names) -> None:
    (code,) = RECIPES["transformers.pipeline"]
    results = run(code, names)["results"]
    logits = tp.compile(names["model"])(**names["tokenizer"](TEXTS, padding=True, return_tensors="pt")).logits
    assert [each["label"] for each in results] == [f"LABEL_{label}" for label in logits.argmax(1)]
    assert [each["score"] for each in results] == pytest.approx(logits.softmax(1).amax(1).tolist())


def test_question_answering(names: Names) -> None:
    with pytest.raises(KeyError, match="The task question-answering has been removed from transformers"):
        hf.pipeline("question-answering", model=names["model"], tokenizer=names["tokenizer"], device="cpu")
    (code,) = RECIPES["Question answering"]
    tokenizer = names["tokenizer"]
    for question, context in zip(TEXTS[:5], TEXTS[12:17], strict=True):
        reader = tp.from_pretrained("reader")
        found = run(code, {**names, "reader": reader, "question": question, "context": context})
        engine = found["engine"]
        pair = tokenizer(question, context, return_tensors="pt")
        output = engine(**pair)
        words = context.split()  # each is one token
        start = len(question.split()) + 2
        best = max(
            ((first, last) for first in range(len(words)) for last in range(first, len(words))),
            key=lambda ends: float(output.start_logits[0, start + ends[0]] + output.end_logits[0, start + ends[1]]),
        )
        assert found["answer"] == " ".join(words[best[0] : best[1] + 1])


def test_evaluate(names: Names, tmp_path: Path) -> None:
    evaluate = pytest.importorskip("evaluate")
    datasets = pytest.importorskip("datasets")

    class Accuracy(evaluate.Metric):  # type: ignore[misc, name-defined]
        def _info(self) -> Any:
            columns = datasets.Features({name: datasets.Value("int32") for name in ("predictions", "references")})
            return evaluate.MetricInfo(description="", citation="", features=columns)

        def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
            return {"accuracy": float(np.mean(np.equal(predictions, references)))}

    tp.prune(names["model"], PRUNER)
    engine = tp.compile(names["model"], dtype="float32")
    classify = hf.pipeline("text-classification", model=engine, tokenizer=names["tokenizer"], device="cpu")
    names |= {
        "data": datasets.Dataset.from_dict({"text": TEXTS, "label": [len(text) % 3 for text in TEXTS]}),
        "metric": Accuracy(cache_dir=str(tmp_path)),
        "classify": classify,
    }
    first, second = RECIPES["evaluate"]
    pruned = run(first, names)["scores"]["accuracy"]
    with pytest.raises(AttributeError, match="module transformers has no attribute TFPreTrainedModel"):
        names["evaluator"].compute(classify, data=names["data"], metric=names["metric"])
    assert run(second, names)["scores"]["accuracy"] == pytest.approx(pruned)


@pytest.mark.filterwarnings("ignore:.*(fill_missing|get_sentence_embedding_dimension)")  # mteb's
@pytest.mark.parametrize("name", ["embedder", "reranker"])
def test_mteb(name: str, names: Names) -> None:
    """Retrieval and similarity are tasks like any other; examples/mteb.py has one."""
    mteb = pytest.importorskip("mteb")
    mock = pytest.importorskip("mteb.mocks.mock_tasks").MockRerankingTask

    class Known(mock):  # type: ignore[misc, valid-type]
        """In words of the tokenizer: of texts that are unknown alike, rounding says which comes first."""

        def load_data(self, *args: Any, **kwargs: Any) -> None:
            super().load_data(*args, **kwargs)
            [parts] = [parts for splits in self.dataset.values() for parts in splits.values()]
            for kind, texts in (("corpus", TEXTS[3:]), ("queries", TEXTS[9:])):
                column = texts[: len(parts[kind])]
                parts[kind] = parts[kind].remove_columns("text").add_column("text", column)

    scores = [
        mteb.evaluate(model, Known(), cache=None, co2_tracker=False, show_progress_bar=False)[0].get_score()
        for model in (names[name], tp.from_pretrained(name))
    ]
    assert scores[0] == pytest.approx(scores[1])


@pytest.mark.filterwarnings("ignore:`langchain-community` is being sunset:DeprecationWarning")
def test_langchain(names: Names) -> None:
    embeddings, reranker, alone = RECIPES["LangChain"]
    assert_vectors(run(embeddings, names)["vectors"], names)
    np.testing.assert_array_equal(names["embeddings"].embed_query(TEXTS[0]), names["vectors"][0])
    run(reranker, names)
    assert_ranking([document.page_content for document in names["best"]], names)
    scores = names["scorer"].score([("good", "cat"), ("bad", "dog")])
    np.testing.assert_array_equal(run(alone, names)["scorer"].score([("good", "cat"), ("bad", "dog")]), scores)
    compressor = names["CrossEncoderReranker"](model=names["scorer"], top_n=3)
    assert compressor.compress_documents([names["Document"](text) for text in TEXTS[1:]], TEXTS[0]) == names["best"]


def test_llama_index(names: Names) -> None:
    embedding, rerank = RECIPES["LlamaIndex"]
    assert_vectors(run(embedding, names)["vectors"], names, normalized=True)
    query = names["embedding"].get_query_embedding(TEXTS[0])
    np.testing.assert_allclose(query, names["vectors"][0], atol=1e-6)
    assert_ranking([each.node.text for each in run(rerank, names)["best"]], names)


def test_haystack(names: Names) -> None:
    embedders, ranker = RECIPES["Haystack"]
    assert_vectors(run(embedders, names)["vectors"], names)
    np.testing.assert_array_equal(names["vector"], names["vectors"][0])
    assert_ranking([document.content for document in run(ranker, names)["best"]], names)


def test_setfit(names: Names) -> None:
    from sklearn.linear_model import LogisticRegression

    (code,) = RECIPES["SetFit"]
    predicted = run(code, names)["predicted"]
    vectors = names["embedder"].encode(TEXTS)
    expected = LogisticRegression().fit(vectors, names["labels"]).predict(vectors)
    assert predicted.tolist() == expected.tolist()
    dense = SentenceTransformer("classifier", device="cpu").encode(TEXTS)
    assert not torch.equal(torch.tensor(dense), torch.tensor(vectors))
