"""Hooks: what others run around a step, around state_dict and around load_state_dict."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch._C._dynamo import eval_frame
from torch.autograd import profiler
from torch.optim.optimizer import _global_optimizer_post_hooks as global_post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as global_pre_hooks
from torch.utils.hooks import RemovableHandle

__all__ = ["KINDS", "Hooks", "hooked", "outside_graphs", "profiled"]

P = ParamSpec("P")
R = TypeVar("R")

get_eval_frame_callback = getattr(
    eval_frame, "get_eval_frame_callback", torch.compiler.is_compiling
)
"""Says whether torch.compile is at work; a call of C, unlike the public one."""

KINDS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class Hooks:
    """The hooks of one optimizer, each kind in the order in which it runs."""

    _stepping = False

    def _make_hooks(self) -> None:
        """Make the registries that are not there yet."""
        for kind in KINDS:
            vars(self).setdefault(kind, OrderedDict())

    def _hooks(self, kind: str) -> list[Callable[..., Any]]:
        """The hooks of a kind as they are now; a hook may remove itself."""
        return list(vars(self)[f"_optimizer_{kind}_hooks"].values())

    def _register(self, kind: str, hook: Any, prepend: bool = False) -> RemovableHandle:
        hooks = vars(self)[f"_optimizer_{kind}_hooks"]
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        if prepend:
            hooks.move_to_end(handle.id, last=False)
        return handle

    def _optimizer_step_code(self) -> None:
        """Called after each step; a Python profiler finds the optimizer by this name."""

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(optimizer, args, kwargs)` before each step.

        `args` starts with the optimizer. The hook may return new `(args, kwargs)` for the step.
        """
        return self._register("step_pre", hook)

    def register_step_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(optimizer, args, kwargs)` after each step."""
        return self._register("step_post", hook)

    def register_state_dict_pre_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call `hook(optimizer)` before `state_dict`; with `prepend`, before the other hooks."""
        return self._register("state_dict_pre", hook, prepend)

    def register_state_dict_post_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call `hook(optimizer, state_dict)` after `state_dict`; it may return another dict."""
        return self._register("state_dict_post", hook, prepend)

    def register_load_state_dict_pre_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call `hook(optimizer, state_dict)` before loading; it may return another dict.

        It is given a shallow copy of what was passed to `load_state_dict`.
        """
        return self._register("load_state_dict_pre", hook, prepend)

    def register_load_state_dict_post_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call `hook(optimizer)` after loading."""
        return self._register("load_state_dict_post", hook, prepend)


def outside_graphs(method: Callable[P, R]) -> Callable[P, R]:
    """A method that code under torch.compile calls as it is, with a break in the graph.

    torch.compiler.disable does the same, but costs more than a small step.
    """

    @functools.wraps(method)
    def around(*args: P.args, **kwargs: P.kwargs) -> R:
        if get_eval_frame_callback():
            quiet: Callable[P, R] = torch.compiler.disable(method)  # type: ignore[no-untyped-call]
            return quiet(*args, **kwargs)
        return method(*args, **kwargs)

    _leave_alone(around)
    return around


def _leave_alone(function: Any) -> None:
    """Keep torch.compile from inlining a function into a graph, and from looking at it itself."""
    function._torchdynamo_disable = True
    # private to torch: without it, a compiled step costs a look at this frame, and works as well
    if hasattr(eval_frame, "_FrameExecStrategy") and hasattr(eval_frame, "set_code_exec_strategy"):
        action = eval_frame._FrameAction
        skip = eval_frame._FrameExecStrategy(action.SKIP, action.DEFAULT)
        eval_frame.set_code_exec_strategy(function.__code__, skip)


def hooked(step: Callable[P, R]) -> Callable[P, R]:
    """A `step` with the hooks, and the label in a profile, around it."""

    @functools.wraps(step)
    def around(*args: P.args, **kwargs: P.kwargs) -> R:
        optimizer: Any = args[0]
        if get_eval_frame_callback():
            quiet: Callable[P, R] = torch.compiler.disable(around)  # type: ignore[no-untyped-call]
            return quiet(*args, **kwargs)
        if (
            global_pre_hooks
            or global_post_hooks
            or optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or profiler._is_profiler_enabled
        ):
            observed: R = _observed(step, optimizer, args, kwargs)
            return observed
        result = step(*args, **kwargs)
        optimizer._optimizer_step_code()
        return result

    _leave_alone(around)
    # torch wraps a step that does not say this
    around.hooked = True  # type: ignore[attr-defined]
    return around


def _observed(step: Any, optimizer: Any, args: Any, kwargs: Any) -> Any:
    if optimizer._stepping:
        # a step that calls super().step() is one step
        return step(*args, **kwargs)
    optimizer._stepping = True
    try:
        with profiled(optimizer, "step"):
            return _with_hooks(step, optimizer, args, kwargs)
    finally:
        del optimizer._stepping


def _with_hooks(step: Any, optimizer: Any, args: Any, kwargs: Any) -> Any:
    for hook in [*global_pre_hooks.values(), *optimizer._hooks("step_pre")]:
        replaced = hook(optimizer, args, kwargs)
        if replaced is not None:
            if not (isinstance(replaced, tuple) and len(replaced) == 2):
                raise RuntimeError(
                    f"{step} must return None or a tuple of (new_args, new_kwargs), but got "
                    f"{replaced}. ({type(optimizer).__name__}: said of the step pre-hook {hook})"
                )
            args, kwargs = replaced
    result = step(*args, **kwargs)
    optimizer._optimizer_step_code()
    for hook in [*optimizer._hooks("step_post"), *global_post_hooks.values()]:
        hook(optimizer, args, kwargs)
    return result


def profiled(optimizer: object, method: str) -> Any:
    """A context that labels a method in a profile, at no cost where there is none."""
    if not profiler._is_profiler_enabled:
        return nullcontext()
    name = type(optimizer).__name__
    return profiler.record_function(f"Optimizer.{method}#{name}.{method}")
