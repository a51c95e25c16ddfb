"""What quasi-Newton methods learn from their steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..modes import without_autocast
from .vectors import dot

__all__ = ["History"]

# the least y s to learn from: torch's number
FLAT = 1e-10
# how many numbers are set aside for the history before it has to grow
ROOM = 2**26

# torch's names for the changes, the steps, and one over their products
LISTS = ("old_dirs", "old_stps", "ro")


class History:
    """The last steps s and the changes y of the gradient over them, as rows of one matrix.

    With R the upper triangle of S Y^T, pairs in order of age, the two-loop recursion (Nocedal and
    Wright, algorithm 7.4) is a product with R^-1, and one with its transpose. A column that joins
    R^-1, or the oldest row that leaves it, changes nothing else in it, so no pair ever moves: the
    newest takes the place of the oldest.

    Attributes:
        limit: how many pairs are kept
        count: how many there are
        oldest: the row of the oldest
        rows: S and Y, (2, rows set aside, numbers in a vector)
        inverse: R^-1, its rows and columns in the order of the matrix
    """

    def __init__(self, like: Tensor, limit: int, count: int = 0) -> None:
        self.limit, self.count, self.oldest = limit, count, 0
        capacity = min(limit, max(count, 1, ROOM // 2 // max(like.numel(), 1)))
        self.rows = like.new_empty(2, capacity, like.numel())
        self.inverse = like.new_zeros(capacity, capacity)
        self._work = torch.empty_like(like)

    def clear(self) -> None:
        """Forget all pairs."""
        self.count = self.oldest = 0
        self.inverse.zero_()

    def learn(self, d: Tensor, t: float, before: Tensor, grad: Tensor) -> float | None:
        """Add the pair of a step `t * d`, given the gradients before and after it.

        Returns:
            the size of an eigenvalue of the inverse Hessian, or None if there is nothing to learn
        """
        y = torch.sub(grad, before, out=self._work)
        ys, yy = t * dot(y, d), dot(y, y)
        # written so that NaN fails
        if not (FLAT < ys < 1 / torch.finfo(y.dtype).tiny and yy < math.inf):
            return None
        row = self._make_room()
        known = self.inverse[: self.count, : self.count]
        column = known @ (self.rows[0, : self.count] @ y)
        self.inverse[: self.count, row] = column.div_(-ys)
        self.inverse[row, row] = 1 / ys
        torch.mul(d, t, out=self.rows[0, row])
        self.rows[1, row] = y
        self.count = max(self.count, row + 1)
        return ys / yy

    def _make_room(self) -> int:
        """The row for another pair; there is no trace of the oldest if it was that one's."""
        row = self.count
        if row == self.limit:
            row, self.oldest = self.oldest, (self.oldest + 1) % self.limit
            self.inverse[row].zero_()
        elif row == len(self.inverse):
            more = min(self.limit - row, row)
            self.rows = pad(self.rows, (0, 0, 0, more))
            self.inverse = pad(self.inverse, (0, more, 0, more))
        return row

    def direction(self, grad: Tensor, scale: float, out: Tensor | None) -> Tensor:
        """Minus the gradient times the inverse Hessian, which is `scale` where it is not known."""
        if not self.count:
            return torch.mul(grad, -scale, out=out)
        s, y = self.rows[0, : self.count], self.rows[1, : self.count]
        inverse = self.inverse[: self.count, : self.count]
        alpha = inverse @ (s @ grad)
        q = torch.addmv(grad, y.T, alpha, alpha=-1, out=self._work)
        rest = torch.addcdiv(y @ q, alpha, inverse.diagonal(), value=-1 / scale)
        return torch.addmv(q, s.T, inverse.T @ rest, beta=-scale, alpha=scale, out=out)

    def fits(self, like: Tensor, limit: int) -> bool:
        """Whether vectors like this can join, up to so many."""
        mine, theirs = self._work, like
        # what was made in inference mode can be written to there only
        return mine.is_inference() <= theirs.is_inference() and (
            (self.limit, mine.shape, mine.dtype, mine.device)
            == (limit, theirs.shape, theirs.dtype, theirs.device)
        )

    def listed(self) -> dict[str, Any]:
        """The pairs as torch lists them, oldest first and as views, and what `restored` needs."""
        columns = self.rows[1], self.rows[0], self.inverse.diagonal()
        views = [column[: self.count].unbind() for column in columns]
        lists = [[*x[self.oldest :], *x[: self.oldest]] for x in views]
        kept = {"inverse": self.inverse, "oldest": self.oldest}
        return {**dict(zip(LISTS, lists, strict=True)), **kept}

    @classmethod
    def restored(cls, state: Mapping[str, Any], like: Tensor, limit: int) -> History:
        """The pairs that a state lists, torch's too; the newest, if there are too many.

        Raises:
            ValueError, RuntimeError, TypeError, AttributeError: they are no such lists, or not of
                vectors like this
        """
        changes, steps, ro = (list(state.get(name) or ())[-limit:] for name in LISTS)
        history = cls(like, limit, len(changes))
        if changes:
            history._take(changes, steps, ro, state)
        return history

    def _take(
        self, changes: list[Tensor], steps: list[Tensor], ro: list[Any], state: Mapping[str, Any]
    ) -> None:
        count = self.count = len(changes)
        if count == self.limit == len(state[LISTS[0]]):
            self.oldest = int(state.get("oldest", 0)) % count
        order = [(self.oldest + i) % count for i in range(count)]
        for row, s, y in zip(order, steps, changes, strict=True):
            self.rows[0, row], self.rows[1, row] = fitted(s, self._work), fitted(y, self._work)
        dtype, device = self._work.dtype, self._work.device
        inverses = torch.stack([torch.as_tensor(x, dtype=dtype, device=device) for x in ro])
        known, saved = slice(0, count), state.get("inverse")
        # torch carries it along, and lists other pairs after its next step
        if (
            saved is not None
            and state.get("oldest") == self.oldest
            and torch.equal(saved.diagonal()[order].to(inverses), inverses)
        ):
            self.inverse[known, known] = saved[known, known]
            return
        s, y = self.rows[:, order]
        with without_autocast(s.device):
            triangle = torch.triu(s @ y.T, 1) + torch.diag(1 / inverses)
        unit = torch.eye(count, dtype=triangle.dtype, device=triangle.device)
        solved = torch.linalg.solve_triangular(triangle, unit, upper=True)
        place = torch.tensor(order, device=triangle.device)
        self.inverse[place[:, None], place] = solved


def fitted(value: Tensor, like: Tensor) -> Tensor:
    """A saved vector as one like this; as many numbers it must have."""
    fit = value.to(like).reshape(like.shape)
    return fit.clone() if fit.is_inference() and not like.is_inference() else fit
