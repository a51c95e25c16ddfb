"""Hooks: what others run around a step, around state_dict and around load_state_dict."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

from torch.autograd import profiler
from torch.optim.optimizer import _global_optimizer_post_hooks as global_post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as global_pre_hooks
from torch.utils.hooks import RemovableHandle

from .compiling import get_eval_frame_callback, leave_alone, uncompiled

__all__ = ["KINDS", "Hooks", "hooked", "profiled", "run_after_step", "run_before_step"]

P = ParamSpec("P")
R = TypeVar("R")

KINDS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)

NONE: Mapping[int, Any] = MappingProxyType({})
"""The hooks of a wrapper with which none was registered."""


class Hooks:
    """The hooks of one optimizer, each kind in the order in which it runs.

    A wrapper around an optimizer may be a subclass that never calls `Optimizer.__init__`. Then its
    `step` is left as it is, as torch leaves it, until a hook is registered with the wrapper itself.
    """

    _stepping = False
    _is_wrapper = False
    """True if this was never constructed: global hooks and the profile see the optimizer inside."""

    def _make_hooks(self) -> None:
        """Make the registries that are not there yet, and a step that looks at them."""
        for kind in KINDS:
            vars(self).setdefault(kind, OrderedDict())
        self._patch_step_function()

    def _patch_step_function(self) -> None:
        """Put the hooks around the step of this class, if it has one of its own."""
        cls: Any = type(self)
        step = cls.step
        if inspect.isfunction(step) and not hasattr(step, "hooked"):
            cls.step = hooked(step)

    def _hooks(self, kind: str) -> list[Callable[..., Any]]:
        """The hooks of a kind as they are now; a hook may remove itself."""
        # not of vars(self): a wrapper may answer with the registries of what it wraps
        return list(getattr(self, f"_optimizer_{kind}_hooks", NONE).values())

    def _register(self, kind: str, hook: Any, prepend: bool = False) -> RemovableHandle:
        if not callable(hook):
            raise TypeError(
                f"{type(self).__name__}.register_{kind}_hook: hook must be a function, got {hook!r}"
            )
        hooks = self._registry(f"_optimizer_{kind}_hooks")
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        if prepend:
            hooks.move_to_end(handle.id, last=False)
        return handle

    def _registry(self, name: str) -> Any:
        found = getattr(self, name, NONE)
        if found is not NONE:
            return found
        self._is_wrapper = True
        self._make_hooks()
        # the step of the class now looks at those of wrappers that have no hooks, too
        for kind in KINDS:
            setattr(type(self), kind, NONE)
        return vars(self)[name]

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


def hooked(step: Callable[P, R]) -> Callable[P, R]:
    """A `step` with the hooks, and the label in a profile, around it."""

    @functools.wraps(step)
    def around(*args: P.args, **kwargs: P.kwargs) -> R:
        optimizer: Any = args[0]
        if get_eval_frame_callback():
            return uncompiled(around, args, kwargs)
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
        # torch's, by whose code a profiler of Python finds the optimizer and its state
        optimizer._optimizer_step_code()
        return result

    leave_alone(around)
    # torch wraps a step that does not say this
    around.hooked = True  # type: ignore[attr-defined]
    return around


def _observed(step: Any, optimizer: Any, args: Any, kwargs: Any) -> Any:
    if optimizer._stepping:
        # a step that calls super().step() is one step
        return step(*args, **kwargs)
    optimizer._stepping = True
    try:
        if optimizer._is_wrapper or optimizer._optimizer_step_pre_hooks is NONE:
            return _with_hooks(step, optimizer, args, kwargs, {}, {})
        with profiled(optimizer, "step"):
            return _with_hooks(step, optimizer, args, kwargs, global_pre_hooks, global_post_hooks)
    finally:
        del optimizer._stepping


def _with_hooks(step: Any, optimizer: Any, args: Any, kwargs: Any, before: Any, after: Any) -> Any:
    args, kwargs = run_before_step(optimizer, args, kwargs, before)
    result = step(*args, **kwargs)
    run_after_step(optimizer, args, kwargs, after)
    return result


def run_before_step(optimizer: Any, args: Any, kwargs: Any, others: Any = NONE) -> Any:
    """Call the hooks that come before a step, first the `others`; return what the step takes."""
    for hook in [*others.values(), *optimizer._hooks("step_pre")]:
        replaced = hook(optimizer, args, kwargs)
        if replaced is not None:
            if not (isinstance(replaced, tuple) and len(replaced) == 2):
                raise RuntimeError(
                    f"{type(optimizer).step} must return None or a tuple of (new_args, "
                    f"new_kwargs), but got {replaced}. ({type(optimizer).__name__}: returned by "
                    f"the step pre-hook {hook})"
                )
            args, kwargs = replaced
    return args, kwargs


def run_after_step(optimizer: Any, args: Any, kwargs: Any, others: Any = NONE) -> None:
    """Call what comes after a step: its hooks, then the `others`."""
    optimizer._optimizer_step_code()
    for hook in [*optimizer._hooks("step_post"), *others.values()]:
        hook(optimizer, args, kwargs)


def profiled(optimizer: object, method: str) -> Any:
    """A context that labels a method in a profile, at no cost where there is none."""
    if not profiler._is_profiler_enabled:
        return nullcontext()
    name = type(optimizer).__name__
    return profiler.record_function(f"Optimizer.{method}#{name}.{method}")
