"""What heads that read every token are measured on: answers of SQuAD 2.0 and entities of WNUT17.

A data folder holds ``squad2/half-dev-v2.0.json``, half of SQuAD 2.0's development set, ``wnut17/train.conll`` and
``wnut17/test.conll``. Everything that is drawn is drawn by a fixed seed. Texts to calibrate on are never among those to
train on or to measure on.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measures import answer_scores, entity_counts, entity_f1
from numpy.typing import NDArray
from tasks import RERANK_TRAINING_ARTICLES, read_articles
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification

import token_pruning as tp

LONGEST, LONGEST_ANSWER = 384, 30  # tokens
HELD_OUT_QUESTIONS, HELD_OUT_SENTENCES = 200, 400

Row = dict[str, Any]
"""A tokenized text, without padding."""
Outcome = NDArray[np.float64]


@dataclass(frozen=True)
class Question:
    """Where its context's tokens stand in its row, and what is accepted; nothing for one without an answer."""

    context: str
    accepted: list[str]
    first: int
    offsets: list[tuple[int, int]]


@dataclass(frozen=True)
class Answers:
    """Questions about a paragraph, some without an answer; whole articles stand on one side.

    Attributes:
        training: rows with ``start_positions`` and ``end_positions``.
        held_out: rows of an article of its own, to calibrate and to fit thresholds on.
        rows: those to measure on.
        questions: the same.
        cut: the rows and questions to measure on, for a greatest length.
        about: for a reader.
    """

    training: list[Row]
    held_out: list[Row]
    rows: list[Row]
    questions: list[Question]
    cut: Callable[[int], tuple[list[Row], list[Question]]]
    about: str
    name, title, measure = "answers", "Answers, SQuAD 2.0", "F1 of the best span, answerable"
    head, labels = AutoModelForQuestionAnswering, 2

    @property
    def groups(self) -> Mapping[str, NDArray[np.int64]]:
        items, has = np.arange(len(self.questions)), np.flatnonzero([bool(q.accepted) for q in self.questions])
        return {"all": 2 * len(items) + has, "SQuAD 2.0 F1": items, "exact match": len(items) + items}

    def outcome(self, logits: Sequence[Tensor]) -> Outcome:
        """F1 of every question, then whether it matches exactly, then F1 of the best span though none were better."""
        found = []
        for each, question in zip(logits, self.questions, strict=True):
            span, score = best_span(each[question.first :][: len(question.offsets)])
            start, end = (question.offsets[place][side] for side, place in enumerate(span))
            best = question.context[start:end]
            exact, f1 = answer_scores(best if score > float(each[0].sum()) else "", question.accepted)
            found.append((f1, exact, answer_scores(best, question.accepted)[1]))
        return np.array(found).T.reshape(-1)

    def score(self, outcome: Outcome, items: NDArray[np.int64]) -> float:
        return 100 * float(outcome[items].mean())


