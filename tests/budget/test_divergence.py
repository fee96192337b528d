"""How far outputs are apart: what is compared for which model, each kind against plain formulas."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import token_pruning as tp
from tests.tiny import assert_close, ragged_batch, tiny_model
from token_pruning.budget.divergence import Divergence, Spans, divergence_of, drawn_spans
from token_pruning.runtime.prune import prunable

SEPARATOR = 4
ALONE = torch.arange(6)


def numbers(*shape: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))  # type: ignore[return-value]


def queries_and_passages(queries: int, passages: int) -> dict[str, Tensor]:
    """Pairs, a query's one after the other; queries of two tokens."""
    batch = ragged_batch([12] * (queries * passages))
    ids = batch["input_ids"]
    ids[:, 0] = 3
    ids[:, 1:3] = torch.arange(queries).repeat_interleave(passages)[:, None] + 20
    ids[:, [3, -1]] = SEPARATOR
    return batch


@pytest.mark.parametrize(
    ("head", "settings", "reads", "kind"),
    [
        ("sequence", {}, None, "classes"),
        ("sequence", {"problem_type": "multi_label_classification"}, None, "labels"),
        ("sequence", {"problem_type": "regression"}, None, "numbers"),
        ("regression", {}, None, "numbers"),
        ("token", {}, None, "classes"),
        ("question", {}, None, "numbers"),
        ("encoder", {}, "mean", "embedding"),
        ("encoder", {}, "first", "embedding"),
        ("encoder", {}, "all", "numbers"),
    ],
)
def test_what_is_compared(head: str, settings: dict[str, Any], reads: Any, kind: str) -> None:
    model, batch = tiny_model(head=head, **settings), ragged_batch([5, 9, 7, 5])
    with prunable(model, tp.FixedThreshold(final_token_threshold=0), reads):
        found = divergence_of(model, batch)
    assert found.kind == kind
    assert found.groups.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("passages", "kind"), [(1, "numbers"), (3, "ranking")])
def test_scores_of_several_passages_for_each_query_are_a_ranking(passages: int, kind: str) -> None:
    model, batch = tiny_model(head="regression"), queries_and_passages(4, passages)
    with prunable(model, tp.FixedThreshold(final_token_threshold=0)):
        found = divergence_of(model, batch)
        single = divergence_of(model, ragged_batch([9] * 12))
    assert found.kind == kind
    assert len(torch.unique(found.groups)) == 4
    assert torch.equal(found.groups, torch.arange(4).repeat_interleave(passages))
    assert single.kind == "numbers"


def test_embeddings_by_how_texts_rank_each_other() -> None:
    dense, pruned = numbers(6, 5)

    def ranking(text: Tensor, others: Tensor, own: int) -> list[float]:
        """The softmax of cosines ÷ 0.05 to all other texts."""
        found = [float(text @ x) / math.sqrt(float(text @ text) * float(x @ x)) for x in others]
        powers = [math.exp(cosine / 0.05) for i, cosine in enumerate(found) if i != own]
        return [power / sum(powers) for power in powers]

    each = []
    for i in range(6):
        wanted = ranking(dense[i], dense, i)
        for query in (dense[i], pruned[i]):
            found = ranking(query, pruned, i)
            each.append(sum(p * math.log(p / q) for p, q in zip(wanted, found, strict=True)) / 2)
    mean, error = Divergence("embedding", ALONE).between(dense, pruned, ALONE)
    assert mean == pytest.approx(sum(each) / 6, rel=1e-4)
    losses = [sum(each[2 * i : 2 * i + 2]) for i in range(6)]
    spread = math.sqrt(sum((x - mean) ** 2 for x in losses) / 5)
    assert error == pytest.approx(spread / math.sqrt(6), rel=1e-3)
    assert Divergence("embedding", ALONE).between(dense, 7 * dense, ALONE)[0] == pytest.approx(0, abs=1e-6)


