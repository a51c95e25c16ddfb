"""Averages of models beside an optimizer: the names of torch.optim.swa_utils, to its contract.

An average that is part of the optimizer's step costs less: see `stepwell.averaged`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.swa_utils import PARAM_LIST as PARAM_LIST
from torch.optim.swa_utils import AveragedModel as TorchAveragedModel

from .batch_statistics import update_bn as update_bn
from .cohort import PLAIN_TYPES
from .compiling import outside_graphs
from .exact import ExactCopies, is_inexact, needs_copy
from .lr_scheduler.swalr import SWALR as SWALR
from .native.overlap import overlapping

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]

Average = Callable[[Tensor, Tensor, Tensor | int], Tensor]
"""(average, current, how many are averaged so far) -> the new average"""

Averages = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]
"""The same for many tensors, in place."""


def get_ema_avg_fn(decay: float = 0.999) -> Average:
    """decay * average + (1 - decay) * current, for one tensor.

    Raises:
        ValueError: `decay` is not in [0, 1]
    """
    _check_decay(decay)

    @torch.no_grad()
    def ema_update(ema_param: Tensor, current_param: Tensor, num_averaged: Tensor | int) -> Tensor:
        return decay * ema_param + (1 - decay) * current_param

    return ema_update


def get_swa_avg_fn() -> Average:
    """The mean of all so far, each counted once, for one tensor."""

    @torch.no_grad()
    def swa_update(
        averaged_param: Tensor, current_param: Tensor, num_averaged: Tensor | int
    ) -> Tensor:
        return averaged_param + (current_param - averaged_param) / (num_averaged + 1)

    return swa_update


def get_ema_multi_avg_fn(decay: float = 0.999) -> Averages:
    """decay * average + (1 - decay) * current, for many tensors in place.

    Tensors may be of any dtypes, and lie on any devices; whole numbers are rounded towards zero.

    Raises:
        ValueError: `decay` is not in [0, 1]
    """
    _check_decay(decay)

    @torch.no_grad()
    def ema_update(
        ema_param_list: Sequence[Tensor],
        current_param_list: Sequence[Tensor],
        num_averaged: Tensor | int,
    ) -> None:
        _move(ema_param_list, current_param_list, 1 - decay)

    return ema_update


def get_swa_multi_avg_fn() -> Averages:
    """The mean of all so far, each counted once, for many tensors in place.

    Tensors may be of any dtypes, and lie on any devices; whole numbers are rounded towards zero.
    A count that lies on a device is left there.
    """

    @torch.no_grad()
    def swa_update(
        averaged_param_list: Sequence[Tensor],
        current_param_list: Sequence[Tensor],
        num_averaged: Tensor | int,
    ) -> None:
        if isinstance(num_averaged, Tensor) and num_averaged.device.type == "cpu":
            num_averaged = int(num_averaged)
        _move(averaged_param_list, current_param_list, 1 / (num_averaged + 1))

    return swa_update


def _check_decay(decay: float) -> None:
    # written so that NaN fails
    if not 0.0 <= decay <= 1.0:
        raise ValueError(
            f"Invalid decay value {decay} provided. Please provide a value in [0,1] range."
        )


def _move(averages: Sequence[Tensor], currents: Sequence[Tensor], weight: float | Tensor) -> None:
    """average + weight * (current - average), in place; a Tensor's weight is not looked at."""
    listed: defaultdict[Any, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for average, current in zip(averages, currents, strict=True):
        if not (average.is_floating_point() or average.is_complex()):
            exact, target = average.double(), current.to(average.device, torch.float64)
            average.copy_(exact + weight * (target - exact))
        else:
            current = current.to(average.device, average.dtype)
            listed[average.device, average.dtype].append((average, current))
    for pairs in listed.values():
        if isinstance(weight, Tensor):
            for average, current in pairs:
                average.lerp_(current, weight.to(average.device, average.dtype))
        else:
            torch._foreach_lerp_([a for a, _ in pairs], [c for _, c in pairs], weight)


class AveragedModel(TorchAveragedModel):
    """A copy of a model whose parameters are averages; torch's class, with its faults mended.

    The first update copies the parameters, each later one averages them. Tensors in half precision
    are averaged in float32, of which a copy is kept beside the module (4 bytes per element): the
    module holds it rounded, and on its own would stop moving where an update is smaller than half
    a unit in its last place. Whole numbers are averaged in float64 likewise; truth values are
    copied. The state dict has torch's keys, and these copies as values: what loads it into half
    precision, torch's class too, rounds them. Writing into the copies changes the average, as
    torch.distributed.checkpoint does when it loads: the module shows it as soon as it is asked for
    (code that torch.compile has made asks for nothing).

    Args:
        model: what is averaged; it is copied
        device: where the copy is to lie, if not where the model does
        avg_fn: (average, current, number averaged) -> new average
        multi_avg_fn: (averages, currents, number averaged), in place; with neither, all count the
            same
        use_buffers: average buffers too, instead of copying them

    Attributes:
        module: the copy
        n_averaged: how many models were averaged

    Raises:
        AssertionError: both functions are given
    """

    def __init__(
        self,
        model: Module,
        device: int | torch.device | None = None,
        avg_fn: Average | None = None,
        multi_avg_fn: Averages | None = None,
        use_buffers: bool = False,
    ) -> None:
        if avg_fn is not None and multi_avg_fn is not None:
            raise AssertionError(
                "Only one of avg_fn and multi_avg_fn should be provided (AveragedModel: leave one "
                "of them None)"
            )
        super().__init__(model, device, avg_fn, multi_avg_fn, use_buffers)
        self._exact = ExactCopies()
        self._counted: tuple[Tensor, int] | None = None
        self.register_state_dict_post_hook(_with_exact_values)  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_exact" not in vars(self):
            # pickled by an earlier version
            self._exact = ExactCopies(vars(self).pop("_wide", None))
            self.register_state_dict_post_hook(_with_exact_values)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        self._show()
        return {**vars(self)}

    @property
    def module(self) -> Module:  # type: ignore[override]
        """The copy, with what was written into values of the state dict."""
        self._show()
        return self._modules["module"]  # type: ignore[return-value]

    def _named_members(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        # those of whom all parameters and buffers are asked of
        self._show()
        return super()._named_members(*args, **kwargs)  # type: ignore[no-any-return]

    def _show(self) -> None:
        exact = vars(self).get("_exact")
        if exact is not None and not torch.compiler.is_compiling() and exact.are_written():
            exact.show(self._averaged_in(self._modules["module"]))

    @outside_graphs
    @torch.no_grad()
    def update_parameters(self, model: Module) -> None:
        """Take in the model as it is now; this never waits for a device after the first time.

        Raises:
            ValueError: it has other parameters or buffers than the one that was copied; nothing is
                changed
        """
        pairs = self._pairs(self.module.parameters(), model.parameters(), "parameters")
        buffers = self._pairs(self.module.buffers(), model.buffers(), "buffers")
        averaged, copied = pairs, buffers
        if self.use_buffers:
            averaged = pairs + [pair for pair in buffers if pair[0].dtype is not torch.bool]
            copied = [pair for pair in buffers if pair[0].dtype is torch.bool]
        self._take_in(averaged, is_first=self._is_first())
        for target, current in copied:
            target.copy_(current)
        self.n_averaged += 1
        self._note()

    def _pairs(
        self, own: Iterable[Tensor], others: Iterable[Tensor], what: str
    ) -> list[tuple[Tensor, Tensor]]:
        targets, currents = list(own), list(others)
        shapes = [[tuple(t.shape) for t in tensors] for tensors in (targets, currents)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"AveragedModel: the model has {len(currents)} {what}, and the copy of it "
                f"{len(targets)}, or their shapes differ; were weights tied, or layers changed, "
                "since it was made?"
            )
        return [(t.detach(), c.detach()) for t, c in zip(targets, currents, strict=True)]

    def _is_first(self) -> bool:
        """Whether nothing is averaged yet; the device is asked only if the count was changed."""
        count = self.n_averaged
        if self._counted is not None and not count.is_inference():
            known, version = self._counted
            if known is count and version == count._version:
                return False
        return bool(count == 0)

    def _note(self) -> None:
        count = self.n_averaged
        self._counted = None if count.is_inference() else (count, count._version)

    def _take_in(self, pairs: list[tuple[Tensor, Tensor]], is_first: bool) -> None:
        targets = [target for target, _ in pairs]
        if is_first:
            self._exact.clear()
        works = [self._exact.get(place, target) for place, target in enumerate(targets)]
        # what overlaps would be averaged twice
        works = [
            work.clone() if work is target and is_shared else work
            for work, target, is_shared in zip(works, targets, _share_memory(targets), strict=True)
        ]
        currents = [
            current.to(work.device, work.dtype)
            for work, (_, current) in zip(works, pairs, strict=True)
        ]
        if is_first:
            for work, current in zip(works, currents, strict=True):
                work.copy_(current)
        else:
            self._average(works, currents)
        for work, target, (_, current) in zip(works, targets, pairs, strict=True):
            if work is not target:
                # whole numbers may have more digits than float64
                target.copy_(current if is_first and not is_inexact(target) else work)
        self._exact.note()

    def _averaged(self) -> list[Tensor]:
        """Return the tensors that are averaged, each once."""
        return self._averaged_in(self.module)

    def _averaged_in(self, module: Any) -> list[Tensor]:
        buffers = module.buffers() if self.use_buffers else ()
        return [
            *module.parameters(),
            *(buffer for buffer in buffers if buffer.dtype is not torch.bool),
        ]

    def _rounded(self) -> Iterator[tuple[str, int, Tensor]]:
        """The names, places and tensors of averages that the module holds rounded."""
        places = {id(tensor): place for place, tensor in enumerate(self._averaged())}
        for name, tensor in chain(
            self.named_parameters(remove_duplicate=False),
            self.named_buffers(remove_duplicate=False),
        ):
            if id(tensor) in places and needs_copy(tensor):
                yield name, places[id(tensor)], tensor

    def exact_averages(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The copies in the state dict, and the tensors that hold them rounded."""
        for _, place, tensor in self._rounded():
            yield self._exact.get_for_reading(place, tensor.detach()), tensor

    def round_averages(self) -> None:
        """Have the module show what was written into the copies."""
        self._exact.round_into(self._averaged())

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        values = {}
        for name, place, tensor in self._rounded():
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.shape == tensor.shape and not value.is_meta:
                values[place] = value
                if local_metadata.get("assign_to_params_buffers", False):
                    state_dict[prefix + name] = value.to(tensor.dtype)
        self._exact = self._exact.loaded(values, self._averaged())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AveragedModel:
        dtypes = [tensor.dtype for tensor in self._averaged()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._exact.follow(dtypes, self._averaged())
        return self

    def _average(self, averages: list[Tensor], currents: list[Tensor]) -> None:
        if self.avg_fn is not None:
            for average, current in zip(averages, currents, strict=True):
                count = self.n_averaged.to(average.device)
                average.copy_(self.avg_fn(average, current, count))
            return
        function = self.multi_avg_fn or get_swa_multi_avg_fn()
        alike: defaultdict[Any, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for average, current in zip(averages, currents, strict=True):
            alike[average.device, average.dtype].append((average, current))
        for (device, _), group in alike.items():
            count = self.n_averaged.to(device)
            function([a for a, _ in group], [c for _, c in group], count)


def _with_exact_values(
    averaged: Module, state_dict: dict[str, Any], prefix: str, _: dict[str, Any]
) -> None:
    """Put averages as they are computed in place of those that the module holds rounded."""
    assert isinstance(averaged, AveragedModel)
    for name, place, tensor in averaged._rounded():
        value = state_dict.get(prefix + name)
        # what hooks have made stays, and what was asked for with keep_vars=True
        if value is tensor or _place(value) != _place(tensor):
            continue
        exact = averaged._exact.get_for_reading(place, tensor.detach())
        # whole numbers may have more digits than float64
        if is_inexact(tensor) or torch.equal(exact.to(tensor.dtype), tensor):
            state_dict[prefix + name] = exact
        else:
            averaged._exact.drop(place)


def _place(value: Any) -> Any:
    """Return a key for the memory of a tensor; of a DTensor, that of this process's part."""
    if not isinstance(value, Tensor):
        return None
    part = value.to_local() if hasattr(value, "to_local") else value
    is_plain = type(part) in PLAIN_TYPES
    return (part.data_ptr(), part.shape, part.dtype) if is_plain else id(value)


def _share_memory(tensors: Sequence[Tensor]) -> list[bool]:
    """Which of these tensors share memory with another one."""
    plain = [type(tensor) in PLAIN_TYPES for tensor in tensors]
    starts = [t.data_ptr() if p else 0 for t, p in zip(tensors, plain, strict=True)]
    sizes = [_extent(t) if p else 0 for t, p in zip(tensors, plain, strict=True)]
    first = np.array(starts, np.int64)
    return [bool(shared) for shared in overlapping(first, first + np.array(sizes, np.int64))]


def _extent(tensor: Tensor) -> int:
    """The bytes from the first element to the end of the last."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()
