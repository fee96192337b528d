"""A budget in milliseconds, by a clock that tells what a model costs and not how busy the machine is."""

from typing import Any

import pytest
import torch

import token_pruning as tp
from tests.tiny import ragged_batch, tiny_model
from token_pruning.budget import clock
from token_pruning.budget.schedules import schedules
from token_pruning.errors import ConfigError

FEW = schedules(3)[:2]
LENGTHS = torch.randint(10, 40, (48,), generator=torch.Generator().manual_seed(0)).tolist()
FIXED_MS, MS_OF_ALL_FLOPS = 2.0, 10.0


class TellingCost(clock.Clock):
    """Its milliseconds are a constant and a part for the FLOPs of the batches."""

    taken = 0

    def _medians(self, *engines: Any) -> list[float]:
        self.taken += 1
        found = []
        for engine in engines:
            with tp.record(engine) as trace:
                for batch in self._batches:
                    engine(**batch)
            found.append(FIXED_MS + MS_OF_ALL_FLOPS * tp.count_flops(engine, trace).relative)
        return found


@pytest.fixture(autouse=True)
def costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("token_pruning.budget.calibration.Clock", TellingCost)


def model() -> Any:
    return tiny_model("bert", "sequence", initializer_range=0.3)


def examples() -> dict[str, torch.Tensor]:
    return ragged_batch(LENGTHS)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_budget_is_the_dearest_that_meets_the_time(batch_size: int) -> None:
    found = tp.calibrate(model(), examples(), target_ms=8.0, batch_size=batch_size, search=FEW)
    assert found.pruned_ms is not None and found.dense_ms is not None
    assert 0.93 * 8 <= found.pruned_ms <= 8.0 < found.dense_ms <= FIXED_MS + MS_OF_ALL_FLOPS
    # Batches are some of the examples, and FLOPs are of other ones.
    assert found.chosen.relative_flops == pytest.approx((found.pruned_ms - FIXED_MS) / MS_OF_ALL_FLOPS, abs=0.05)


def test_a_model_that_is_fast_enough_is_left_whole() -> None:
    pruned = model()
    found = tp.calibrate(pruned, examples(), target_ms=50.0, search=FEW)
    assert found.pruned_ms == found.dense_ms
    assert found.chosen.divergence == pytest.approx(0, abs=1e-6)


def test_a_time_that_cannot_be_met_is_refused_with_what_can() -> None:
    whole = model()
    with pytest.raises(
        ConfigError, match=r"target_ms is 3; .* 0\.\d+ is the lowest .*, a batch takes \d.* ms .* unpruned"
    ):
        tp.calibrate(whole, examples(), target_ms=3.0, search=FEW)
    assert not hasattr(whole, "token_pruner")


def test_time_and_loss_together() -> None:
    batch, dense = examples(), model()
    with torch.no_grad():
        dense.classifier.bias -= dense(**batch).logits.mean(0)
        labels = dense(**batch).logits.argmax(-1)
    labelled = {**batch, "labels": labels}
    found = tp.calibrate(dense, labelled, target_ms=9.0, max_drop=100.0, search=FEW)
    assert found.metric_dense == 100.0 and found.drop_bound is not None and found.pruned_ms is not None
    tp.unprune(dense)
    with pytest.raises(ConfigError, match=r"max_drop is 0.01; .* ms a batch, .* falls from 100.00 to .* both cannot"):
        tp.calibrate(dense, labelled, target_ms=7.0, max_drop=0.01, search=FEW)
    found = tp.calibrate(dense, labelled, target_flops=0.8, max_drop=100.0, search=FEW)
    assert found.drop_bound is not None and found.pruned_ms is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_ms": 5.0, "target_flops": 0.5}, "give target_flops or target_ms, not both"),
        ({"target_ms": -1.0}, "target_ms is -1.0"),
        ({"target_ms": 5.0, "batch_size": 49}, "batch_size is 49; there are 48 examples"),
        ({"target_ms": 5.0, "engine": {"dtype": "float8"}}, "dtype is 'float8'"),
        (
            {"target_ms": 5.0, "engine": {"dtyp": "int8"}},
            "engine is {'dtyp': 'int8'}; it must be a",
        ),
        ({"target_ms": 5.0, "engine": "int8"}, "engine is 'int8'; it must be a dictionary of dtype, threads"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tp.calibrate(model(), examples(), **arguments)


def test_real_milliseconds_of_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = tp.calibrate(model(), examples(), target_ms=1e6, search=FEW, engine={"dtype": "float32", "threads": 1})
    assert found.pruned_ms is not None and 0 < found.pruned_ms < 1e6 and found.dense_ms is not None
