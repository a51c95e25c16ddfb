"""Together: what takes a step of several optimizers, all prepared before the first one moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch.optim import Optimizer as TorchOptimizer

from ..cohort import Scaling
from ..hooks import run_after_step, run_before_step
from ..optimizer import Optimizer

__all__ = ["Together"]


class Together:
    """What takes a step of all optimizers: all are prepared before the first one moves."""

    def __init__(self, members: Mapping[str, TorchOptimizer]) -> None:
        self._members = members
        self._scaling = Scaling()
        self._runs: list[Callable[[], Any]] = []

    def load(self, scaling: Scaling) -> bool:
        """Check and read what the optimizers need that can be prepared."""
        self._scaling = scaling
        self._runs = []
        for member in self._members.values():
            with _scaled(member, scaling):
                self._runs.append(_prepared(member))
        return True

    def run(self) -> None:
        """Take a step with each optimizer."""
        runs, self._runs = self._runs, []
        for member, run in zip(self._members.values(), runs, strict=True):
            with _scaled(member, self._scaling):
                run()

    def describe(self) -> list[str]:
        """A line per optimizer; each says itself what runs it."""
        return list(self._members)


def _prepared(member: Any) -> Callable[[], Any]:
    """What takes the step of one optimizer, whose work is done ahead as far as possible."""
    if not (isinstance(member, Optimizer) and member.step == MethodType(Optimizer.step, member)):
        step: Callable[[], Any] = member.step
        return step
    args, kwargs = run_before_step(member, (member,), {})
    run = member._prepare()

    def run_with_hooks() -> None:
        run()
        run_after_step(member, args, kwargs)

    return run_with_hooks


@contextmanager
def _scaled(member: TorchOptimizer, scaling: Scaling) -> Iterator[None]:
    """Inside, the optimizer knows what a GradScaler has asked of all of them."""
    if scaling == (None, None):
        yield
        return
    vars(member).update(grad_scale=scaling.grad_scale, found_inf=scaling.found_inf)
    try:
        yield
    finally:
        del vars(member)["grad_scale"], vars(member)["found_inf"]
