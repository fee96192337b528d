"""Ridge regression, fitted batch by batch in closed form."""

import torch
from torch import Tensor


class Ridge:
    """Sums that a ridge regression needs; the rows themselves are not kept."""

    def __init__(self) -> None:
        """Start without rows."""
        self.rows = 0
        self._x: Tensor | None = None
        self._y: Tensor | None = None
        self._xx: Tensor | None = None
        self._xy: Tensor | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take some rows in.

        Args:
            x: ``[rows, in]`` floating point, what is known.
            y: ``[rows, out]`` floating point, what is to be predicted.
        """
        x, y = x.float(), y.float()
        parts = (x.sum(0).double(), y.sum(0).double(), (x.T @ x).double(), (x.T @ y).double())
        if self._x is None:
            self._x, self._y, self._xx, self._xy = parts
        else:
            assert self._y is not None and self._xx is not None and self._xy is not None
            for total, part in zip((self._x, self._y, self._xx, self._xy), parts, strict=True):
                total += part
        self.rows += len(x)

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Means of ``x`` and ``y``, and the covariance of ``x`` ``[in, in]``; float64."""
        assert self._x is not None and self._y is not None and self._xx is not None
        mean_x = self._x / self.rows
        return mean_x, self._y / self.rows, self._xx / self.rows - torch.outer(mean_x, mean_x)

    def solve(self, penalty: float) -> Tensor:
        """The affine map with the least squared error and small weights.

        Args:
            penalty: of squared weights, in units of the mean variance of ``x`` times the number of rows.

        Returns:
            ``[out, in + 1]`` float32; the last column is what is added.
        """
        assert self._x is not None and self._y is not None and self._xx is not None and self._xy is not None
        mean_x, mean_y = self._x / self.rows, self._y / self.rows
        squares = self._xx - torch.outer(mean_x, self._x)
        products = self._xy - torch.outer(mean_x, self._y)
        size = len(mean_x)
        scale = float(squares.diagonal().mean().clamp(min=1e-12))
        weights = torch.linalg.solve(squares + penalty * scale * torch.eye(size).to(squares), products).T
        return torch.cat([weights, (mean_y - weights @ mean_x)[:, None]], 1).float()
