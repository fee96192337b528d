"""Ridge regression, against least squares with one more row for each penalised weight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import assert_close
from token_pruning.budget.ridge import Ridge


def rows(count: int, size: int, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, generator=generator) * torch.rand(size, generator=generator) + 1
    return x, torch.randn(count, outputs, generator=generator) - 2


def by_least_squares(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    size = x.shape[1]
    strength = penalty * (x - mean_x).square().sum(0).mean()
    above = torch.cat([x - mean_x, strength.sqrt() * torch.eye(size, dtype=torch.float64)])
    weights = torch.linalg.lstsq(above, torch.cat([y - mean_y, torch.zeros(size, y.shape[1])])).solution.T
    return torch.cat([weights, (mean_y - weights @ mean_x)[:, None]], 1)


@given(
    count=st.integers(8, 40),
    size=st.integers(1, 6),
    outputs=st.integers(1, 3),
    penalty=st.sampled_from([0.01, 0.3, 3.0]),
    seed=st.integers(0, 99),
)
def test_ridge_is_least_squares_with_a_row_for_each_weight(
    count: int, size: int, outputs: int, penalty: float, seed: int
) -> None:
    x, y = rows(count, size, outputs, seed)
    ridge = Ridge()
    cut = seed % count
    for part in (slice(0, cut), slice(cut, count)):
        ridge.add(x[part], y[part])
    found = ridge.solve(penalty)
    assert found.dtype == torch.float32 and ridge.rows == count
    assert_close(found, by_least_squares(x, y, penalty), 1e-3)


def test_a_linear_rule_is_found_and_a_great_penalty_leaves_the_mean() -> None:
    x, _ = rows(200, 5, 1, 0)
    rule = torch.tensor([[1.0, -2.0, 0.5, 0.0, 3.0], [0.0, 1.0, 0.0, 2.0, 0.0]])
    y = x @ rule.T + torch.tensor([4.0, -1.0])
    ridge = Ridge()
    ridge.add(x, y)
    assert_close(ridge.solve(1e-9), torch.cat([rule, torch.tensor([[4.0], [-1.0]])], 1), 1e-3)
    flat = ridge.solve(1e9)
    assert flat[:, :-1].abs().max() < 1e-6
    assert flat[:, -1].tolist() == pytest.approx(y.mean(0).tolist(), rel=1e-4)


def test_what_never_changes_says_nothing() -> None:
    ridge = Ridge()
    ridge.add(torch.ones(9, 3), torch.arange(9.0)[:, None])
    assert_close(ridge.solve(0.1), torch.tensor([[0.0, 0.0, 0.0, 4.0]]), 1e-4)