def best_span(logits: Tensor) -> tuple[tuple[int, int], float]:
    """First and last token, and their logits' sum, of the best span of at most 30; from ``[tokens, 2]``."""
    allowed = torch.ones(len(logits), len(logits), dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
    sums = (logits[:, :1] + logits[:, 1]).masked_fill(~allowed, -torch.inf)
    start, end = divmod(int(sums.argmax()), len(logits))
    return (start, end), float(sums[start, end])


def read_answers(data: Path, tokenizer: Any) -> Answers:
    """The articles that the reranker is trained on, the last of them held out, and those that it is measured on."""
    articles = read_articles(data)

    def tokenized(articles: Sequence[Any], length: int = LONGEST) -> tuple[list[Row], list[Question]]:
        pairs = [(part["context"], asked) for article in articles for part in article for asked in part["qas"]]
        found = [question_row(tokenizer, context, asked, length) for context, asked in pairs]
        return [row for row, _ in found], [question for _, question in found]

    training, held_out = articles[: RERANK_TRAINING_ARTICLES - 1], articles[RERANK_TRAINING_ARTICLES - 1 :][:1]
    cut = partial(tokenized, articles[RERANK_TRAINING_ARTICLES:])
    (rows, questions), train, held = cut(), tokenized(training)[0], tokenized(held_out)[0]
    random.Random(0).shuffle(held)
    held = held[:HELD_OUT_QUESTIONS]
    longest = [sum(len(row["input_ids"]) == LONGEST for row in each) for each in (train, rows)]
    has = sum(bool(question.accepted) for question in questions)
    about = (
        f"{len(rows):,} questions of {len(articles) - RERANK_TRAINING_ARTICLES} articles of half of the development "
        f"set, {has:,} of them with an answer (none at all would score {100 - 100 * has / len(rows):.1f}); trained on "
        f"{len(train):,} of {len(training)} other articles, calibrated on {len(held)} of one more. Contexts are cut at "
        f"{LONGEST} tokens ({longest[0]} in training, {longest[1]} in the test). No answer where the first token's "
        "logits say more than the best span's."
    )
    return Answers(train, held, rows, questions, cut, about)


def question_row(tokenizer: Any, context: str, asked: Any, length: int) -> tuple[Row, Question]:
    """One question as a model gets it, its answer's first and last token (0 for none), and what its tokens mean."""
    found = tokenizer(
        asked["question"].strip(), context, truncation="only_second", max_length=length, return_offsets_mapping=True
    )
    inside = [number for number, segment in enumerate(found.sequence_ids()) if segment == 1]
    offsets = [tuple(found["offset_mapping"][number]) for number in inside]
    start = end = 0
    accepted = [] if asked.get("is_impossible") else [answer["text"] for answer in asked["answers"]]
    if accepted:
        begin = asked["answers"][0]["answer_start"]
        places = [place for place, (_, stop) in enumerate(offsets) if stop > begin]
        last = [place for place, (to, _) in enumerate(offsets) if to < begin + len(accepted[0])]
        if places and offsets[-1][1] >= begin + len(accepted[0]):
            start, end = inside[places[0]], inside[last[-1]]
    row = {name: found[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    return {**row, "start_positions": start, "end_positions": end}, Question(context, accepted, inside[0], offsets)


@dataclass(frozen=True)
class Tagging:
    """Words and what they name; attributes as in :class:`Answers`.

    Attributes:
        wanted: labels of the words of the rows to measure on.
        names: the labels.
    """

    training: list[Row]
    held_out: list[Row]
    rows: list[Row]
    wanted: list[list[str]]
    names: list[str]
    about: str
    name, title, measure = "tagging", "Named entities, WNUT17", "F1 of entities"
    head, cut = AutoModelForTokenClassification, None

    @property
    def labels(self) -> int:
        return len(self.names)

    @property
    def groups(self) -> Mapping[str, NDArray[np.int64]]:
        return {"all": np.arange(len(self.rows))}

    def outcome(self, logits: Sequence[Tensor]) -> Outcome:
        """Entities that are right, found and wanted in every sentence; a word has the label of its first token."""
        counts = []
        for each, row, wanted in zip(logits, self.rows, self.wanted, strict=True):
            first = torch.tensor(row["labels"]) >= 0
            found = [self.names[label] for label in each[first].argmax(-1).tolist()]
            counts.append(entity_counts(found, wanted))
        return np.array(counts, dtype=np.float64)

    def score(self, outcome: Outcome, items: NDArray[np.int64]) -> float:
        """The mean of several seeds, if there is a second axis for them."""
        chosen = outcome[items]
        seeds = chosen[:, None] if chosen.ndim == 2 else chosen
        return float(np.mean([entity_f1(seeds[:, number]) for number in range(seeds.shape[1])]))


def read_tagging(data: Path, tokenizer: Any) -> Tagging:
    """WNUT17's training and test sentences; some of the former are held out."""
    parts = [read_sentences(data / "wnut17" / f"{part}.conll") for part in ("train", "test")]
    names = sorted({label for _, labels in parts[0] for label in labels}, key=lambda label: (label[2:], label))
    rows, test = ([sentence_row(tokenizer, words, labels, names) for words, labels in part] for part in parts)
    random.Random(0).shuffle(rows)
    held_out, training = rows[:HELD_OUT_SENTENCES], rows[HELD_OUT_SENTENCES:]
    about = (
        f"{len(test):,} sentences, the whole test set; trained on {len(training):,} of the training set, calibrated on "
        f"its {len(held_out)} others. Entities count as conlleval counts them."
    )
    return Tagging(training, held_out, test, [labels for _, labels in parts[1]], names, about)


def read_sentences(path: Path) -> list[tuple[list[str], list[str]]]:
    """Words and labels.

    Raises:
        DataError: for a file that is missing or malformed.
    """
    found: list[tuple[list[str], list[str]]] = [([], [])]
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                word, label = line.split("\t")
                found[-1][0].append(word)
                found[-1][1].append(label)
            elif found[-1][0]:
                found.append(([], []))
    except (OSError, ValueError) as error:
        raise tp.DataError(f"{path}: {error}; it must have a word, a tab and a label in each line") from None
    return [sentence for sentence in found if sentence[0]]


def sentence_row(tokenizer: Any, words: list[str], labels: list[str], names: list[str]) -> Row:
    """A sentence; a word's first token has its label, the others −100. Words without tokens have an unknown one."""
    known = [word if tokenizer.tokenize(word) else tokenizer.unk_token for word in words]
    found = tokenizer(known, is_split_into_words=True)
    numbers, before = [], None
    for word in found.word_ids():
        numbers.append(-100 if word is None or word == before else names.index(labels[word]))
        before = word
    return {**{name: found[name] for name in ("input_ids", "token_type_ids", "attention_mask")}, "labels": numbers}