def test_embeddings_by_how_spans_of_a_text_find_it() -> None:
    vectors = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    owners = torch.tensor([9, 2, 2, 5, 0, 77, 4])  # text 3 has none, and 77 is not among these texts
    texts = torch.tensor([0, 9, 2, 3, 4, 5])
    bad, _ = numbers(6, 5)
    good = torch.stack([vectors[owners == text].sum(0) if text in owners else bad[3] for text in texts])

    def found(span: Tensor, others: Tensor, own: int) -> float:
        powers = [math.exp(float(torch.cosine_similarity(span, x, 0)) / 0.05) for x in others]
        return math.log(powers[own] / sum(powers))

    missed = []
    for own, text in enumerate(texts):
        mine = [span for span, owner in zip(vectors, owners, strict=True) if owner == text]
        each = [found(span, good, own) - found(span, bad, own) for span in mine]
        missed.append(sum(each) / max(1, len(each)))
    assert sum(missed) > 0
    compared = Divergence("embedding", texts, Spans(vectors, owners))
    ranked = [Divergence("embedding", ALONE)._losses(*pair, ALONE) for pair in ((good, bad), (bad, good))]
    losses = [a + float(b) / 4 for a, b in zip(missed, ranked[0], strict=True)]
    mean, error = compared.between(good, bad, texts)
    assert mean == pytest.approx(sum(losses) / 6, rel=1e-4)
    spread = math.sqrt(sum((x - mean) ** 2 for x in losses) / 5)
    assert error == pytest.approx(spread / math.sqrt(6), rel=1e-4)
    assert compared.between(good, 3 * good, texts)[0] == pytest.approx(0, abs=1e-6)
    # To be found better than before is no gain.
    assert compared.between(bad, good, texts)[0] == pytest.approx(float(ranked[1].mean()) / 4, rel=1e-4)


