"""LBFGS: how many evaluations, and how much time, it takes to reach a given loss."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rich.table import Table

import stepwell

from .measure import Check

__all__ = ["DESCENTS", "Descent", "Reached", "descents_table", "saved"]

Problem = tuple[list[torch.nn.Parameter], Callable[[], torch.Tensor]]
PACKAGES = {"stepwell": stepwell, "torch": torch.optim}
SEARCHES = {"no search": None, "strong Wolfe": "strong_wolfe"}

ROUNDS = 3
STEPS = 200
"""How many steps of 20 iterations it may take."""

CHANCE = 1.02
"""After 100 iterations, runs that differ by rounding have little in common: one problem may take
5 % more evaluations or less, and a few of them together 2 %."""


def rosenbrock() -> Problem:
    """The banana-shaped valley in the plane, from the classic start."""
    x = torch.nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    return [x], lambda: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def quadratic(seed: int) -> Problem:
    """Half x A x - b x in 100 dimensions, with a condition number of 10,000."""
    draw, kind = torch.Generator().manual_seed(seed), torch.float64
    axes, _ = torch.linalg.qr(torch.randn(100, 100, generator=draw, dtype=kind))
    matrix = (axes * torch.logspace(0, 4, 100, dtype=kind)) @ axes.T
    b = torch.randn(100, generator=draw, dtype=kind)
    least = -0.5 * b @ torch.linalg.solve(matrix, b)
    x = torch.nn.Parameter(torch.zeros(100, dtype=kind))
    return [x], lambda: 0.5 * x @ (matrix @ x) - b @ x - least


def logistic_regression() -> Problem:
    """Malignant or benign: 569 tumours with 30 measures each."""
    from sklearn.datasets import load_breast_cancer

    inputs, labels = map(torch.tensor, load_breast_cancer(return_X_y=True))
    inputs, labels = (inputs - inputs.mean(0)) / inputs.std(0), labels.double()
    weight = torch.nn.Parameter(torch.zeros(30, dtype=torch.float64))
    bias = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def loss() -> torch.Tensor:
        logits = inputs @ weight + bias
        fit = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        return fit + 5e-5 * weight.square().sum()

    return [weight, bias], loss


def many() -> Problem:
    """A parabola in 100,000 dimensions in float32, with a condition number of 1,000."""
    curvatures = torch.logspace(0, 3, 100_000)
    x = torch.nn.Parameter(torch.ones(100_000))
    return [x], lambda: 0.5 * (curvatures * x * x).sum()


@dataclass(frozen=True)
class Descent:
    """A row: problems, the loss at which the clock stops, and how to search."""

    work: str
    problems: Sequence[Callable[[], Problem]]
    target: float
    search: str
    slack: float = 1.0

    def __str__(self) -> str:
        return f"LBFGS {self.work}, {self.search}"

    def measure(self, rounds: int = ROUNDS) -> Reached:
        """Let the packages take turns."""
        found = Reached(self)
        for _ in range(rounds):
            for name, package in PACKAGES.items():
                runs = [self.run(package, problem) for problem in self.problems]
                found.evaluations[name] = sum(evaluations for evaluations, _ in runs)
                time_taken = 1e3 * sum(seconds for _, seconds in runs)
                found.milliseconds.setdefault(name, []).append(time_taken)
        return found

    def run(self, package: Any, problem: Callable[[], Problem]) -> tuple[float, float]:
        """Evaluations and seconds to the target; infinite if it is not reached."""
        params, loss = problem()
        optimizer = package.LBFGS(params, line_search_fn=SEARCHES[self.search])
        evaluations, reached = 0, (math.inf, math.inf)

        def closure() -> torch.Tensor:
            nonlocal evaluations, reached
            optimizer.zero_grad()
            value = loss()
            value.backward()  # type: ignore[no-untyped-call]
            evaluations += 1
            if math.isinf(reached[0]) and value.item() <= self.target:
                reached = evaluations, time.perf_counter() - start
            return value

        start = time.perf_counter()
        for _ in range(STEPS):
            optimizer.step(closure)
            if not math.isinf(reached[0]):
                break
        return reached


@dataclass(frozen=True)
class Reached:
    """Evaluations and milliseconds to the target, by package."""

    descent: Descent
    evaluations: dict[str, float] = field(default_factory=dict)
    milliseconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def medians(self) -> dict[str, float]:
        """The middle one of each package's times, in milliseconds."""
        return {name: statistics.median(times) for name, times in self.milliseconds.items()}

    def misses(self) -> list[str]:
        """More evaluations than torch's, or more time."""
        ours, theirs = (self.evaluations[name] for name in PACKAGES)
        checks = [
            Check(ours, self.descent.slack * theirs, " evaluations", at_most=True),
            Check(self.medians["torch"] / self.medians["stepwell"], 1.0, "x torch"),
        ]
        return [check.words for check in checks if check.missed_by != 0]


DESCENTS = [
    Descent(work, problems, target, search, slack)
    for work, problems, target, slack in (
        ("Rosenbrock", [rosenbrock], 1e-8, 1.0),
        ("8 quadratics, condition 1e4", [partial(quadratic, n) for n in range(8)], 1e-6, CHANCE),
        ("logistic regression, breast cancer", [logistic_regression], 0.0426298, 1.0),
        ("parabola, 100,000 numbers", [many], 1.0, CHANCE),
    )
    for search in SEARCHES
]


def descents_table(found: Sequence[Reached]) -> Table:
    """A line per descent."""
    table = Table(title="LBFGS: to a given loss (medians)")
    table.add_column("work")
    for name in PACKAGES:
        table.add_column(f"{name}, evaluations", justify="right")
        table.add_column("ms", justify="right")
    table.add_column("must not exceed torch")
    for reached in found:
        numbers: list[str] = []
        for name in PACKAGES:
            numbers += [f"{reached.evaluations[name]:g}", f"{reached.medians[name]:,.1f}"]
        missed, ratio = reached.misses(), reached.medians["torch"] / reached.medians["stepwell"]
        verdict = f"[red]{'; '.join(missed)}[/red]" if missed else f"[green]{ratio:.2f}x[/green]"
        table.add_row(f"{reached.descent.work}, {reached.descent.search}", *numbers, verdict)
    return table


def saved(reached: Reached) -> dict[str, Any]:
    """A row for the file of results."""
    return {
        "work": reached.descent.work,
        "search": reached.descent.search,
        "evaluations": reached.evaluations,
        "milliseconds": {name: round(value, 3) for name, value in reached.medians.items()},
        "missed": reached.misses(),
    }
