"""What embeddings and rerankers are measured on, made of STS-B and of one half of SQuAD 2.0's development set.

A data folder holds ``glue/STS-B/train.tsv``, ``glue/STS-B/dev.tsv`` and ``squad2/half-dev-v2.0.json``. Everything that
is drawn is drawn by a fixed seed. Texts to calibrate on are never among those to measure on.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from measures import ndcg, ranks, reciprocal_rank, spearman
from numpy.typing import NDArray

import token_pruning as tp
from token_pruning.lab.data import glue_task, load_glue_folder

Encode = Callable[[list[str]], NDArray[np.float32]]
"""From texts to vectors of length 1, ``[texts, dim]``."""
Predict = Callable[[list[tuple[str, str]]], NDArray[np.float32]]
"""From pairs of texts to scores, ``[pairs]``."""

STS_CALIBRATION, RETRIEVAL_CALIBRATION = 2000, 250
RETRIEVAL_DOCUMENTS, RETRIEVAL_QUESTIONS, LONG_QUESTIONS = 350, 900, 800
PARAGRAPHS_PER_DOCUMENT, LONG_CALIBRATION_ARTICLES, LONG_CALIBRATION_PARAGRAPHS = 5, 5, 40
RERANK_TRAINING_ARTICLES, RERANK_TRAINING_PAIRS, RERANK_PASSAGES = 11, 3600, 10
RERANK_CALIBRATION_QUERIES, RERANK_CALIBRATION_PASSAGES = 120, 8
DISTILLATION_TEXTS, DISTILLATION_PAIRS = 20_000, 5000


class Task(Protocol):
    """Something that vectors are good or bad for.

    An outcome has a number per item, and a score is made of some items' outcomes, so that two models can be compared on
    the same items again and again.

    Attributes:
        name: the key in tables.
        about: what it is, for a reader.
        measure: the score's name.
        calibration: texts to calibrate on.
        distillation: other texts to train on.
        texts: those that a pruned model encodes.
    """

    name: str
    about: str
    measure: str
    calibration: list[str]
    distillation: list[str]

    @property
    def texts(self) -> list[str]: ...

    @property
    def groups(self) -> Mapping[str, NDArray[np.int64]]:
        """The items, under ``all``, and parts of them under other names."""

    def outcome(self, vectors: NDArray[np.float32], questions: NDArray[np.float32]) -> NDArray[np.float64]:
        """Per item, from the texts' vectors ``[texts, dim]`` and the dense model's of the questions."""

    def score(self, outcome: NDArray[np.float64], items: NDArray[np.int64]) -> float:
        """Of some items, × 100."""


@dataclass(frozen=True)
class Similarity:
    """Pairs of sentences and how similar people find them."""

    calibration: list[str]
    first: list[str]
    second: list[str]
    gold: NDArray[np.float64]
    distillation: list[str] = field(default_factory=list)
    questions: Sequence[str] = ()
    name = "STS-B"
    measure = "Spearman"

    @property
    def about(self) -> str:
        return f"similarity of {len(self.gold):,} pairs of sentences, all of STS-B's development set"

    @property
    def texts(self) -> list[str]:
        return self.first + self.second

    @property
    def groups(self) -> Mapping[str, NDArray[np.int64]]:
        return {"all": np.arange(len(self.gold))}

    def outcome(self, vectors: NDArray[np.float32], questions: NDArray[np.float32]) -> NDArray[np.float64]:
        first, second = np.split(vectors.astype(np.float64), 2)
        cosines: NDArray[np.float64] = (first * second).sum(1)
        return cosines

    def score(self, outcome: NDArray[np.float64], items: NDArray[np.int64]) -> float:
        return spearman(outcome[items], self.gold[items])


@dataclass(frozen=True)
class Retrieval:
    """Questions, each with the one document among all that answers it.

    Attributes:
        targets: each question's document, ``[questions]``.
        parts: questions of special interest.
    """

    name: str
    about: str
    calibration: list[str]
    texts: list[str]
    questions: list[str]
    targets: NDArray[np.int64]
    parts: Mapping[str, NDArray[np.int64]]
    distillation: list[str] = field(default_factory=list)
    measure = "nDCG@10"

    @property
    def groups(self) -> Mapping[str, NDArray[np.int64]]:
        return {"all": np.arange(len(self.questions)), **self.parts}

    def outcome(self, vectors: NDArray[np.float32], questions: NDArray[np.float32]) -> NDArray[np.float64]:
        return ndcg(ranks(questions @ vectors.T, self.targets))

    def score(self, outcome: NDArray[np.float64], items: NDArray[np.int64]) -> float:
        return 100 * float(outcome[items].mean())


@dataclass(frozen=True)
class Reranking:
    """Questions, each with its own paragraph first and others of the same article after it.

    Attributes:
        training: question, paragraph, and whether they belong together, from articles of their own.
        calibration: pairs from the training articles.
        distillation: pairs from the training articles to train on, without labels.
        questions: those to measure on.
        passages: as many per question.
        late: questions whose answer is in the second half of its paragraph.
    """

    training: list[tuple[str, str, bool]]
    calibration: list[tuple[str, str]]
    questions: list[str]
    passages: list[list[str]]
    late: NDArray[np.int64]
    distillation: list[tuple[str, str]] = field(default_factory=list)
    measure = "MRR"

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return [
            (question, text) for question, texts in zip(self.questions, self.passages, strict=True) for text in texts
        ]

    @property
    def groups(self) -> Mapping[str, NDArray[np.int64]]:
        return {"all": np.arange(len(self.questions)), "late": self.late}

    def outcome(self, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        table = scores.reshape(len(self.questions), -1)
        return reciprocal_rank(ranks(table, np.zeros(len(table), dtype=np.int64)))

    def score(self, outcome: NDArray[np.float64], items: NDArray[np.int64]) -> float:
        return 100 * float(outcome[items].mean())


# From the files


def read_similarity(
    data: Path, calibration: int = STS_CALIBRATION, *, seed: int = 0, distillation: int = 0
) -> Similarity:
    """STS-B; the sentences to calibrate on are drawn from the distinct ones of the training set.

    Those to train on are the other sentences of STS-B's training set, then MRPC's, then SST-2's, until there are
    ``distillation``; none that the development set has.

    Raises:
        DataError: for files that are missing or malformed, or with fewer sentences than ``calibration``.
    """
    task = load_glue_folder(glue_task("STSB"), data / "glue")
    dev, train = task.validation["validation"], task.train
    distinct = list(dict.fromkeys([*train.first, *train.second]))
    if len(distinct) < calibration:
        raise tp.DataError(
            f"{data / 'glue'}: {len(distinct)} distinct training sentences; {calibration} were asked for"
        )
    sentences = random.Random(seed).sample(distinct, calibration)
    found = Similarity(sentences, list(dev.first), list(dev.second), np.asarray(dev.labels, dtype=np.float64))
    if not distillation:
        return found
    for name in ("MRPC", "SST2"):
        other = load_glue_folder(glue_task(name), data / "glue").train
        texts = list(dict.fromkeys([*other.first, *(other.second or [])]))
        random.Random(seed).shuffle(texts)
        distinct += texts
    known = {*sentences, *found.texts}
    others = [text for text in dict.fromkeys(distinct) if text not in known]
    return replace(found, distillation=others[:distillation])


@dataclass(frozen=True)
class _Question:
    text: str
    paragraph: int
    late: bool


def read_articles(data: Path) -> list[list[Any]]:
    """Every article's paragraphs, as SQuAD has them.

    Raises:
        DataError: for a file that is missing or malformed.
    """
    path = data / "squad2" / "half-dev-v2.0.json"
    try:
        return [article["paragraphs"] for article in json.loads(path.read_text(encoding="utf-8"))["data"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise tp.DataError(f"{path}: {error}; it must be a file of SQuAD 2.0") from None


def _questions(paragraphs: Sequence[Any]) -> Iterator[_Question]:
    """The answerable ones."""
    for number, paragraph in enumerate(paragraphs):
        for question in paragraph["qas"]:
            if not question.get("is_impossible"):
                start = question["answers"][0]["answer_start"]
                yield _Question(question["question"], number, start > len(paragraph["context"]) / 2)


def read_retrieval(data: Path, *, seed: int = 0) -> Retrieval:
    """Question → paragraph.

    Questions are drawn at random: a paragraph's first ones ask about its beginning, and flatter truncation.
    """
    generator = random.Random(seed)
    paragraphs = [paragraph for article in read_articles(data) for paragraph in article]
    generator.shuffle(paragraphs)
    last = RETRIEVAL_CALIBRATION + RETRIEVAL_DOCUMENTS
    searched = paragraphs[RETRIEVAL_CALIBRATION:last]
    asked = generator.sample(list(_questions(searched)), RETRIEVAL_QUESTIONS)
    late = np.flatnonzero([question.late for question in asked])
    return Retrieval(
        name="paragraphs",
        about=f"{len(asked)} questions, each → its paragraph among {len(searched)} of SQuAD; "
        f"for {len(late)} the answer is in the paragraph's second half (late)",
        calibration=[paragraph["context"] for paragraph in paragraphs[:RETRIEVAL_CALIBRATION]],
        texts=[paragraph["context"] for paragraph in searched],
        questions=[question.text for question in asked],
        targets=np.array([question.paragraph for question in asked]),
        parts={"late": late},
        distillation=[paragraph["context"] for paragraph in paragraphs[last:]],
    )


def read_long(data: Path, *, seed: int = 0) -> Retrieval:
    """Question → document of five paragraphs of one article; the first articles are for calibration."""
    articles = read_articles(data)
    calibration, documents, found, places = [], [], [], []
    size = PARAGRAPHS_PER_DOCUMENT
    for number, article in enumerate(articles):
        if number < LONG_CALIBRATION_ARTICLES:
            article = article[:LONG_CALIBRATION_PARAGRAPHS]
        for start in range(0, len(article) - size + 1, size):
            parts = article[start : start + size]
            text = " ".join(paragraph["context"] for paragraph in parts)
            if number < LONG_CALIBRATION_ARTICLES:
                calibration.append(text)
                continue
            for question in _questions(parts):
                found.append((question.text, len(documents)))
                places.append(question.paragraph)
            documents.append(text)
    chosen = random.Random(seed).sample(range(len(found)), LONG_QUESTIONS)
    place = np.array([places[number] for number in chosen])
    return Retrieval(
        name="long documents",
        about=f"{len(chosen)} questions, each → its document among {len(documents)}, "
        f"each {size} paragraphs of one article of SQuAD joined; by the paragraph that has the answer",
        calibration=calibration,
        texts=documents,
        questions=[found[number][0] for number in chosen],
        targets=np.array([found[number][1] for number in chosen]),
        parts={str(part + 1): np.flatnonzero(place == part) for part in range(size)},
    )


def read_reranking(data: Path, questions: int, *, seed: int = 0) -> Reranking:
    """Question × paragraph: the first articles to train and calibrate on, the others to measure on.

    Raises:
        DataError: if there are fewer than ``questions``.
    """
    generator = random.Random(seed)
    articles = read_articles(data)

    def others(article: Sequence[Any], paragraph: int, count: int) -> list[str]:
        numbers = [number for number in range(len(article)) if number != paragraph]
        return [article[number]["context"] for number in generator.sample(numbers, count)]

    training, to_calibrate, to_measure = [], [], []
    for number, article in enumerate(articles):
        for question in _questions(article):
            own = article[question.paragraph]["context"]
            if number < RERANK_TRAINING_ARTICLES:
                training.append((question.text, own, True))
                training.append((question.text, *others(article, question.paragraph, 1), False))
                to_calibrate.append((article, question))
            else:
                to_measure.append((article, question))
    generator.shuffle(training)
    if len(to_measure) < questions:
        raise tp.DataError(f"{data}: {len(to_measure)} questions to measure on; {questions} were asked for")

    def passages(article: Sequence[Any], question: _Question, count: int) -> list[str]:
        return [article[question.paragraph]["context"], *others(article, question.paragraph, count - 1)]

    asked = generator.sample(to_measure, questions)
    found = Reranking(
        training=training[:RERANK_TRAINING_PAIRS],
        calibration=[
            (question.text, passage)
            for article, question in generator.sample(to_calibrate, RERANK_CALIBRATION_QUERIES)
            for passage in passages(article, question, RERANK_CALIBRATION_PASSAGES)
        ],
        questions=[question.text for _, question in asked],
        passages=[passages(article, question, RERANK_PASSAGES) for article, question in asked],
        late=np.flatnonzero([question.late for _, question in asked]),
    )
    generator.shuffle(to_calibrate)
    pairs = [
        (question.text, passage)
        for article, question in to_calibrate[: DISTILLATION_PAIRS // RERANK_CALIBRATION_PASSAGES]
        for passage in passages(article, question, RERANK_CALIBRATION_PASSAGES)
    ]
    return replace(found, distillation=pairs)