@pytest.mark.parametrize("left", [False, True])
def test_spans_are_of_their_texts_between_the_first_and_the_last_token(left: bool) -> None:
    lengths = [60, 2, 9, 3, 1, 20]
    ids = torch.full((6, 60), 7)
    mask = torch.zeros(6, 60, dtype=torch.long)
    texts = [[1, *range(100 * row + 10, 100 * row + 8 + length), 2][:length] for row, length in enumerate(lengths)]
    for row, text in enumerate(texts):
        columns = slice(60 - len(text), 60) if left else slice(len(text))
        ids[row, columns], mask[row, columns] = torch.tensor(text), 1
    rows = torch.tensor([5, 0, 1, 2, 3, 4])
    drawn = drawn_spans({"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids}, rows, 7, seed=1)
    assert drawn is not None
    batch, owners = drawn
    assert owners.tolist() == [row for row in (5, 0, 2, 3) for _ in range(4)]
    found: dict[int, set[tuple[int, ...]]] = {}
    for span, valid, row in zip(batch["input_ids"], batch["attention_mask"].bool(), owners.tolist(), strict=True):
        assert (span[~valid] == 7).all()
        first, *inside, last = span[valid].tolist()
        assert (first, last) == (1, 2) and len(inside) == {5: 9, 0: 16, 2: 4, 3: 1}[row]
        start = texts[row].index(inside[0])
        assert inside == texts[row][start : start + len(inside)]
        found.setdefault(row, set()).add(tuple(inside))
    assert len(found[0]) > 1 and len(found[3]) == 1
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
    assert drawn_spans({"input_ids": ids, "attention_mask": mask}, torch.tensor([1, 4]), 7, seed=1) is None


def test_classes_by_their_probabilities() -> None:
    dense, pruned = numbers(6, 3)
    each = [
        sum(float(p) * math.log(p / q) for p, q in zip(a.softmax(0), b.softmax(0), strict=True))
        for a, b in zip(dense, pruned, strict=True)
    ]
    compared = Divergence("classes", ALONE)
    assert compared.between(dense, pruned, ALONE)[0] == pytest.approx(sum(each) / 6, rel=1e-4)
    shifted = compared.between(dense, pruned + 7, ALONE)[0]
    assert shifted == pytest.approx(compared.between(dense, pruned, ALONE)[0], rel=1e-3)


def test_labels_each_by_its_own() -> None:
    dense, pruned = numbers(6, 3)
    each = [
        float(p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
        for p, q in zip(dense.sigmoid().flatten(), pruned.sigmoid().flatten(), strict=True)
    ]
    assert Divergence("labels", ALONE).between(dense, pruned, ALONE)[0] == pytest.approx(sum(each) / 18, rel=1e-4)


def test_numbers_by_their_variance() -> None:
    dense, pruned = numbers(6, 2)
    squares = [float((pruned - dense)[:, i].square().mean() / dense[:, i].var()) for i in range(2)]
    compared = Divergence("numbers", ALONE)
    assert compared.between(dense, pruned, ALONE)[0] == pytest.approx(sum(squares) / 2, rel=1e-4)
    units = compared.between(100 * dense, 100 * pruned, ALONE)[0]
    assert units == pytest.approx(compared.between(dense, pruned, ALONE)[0], rel=1e-4)


def test_rankings_query_by_query() -> None:
    dense, pruned = numbers(12, 1)
    groups = torch.tensor([0, 1, 2] * 4)
    compared = Divergence("ranking", groups)
    mean, error = compared.between(dense, pruned, groups)
    parts = [compared.between(dense[groups == g], pruned[groups == g], groups[groups == g])[0] for g in range(3)]
    assert mean == pytest.approx(sum(parts) / 3, rel=1e-4) and error > 0
    shift = torch.tensor([3.0, -5.0, 0.5])[groups][:, None]
    assert compared.between(dense, dense + shift, groups)[0] == pytest.approx(0, abs=1e-5)
    assert compared.between(10 * dense, 10 * pruned, groups)[0] == pytest.approx(mean, rel=1e-3)


def test_rankings_by_ndcg_with_smooth_ranks() -> None:
    dense, pruned = numbers(5, 1)
    one = torch.zeros(5, dtype=torch.int64)

    def ndcg(scores: list[float]) -> float:
        mean = sum(scores) / 5
        spread = math.sqrt(sum((x - mean) ** 2 for x in scores) / 5)
        found = total = 0.0
        for place, own in enumerate(sorted(range(5), key=lambda i: -float(dense[i])), start=1):
            rank = 1.0
            for other in range(5):
                if other != own:
                    rank += 1 / (1 + math.exp((scores[own] - scores[other]) / (0.5 * spread)))
            found += 1 / place**2 / math.log2(1 + rank)
            total += 1 / place**2
        return found / total

    before, after = (ndcg([float(x) for x in scores]) for scores in (dense, pruned))
    assert Divergence("ranking", one).between(dense, pruned, one)[0] == pytest.approx(before - after, rel=1e-5)
    assert Divergence("ranking", one).between(dense, dense * 3 - 1, one)[0] == pytest.approx(0, abs=1e-6)


def test_the_top_of_a_ranking_counts_most() -> None:
    dense = torch.arange(8.0, 0, -1)[:, None]
    top, bottom = dense.clone(), dense.clone()
    top[[0, 1]], bottom[[6, 7]] = dense[[1, 0]], dense[[7, 6]]
    groups = torch.zeros(8, dtype=torch.int64)
    swapped = [Divergence("ranking", groups).between(dense, other, groups)[0] for other in (top, bottom)]
    assert swapped[0] > 2 * swapped[1] > 0


def test_a_single_example_has_no_error() -> None:
    one = torch.zeros(1, dtype=torch.int64)
    mean, error = Divergence("ranking", one).between(torch.ones(1, 1), torch.zeros(1, 1), one)
    assert (mean, error) == (0.0, 0.0)
    assert_close(
        torch.tensor(Divergence("numbers", one).between(torch.ones(2, 1), torch.ones(2, 1), one)), torch.zeros(2)
    )
