"""What the benchmarks of embeddings and rerankers compute with; their runs need data that is not here."""

import json
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

pytest.importorskip("scipy")


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return import_module(name)


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> Any:
    return benchmark("measures", monkeypatch)


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> Any:
    return benchmark("comparison", monkeypatch)


def test_ranks_count_those_before_the_target_and_ties_against_it(measures: Any) -> None:
    scores = np.array([[0.9, 0.5, 0.1], [0.2, 0.2, 0.1], [0.3, 0.8, 0.9]])
    assert measures.ranks(scores, np.array([0, 1, 0])).tolist() == [0, 1, 2]


def test_scores_of_rankings(measures: Any) -> None:
    found = np.array([0, 1, 2, 9, 10, 100])
    assert measures.ndcg(found) == pytest.approx([1, 1 / np.log2(3), 0.5, 1 / np.log2(11), 0, 0])
    assert measures.reciprocal_rank(found) == pytest.approx([1, 1 / 2, 1 / 3, 1 / 10, 1 / 11, 1 / 101])


def test_spearman_is_of_the_order_alone(measures: Any) -> None:
    values = np.array([0.1, 0.5, 0.2, 0.9])
    assert measures.spearman(values, np.exp(9 * values)) == pytest.approx(100)
    assert measures.spearman(values, -values) == pytest.approx(-100)


def test_an_interval_is_of_the_same_items_and_of_some_only(measures: Any) -> None:
    def mean(outcome: Any, items: Any) -> float:
        return float(outcome[items].mean())

    generator = np.random.default_rng(1)
    dense = generator.normal(size=400) * 100
    everything, few = np.arange(400), np.arange(40)
    assert measures.loss_interval(mean, dense, dense - 2, everything) == pytest.approx((2, 2))  # however it spreads
    noisy = dense - generator.normal(1, 1, size=400)
    low, high = measures.loss_interval(mean, dense, noisy, everything)
    assert low < (dense - noisy).mean() < high
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(400), rel=0.15)
    noisy[40:] = 0
    low, high = measures.loss_interval(mean, dense, noisy, few)
    assert -1 < low < high < 3


@pytest.mark.parametrize("target", [0.01, 0.3, 0.5, 0.74, 1.0, 2.0])
def test_the_length_with_the_nearest_cost(measures: Any, target: float) -> None:
    lengths = [5, 9, 9, 12, 40, 160]

    def cost(length: int) -> float:
        return sum(measures.truncated(lengths, length)) / sum(lengths)

    found = measures.length_for(target, cost, 160)
    every = range(3, 161)
    assert abs(cost(found) - target) == pytest.approx(min(abs(cost(length) - target) for length in every))


def test_truncation_costs_what_shorter_texts_cost(comparison: Any) -> None:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    lengths = [10, 20, 60]
    whole = comparison.flops_of(config, lengths)
    cost = comparison.truncation_cost(config, lengths, 15, first_only=False)
    assert cost == pytest.approx(comparison.flops_of(config, [10, 15, 15]) / whole)
    assert comparison.truncation_cost(config, lengths, 60, first_only=False) == pytest.approx(1)
    assert comparison.truncation_cost(config, lengths, 15, first_only=True) < cost


def test_a_table_keeps_rows_that_were_not_measured_again(
    comparison: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def publish(argv: list[str], rows: list[dict[str, Any]], add: bool) -> Any:
        monkeypatch.setattr("sys.argv", ["/somewhere/benchmarks/embeddings.py", *argv])
        arguments = Namespace(threads=1, output=tmp_path / "quality", add=add, data=Path("/data"))
        comparison.publish(
            comparison.table("a model", "A task.", "nDCG", rows, arguments), arguments, comparison.quality_lines
        )
        capsys.readouterr()
        return json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))

    def row(what: str, score: float) -> dict[str, Any]:
        return {"what": what, "cost": 0.5, "scores": {"all": score}, "losses": {}}

    publish(["--data", "/data"], [row("dense", 80.0), row("truncated", 70.0)], False)
    (table,) = publish(["--data", "/data", "--add"], [row("pruned", 78.0), row("dense", 81.0)], True)
    assert [(each["what"], each["scores"]["all"]) for each in table["rows"]] == [
        ("dense", 81.0), ("truncated", 70.0), ("pruned", 78.0),
    ]  # fmt: skip
    assert table["commands"] == [f"python benchmarks/embeddings.py --data DATA{more}" for more in ("", " --add")]
    comparison.merge(tables := [table], {**table, "rows": [row("timed together", 1.0)]}, whole=True)
    assert [each["what"] for each in tables[0]["rows"]] == ["timed together"]
    text = (tmp_path / "quality.md").read_text(encoding="utf-8")
    assert "| truncated | 0.50 |" in text and "/data" not in text
