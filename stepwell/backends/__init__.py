"""The ways to run a Program over many tensors, fastest first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from threading import Thread
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..cohort import Cohort, Facts, Scaling, UnusableError
from ..language import Program

__all__ = ["BACKENDS", "Backend", "Launch", "import_unseen", "launched"]

log = logging.getLogger("stepwell")

BACKENDS = ("triton", "cpu", "foreach", "eager")
"""Module names in this package. `fused=True` asks for the first, `foreach=True` for "foreach"."""


Found = Sequence[Any]
"""The totals that are known, in order: a number by group (None for all parameters), or a tensor
of the numbers by group, the last one for all parameters. It is the latter if all shares were."""


class Launch(Protocol):
    """A cohort made ready to be updated again and again."""

    cohort: Cohort
    stays_on_device: bool
    """Whether it reads numbers that lie on a device there, and skips a step there."""

    def __init__(self, cohort: Cohort) -> None: ...

    def load(self, scaling: Scaling) -> bool:
        """Read what this step needs; False if the facts of the cohort have changed."""

    def shares(self, found: Found) -> list[tuple[int | None, float]] | Tensor:
        """What each parameter adds to the next total of the program.

        As (group or None, number) for those with a gradient, or on a device: one float64 per
        parameter, 0 for those without.
        """

    def run(self, found: Found = ()) -> None:
        """Update the parameters and their state, given all totals of the program."""


class Backend(NamedTuple):
    """One way to run a program."""

    name: str
    refuses: Callable[[Program, Facts], str | None]
    launch: Callable[[Cohort], Launch]


@cache
def backend(name: str) -> Backend:
    """A back-end by name; its module is imported when it is first asked for."""
    module: Any = import_module(f"{__name__}.{name}")
    return Backend(name, module.refuses, module.Launch)


@cache
def import_unseen() -> None:
    """Import what a first step would import, on a thread of its own.

    torch.profiler with `with_stack=True` reads the names of what it has seen when it is asked for
    them. A module's code is gone once it is imported, so a profile in which modules were imported
    ends in UnicodeDecodeError; other threads than those that were there are not looked at.
    """
    thread = Thread(target=_import_all)
    thread.start()
    thread.join()


def _import_all() -> None:
    for name in BACKENDS:
        backend(name)
    # compiles a function that does nothing
    import_module("..native.llvm", __name__).unusable()


def launched(cohort: Cohort) -> Launch:
    """The cohort on the fastest back-end that can run its program on its parameters."""
    program, facts = cohort.program, cohort.facts
    first = "eager" if cohort.aliased else facts.request or BACKENDS[0]
    for name in BACKENDS[BACKENDS.index(first) :]:
        candidate = backend(name)
        reason = candidate.refuses(program, facts)
        if reason is not None:
            log.debug("%s: not on back-end %s: %s", program.name, name, reason)
            continue
        try:
            return candidate.launch(cohort)
        except UnusableError as error:
            log.warning("%s: not on back-end %s: %s", program.name, name, error)
    raise RuntimeError(f"{program.name}: no back-end can run this step")
