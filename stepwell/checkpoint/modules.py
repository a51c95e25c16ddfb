"""Models: what of a file belongs to which parameter and buffer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.nn.parameter import is_lazy

from ..matching import LoadReport, with_nearest
from ..swa_utils import AveragedModel
from .names import names_inside
from .older import as_modules_read
from .states import Source

__all__ = ["Fit", "fit"]

STATE = "_extra_state"
"""How the names end of what modules save beside tensors, after `get_extra_state`."""


@dataclass
class Fit:
    """What is going to be loaded into a module.

    Attributes:
        pairs: saved tensors, and the memory of the module that they belong into
        states: what modules in it get by `set_extra_state`
        others: what belongs to no memory of the module, by its names in a state dict
        report: what does not fit
    """

    module: nn.Module
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    states: list[tuple[nn.Module, Any]] = field(default_factory=list)
    others: dict[str, Any] = field(default_factory=dict)
    report: LoadReport = field(default_factory=LoadReport)

    def set_states(self, undo: ExitStack) -> None:
        """Have modules take their extra state; what puts it back goes onto the stack."""
        for module, value in self.states:
            undo.callback(_set_quietly, module, module.get_extra_state())
            module.set_extra_state(value)

    def finish(self, source: Source) -> None:
        """Write what was not read into its place, and have autograd know of what was."""
        for saved, live in self.pairs:
            if source.name_of(saved) is None:
                with torch.inference_mode():
                    live.copy_(saved)
            torch.autograd.graph.increment_version(live)
        for averaged in _averages(self.module):
            averaged.round_averages()

    def run_hooks(self) -> None:
        """Have the module take what is left, and call what was registered for after a load."""
        if self.others:
            # with the module's own tensors, so that nothing seems to be missing
            self.module.load_state_dict({**self.module.state_dict(), **self.others}, strict=False)
            return
        for module in _children_first(self.module):
            for hook in module._load_state_dict_post_hooks.values():
                hook(module, _IncompatibleKeys([], []))


def _set_quietly(module: nn.Module, state: Any) -> None:
    with suppress(Exception):
        module.set_extra_state(state)


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _children_first(child)
    yield module


def fit(
    what: str, module: nn.Module, saved: Mapping[str, Any], source: Source, strict_dtype: bool
) -> Fit:
    """Match a saved state dict with a module by name, without changing it.

    Args:
        what: the role of the module, for the report
        module: what would be loaded into
        saved: tensors, with values or without, and other values
        source: where the tensors come from
        strict_dtype: report tensors whose dtype is not the module's
    """
    given = module.state_dict()
    live = {inside: (name, given[name]) for name, inside in names_inside(module, given).items()}
    if saved.keys() != live.keys():
        saved = as_modules_read(module, saved, source)
    found = Fit(module)
    mismatched = list(_assigned(found, saved, live, source, strict_dtype))
    missing = [name for name in live if name not in saved]
    unexpected = [name for name in saved if name not in live]
    columns = (
        with_nearest(missing, unexpected, "the file has"),
        with_nearest(unexpected, missing, f"the {what} has"),
        mismatched,
    )
    found.report = LoadReport(*(tuple(f"{what}: {entry}" for entry in each) for each in columns))
    return found


def _assigned(
    found: Fit,
    saved: Mapping[str, Any],
    live: Mapping[str, tuple[str, Any]],
    source: Source,
    strict_dtype: bool,
) -> Iterator[str]:
    """Give each saved value its place, and say what has none."""
    module = found.module
    tensors = (*module.parameters(), *module.buffers())
    own = {t.data_ptr(): t.dtype for t in tensors if not is_lazy(t)}
    for averaged in _averages(module):
        # older files have averages as the module holds them
        own |= {copy.data_ptr(): t.dtype for copy, t in averaged.exact_averages()}
    first: dict[Any, str] = {}
    for name in (name for name in saved if name in live):
        value, (own_name, target) = saved[name], live[name]
        if name.rpartition(".")[2] == STATE:
            holder = module.get_submodule(own_name.removesuffix(STATE).removesuffix("."))
            found.states.append((holder, source.filled(value)))
        elif problem := _problem(value, target, own, strict_dtype):
            yield f"{name} {problem}"
        elif (other := first.setdefault(_place(target), name)) != name and not source.are_alike(
            saved[other], value
        ):
            yield f"{name} and {other} are one tensor in the model, and differ in the file"
        elif isinstance(target, Tensor) and target.data_ptr() in own:
            found.pairs.append((value, target))
        else:
            found.others[own_name] = source.filled(value)


def _averages(module: nn.Module) -> list[AveragedModel]:
    return [each for each in module.modules() if isinstance(each, AveragedModel)]


def _place(target: Any) -> Any:
    """Where a tensor lies; two with one place are tied."""
    if not isinstance(target, Tensor) or not target.numel():
        return id(target)
    return target.data_ptr(), target.shape, target.stride(), target.dtype, target.device


def _problem(
    saved: Any, live: Any, own: Mapping[int, torch.dtype], strict_dtype: bool
) -> str | None:
    """Why a value cannot be loaded into this one, or None.

    Args:
        saved: a value in the file
        live: a value in the module's state dict
        own: by their places, what else than their own the dtypes of the module's tensors may be
        strict_dtype: whether these are the only ones
    """
    if not isinstance(saved, Tensor) or not isinstance(live, Tensor):
        alike = isinstance(saved, Tensor) == isinstance(live, Tensor)
        return None if alike else f"is {type(saved).__name__}, must be {type(live).__name__}"
    if is_lazy(live):
        return "has no shape yet: pass data through the model first"
    if saved.shape != live.shape:
        return f"has shape {tuple(saved.shape)}, must have {tuple(live.shape)}"
    if problem := _of_memory(live):
        return problem
    if saved.dtype == own.get(live.data_ptr()):
        return None
    return _of_dtype(saved.dtype, live.dtype, strict_dtype)


def _of_memory(live: Tensor) -> str | None:
    if live.is_meta:
        return "is on the meta device, which has no memory: call to_empty(device=...) first"
    if hasattr(live, "to_local"):
        return "is spread over processes: load it with torch.distributed.checkpoint"
    if any(size > 1 and step == 0 for size, step in zip(live.shape, live.stride(), strict=True)):
        return "is expanded: its elements share memory and cannot be written to; clone it first"
    if live.is_conj() or live.is_neg():
        return "is a conjugate of other memory: resolve_conj() and resolve_neg() give it its own"
    return None


def _of_dtype(saved: torch.dtype, live: torch.dtype, strict: bool) -> str | None:
    if saved == live:
        return None
    words = f"is {saved}, must be {live}"
    if saved.is_complex != live.is_complex or not _are_inexact(saved, live):
        return words
    return f"{words} (dtype='param' converts)" if strict else None


def _are_inexact(*dtypes: torch.dtype) -> bool:
    return all(dtype.is_floating_point or dtype.is_complex for dtype in dtypes)
