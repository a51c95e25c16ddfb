"""Models: what of a file belongs to which parameter and buffer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..matching import LoadReport, with_nearest

__all__ = ["Fit", "fit"]


class Fit(NamedTuple):
    """What is going to be loaded into a module.

    Attributes:
        pairs: saved tensors, and the memory of the module that they belong into
        others: what the module wants to be given by its own `load_state_dict`
        report: what does not fit
    """

    module: torch.nn.Module
    pairs: list[tuple[Tensor, Tensor]]
    others: dict[str, Any]
    report: LoadReport

    @torch.no_grad()
    def finish(self, name_of: Callable[[Tensor], str | None]) -> None:
        """Write what was not read into its place, and have autograd know of what was."""
        for saved, live in self.pairs:
            if name_of(saved) is None:
                live.copy_(saved)
            else:
                torch.autograd.graph.increment_version(live)
        if self.others:
            self.module.load_state_dict(self.others, strict=False)


def fit(what: str, module: torch.nn.Module, saved: Mapping[str, Any], strict_dtype: bool) -> Fit:
    """Match a saved state dict with a module by name, without changing it.

    Args:
        what: the role of the module, for the report
        module: what would be loaded into
        saved: tensors, with values or without, and other values
        strict_dtype: report tensors whose dtype is not the module's
    """
    live = module.state_dict()
    own = {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    missing = [name for name in live if name not in saved]
    unexpected = [name for name in saved if name not in live]
    mismatched: list[str] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    others: dict[str, Any] = {}
    for name in saved:
        if name not in live:
            continue
        problem = _problem(saved[name], live[name], strict_dtype)
        if problem is not None:
            mismatched.append(f"{what}: {name} {problem}")
        elif isinstance(live[name], Tensor) and live[name].data_ptr() in own:
            pairs.append((saved[name], live[name]))
        else:
            others[name] = saved[name]
    report = LoadReport(
        tuple(f"{what}: {entry}" for entry in with_nearest(missing, unexpected, "the file has")),
        tuple(f"{what}: {entry}" for entry in with_nearest(unexpected, missing, f"the {what} has")),
        tuple(mismatched),
    )
    return Fit(module, pairs, others, report)


def _problem(saved: Any, live: Any, strict_dtype: bool) -> str | None:
    if not isinstance(saved, Tensor) or not isinstance(live, Tensor):
        alike = isinstance(saved, Tensor) == isinstance(live, Tensor)
        return None if alike else f"is {type(saved).__name__}, must be {type(live).__name__}"
    if saved.shape != live.shape:
        return f"has shape {tuple(saved.shape)}, must have {tuple(live.shape)}"
    if saved.is_complex() != live.is_complex() or (strict_dtype and saved.dtype != live.dtype):
        return f"is {saved.dtype}, must be {live.dtype} (dtype='param' converts)"
    return None
