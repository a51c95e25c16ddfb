"""Sparse gradients: a step costs what the rows in the gradient cost, however large the table is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, NamedTuple

import torch
from rich.table import Table

import stepwell

__all__ = ["EMBEDDINGS", "Embedding", "Raced", "embeddings_table", "saved"]

# gradients of different rows, which take turns: a batch rarely has the words of the one before
BATCHES = 16
ROUNDS = 7
WIDTH = 64


@dataclass(frozen=True)
class Embedding:
    """A table of `size` rows of 64 numbers, and batches that touch some `rows` of it."""

    rule: str
    size: int
    rows: int = 1000

    def __str__(self) -> str:
        return f"{self.rule} sparse {self.size:,} x {WIDTH}, {self.rows:,} rows"

    def gradients(self) -> list[torch.Tensor]:
        """As `torch.nn.Embedding(sparse=True)` leaves them: rows in any order, some repeated."""
        draw = torch.Generator().manual_seed(0)
        shape = (self.size, WIDTH)
        return [
            torch.sparse_coo_tensor(
                torch.randint(0, self.size, (1, self.rows), generator=draw),
                torch.randn(self.rows, WIDTH, generator=draw),
                shape,
                check_invariants=True,
            )
            for _ in range(BATCHES)
        ]

    def stepper(self, library: Any) -> tuple[torch.Tensor, Callable[[], None]]:
        """The table, and what takes a step with the next batch."""
        table = torch.nn.Parameter(torch.zeros(self.size, WIDTH))
        optimizer = getattr(library, self.rule)([table], lr=0.1)
        batches = cycle(self.gradients())

        def step() -> None:
            table.grad = next(batches)
            optimizer.step()

        return table, step

    def measure(self) -> Raced:
        """Microseconds per step of both, taking turns, after comparing their numbers."""
        found = {lib.__name__: self.stepper(lib) for lib in (stepwell, torch.optim)}
        for _, step in found.values():
            for _ in range(BATCHES):
                step()
        tables = [table.detach() for table, _ in found.values()]
        apart = float((tables[0] - tables[1]).abs().max())
        times: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(ROUNDS):
            for name, (_, step) in found.items():
                times[name].append(_time(step))
        ours, theirs = (statistics.median(times[lib]) for lib in times)
        return Raced(self, ours, theirs, apart)


def _time(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(BATCHES):
        step()
    return (time.perf_counter() - start) / BATCHES * 1e6


class Raced(NamedTuple):
    """Microseconds per step, and how far the two tables are apart after a round."""

    embedding: Embedding
    stepwell: float
    torch: float
    apart: float

    def misses(self) -> list[str]:
        """What was to be reached and was not."""
        # a few ULP of numbers around 1; written so that NaN fails
        return [] if self.apart <= 1e-5 else [f"{self.apart:.1e} away from torch"]


EMBEDDINGS = [
    Embedding("SparseAdam", 1_000_000),
    Embedding("SparseAdam", 100_000),
    Embedding("SparseAdam", 1_000_000, 10_000),
    Embedding("SGD", 1_000_000),
    Embedding("Adagrad", 1_000_000),
]


def embeddings_table(raced: Sequence[Raced]) -> Table:
    """A line per embedding."""
    table = Table(title="sparse gradients: microseconds per step, medians")
    for name in ("work", "stepwell", "torch", "ratio"):
        table.add_column(name, justify="left" if name == "work" else "right")
    for one in raced:
        wrong = "".join(f" [red]{miss}[/red]" for miss in one.misses())
        ratio = f"{one.torch / one.stepwell:.2f}x"
        times = f"{one.stepwell:,.0f}", f"{one.torch:,.0f}"
        table.add_row(f"{one.embedding}{wrong}", *times, ratio)
    return table


def saved(one: Raced) -> dict[str, Any]:
    """The line, for JSON."""
    times = {"stepwell": round(one.stepwell, 2), "torch": round(one.torch, 2)}
    return {"work": str(one.embedding), "microseconds": times, "missed": one.misses()}
