"""Together: what takes a step of several optimizers, all prepared before the first one moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard

from torch.optim import Optimizer as TorchOptimizer

from ..cohort import Scaling
from ..hooks import run_after_step, run_before_step
from ..optimizer import Optimizer

__all__ = ["Together"]


class Together:
    """The steps of several optimizers, all prepared before the first one moves.

    No hook runs in between, because it might replace a gradient that has been read. Hooks that come
    before a step therefore run first, and hooks that come after a step run when all have moved.
    """

    def __init__(self, members: Mapping[str, TorchOptimizer]) -> None:
        self._members = members
        self._scaling = Scaling()
        self._runs: list[tuple[TorchOptimizer, Callable[[], Any]]] = []
        self._after: list[Callable[[], None]] = []

    def load(self, scaling: Scaling) -> bool:
        """Check and read what the optimizers need that can be prepared."""
        self._scaling = scaling
        own = [member for member in self._members.values() if _is_plain(member)]
        hooked = [(member, *run_before_step(member, (member,), {})) for member in own]
        self._after = [partial(_run_after, *each) for each in hooked]
        self._runs = []
        for member in own:
            with _scaled(member, scaling):
                self._runs.append((member, member._prepare()))
        others = [member for member in self._members.values() if not _is_plain(member)]
        self._runs += [(member, member.step) for member in others]
        return True

    def run(self) -> None:
        """Take a step with each optimizer, last with those that could not be prepared."""
        runs, after, self._runs, self._after = self._runs, self._after, [], []
        for member, run in runs:
            with _scaled(member, self._scaling):
                run()
        for call in after:
            call()

    def describe(self) -> list[str]:
        """A line per optimizer; each says itself what runs it."""
        return list(self._members)


def _is_plain(member: TorchOptimizer) -> TypeGuard[Optimizer]:
    """Return whether the step is that of `Optimizer`, at most patched by torch's schedules."""
    if type(member).step is not Optimizer.step:
        return False
    step: Any = vars(member).get("step")
    marks = getattr(step, "_wrapped_by_lr_sched", False) and step.__wrapped__ is Optimizer.step
    return step is None or bool(marks)


def _run_after(member: Any, args: Any, kwargs: Any) -> None:
    if "step" in vars(member):
        # what the step of a schedule of torch does
        member._opt_called = True
    run_after_step(member, args, kwargs)


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
