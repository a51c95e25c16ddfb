"""Compiling: what code under torch.compile finds where it meets an optimizer.

A step runs machine code of its own, so a graph is left for it, as torch leaves one for its fused
kernels. All that is private to torch in this is here.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch._C._dynamo import eval_frame

__all__ = [
    "ParamGroups",
    "get_eval_frame_callback",
    "leave_alone",
    "outside_graphs",
    "skipped",
    "uncompiled",
]

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

REASON = (
    "a stepwell optimizer runs compiled code of its own, which no graph can hold; leave out "
    "fullgraph=True, or call it outside of the function that is compiled"
)

SCHEDULES = (
    "a schedule writes into the groups of an optimizer, which no graph can do; leave out "
    "fullgraph=True, or step the schedule outside of the function that is compiled"
)

get_eval_frame_callback = getattr(
    eval_frame, "get_eval_frame_callback", torch.compiler.is_compiling
)
"""Says whether torch.compile is at work; a call of C, unlike the public one."""

_set_eval_frame = getattr(eval_frame, "set_eval_frame", None)
_set_compiled_frames = getattr(eval_frame, "set_fullgraph_compiled_frame_count", None)


def leave_alone(function: Any) -> None:
    """Keep torch.compile from inlining a function into a graph, and from looking at it itself."""
    _disable(function, REASON, "DEFAULT")


def skipped(method: F) -> F:
    """A method in which torch.compile looks at nothing, and which costs nothing without it.

    A schedule counts its steps: to trace them would be to compile each of them anew.
    """
    _disable(method, SCHEDULES, "SKIP")
    return method


def _disable(function: Any, reason: str, within: str) -> None:
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = reason
    # private to torch: without it, a compiled step costs a look at this frame, and works as well
    if hasattr(eval_frame, "_FrameExecStrategy") and hasattr(eval_frame, "set_code_exec_strategy"):
        action = eval_frame._FrameAction
        skip = eval_frame._FrameExecStrategy(action.SKIP, getattr(action, within))
        eval_frame.set_code_exec_strategy(function.__code__, skip)


def uncompiled(function: Callable[..., R], args: Any, kwargs: Any) -> R:
    """Call a function without torch.compile, in the midst of code that is compiled.

    torch.compiler.disable does the same, but costs more than a small step.
    """
    if _set_compiled_frames is not None:
        # torch.compile(optimizer.step, fullgraph=True) asks afterwards whether any frame was
        # compiled; this one is compiled already
        frames = _set_compiled_frames(-1)
        if frames >= 0:
            _set_compiled_frames(frames + 1)
    if _set_eval_frame is None:
        quiet: Callable[..., R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return quiet(*args, **kwargs)
    callback = _set_eval_frame(None)
    try:
        return function(*args, **kwargs)
    finally:
        _set_eval_frame(callback)


leave_alone(uncompiled)


def outside_graphs(method: Callable[P, R]) -> Callable[P, R]:
    """A method that code under torch.compile calls as it is, with a break in the graph."""

    @functools.wraps(method)
    def around(*args: P.args, **kwargs: P.kwargs) -> R:
        if get_eval_frame_callback():
            return uncompiled(method, args, kwargs)
        return method(*args, **kwargs)

    leave_alone(around)
    return around


class ParamGroups:
    """The attribute `param_groups`: what is assigned to it, as with any other attribute.

    While torch.compile traces a function, this breaks its graph: what the function does with the
    groups is then done as without torch.compile. The tracer takes them for plain dicts, and would
    write past their checks.
    """

    def __get__(self, optimizer: Any, owner: type) -> Any:
        """Return what was assigned."""
        if optimizer is None:
            return self
        if "torch._dynamo.symbolic_convert" in sys.modules and _is_tracing():
            _break_graph()
        try:
            # vars() would be one more call, at every step of a schedule
            return optimizer.__dict__["param_groups"]
        except KeyError:
            raise AttributeError(
                f"{owner.__name__!r} object has no attribute 'param_groups'"
            ) from None

    def __set__(self, optimizer: Any, groups: Any) -> None:
        """Keep what is assigned: somebody may hold on to it."""
        vars(optimizer)["param_groups"] = groups

    def __delete__(self, optimizer: Any) -> None:
        """Forget what was assigned."""
        vars(optimizer).pop("param_groups", None)


def _is_tracing() -> bool:
    """Return whether torch.compile is tracing on this thread."""
    tracer = sys.modules["torch._dynamo.symbolic_convert"]
    return getattr(getattr(tracer, "tls", None), "current_tx", None) is not None


def _break_graph() -> NoReturn:
    from torch._dynamo.exc import unimplemented

    unimplemented(
        gb_type="param_groups of a stepwell optimizer",
        context="optimizer.param_groups",
        explanation="The groups of a stepwell optimizer check what is written to them, which is "
        "done outside of graphs.",
        hints=["Leave out fullgraph=True, or use param_groups outside of what is compiled."],
    )
