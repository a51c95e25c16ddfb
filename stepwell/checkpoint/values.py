"""Values of Python as JSON, exactly: numbers to the bit, tuples as tuples, tensors by name.

A JSON object always stands for one value that JSON has not, and names its kind: {"tuple": [...]}.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .header import CODES, CheckpointError

__all__ = ["Packer", "dtype_named", "unpack"]

Source = Callable[[str, bool], Tensor]
"""Gives the tensor of a name; a complex one is two numbers per element in the file."""

PLAIN = (bool, str, type(None))

DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if type(d) is torch.dtype}

DEEPEST = 100
"""Containers inside of each other; Python's own stack ends at some 300 of them when they load."""

WIDEST = 14_000
"""Bits of a whole number; Python reads no longer ones from text."""


class Packer:
    """Turns values into JSON, and gathers the tensors in them.

    Attributes:
        tensors: by the name under which a file holds them; memory that is met twice has one
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[Any, str] = {}
        self._met: Counter[str] = Counter()
        self._around: set[int] = set()

    def pack(self, value: Any, name: str) -> Any:
        """The value in JSON; tensors in it are named after its place.

        Raises:
            TypeError: a checkpoint cannot hold such a value without running code to load it
            ValueError: it contains itself, or is too deep or too large
        """
        if type(value) in PLAIN:
            return value
        if type(value) is int:
            return _integer(value, name)
        if isinstance(value, (float, np.generic)):
            return _number(value, name)
        if isinstance(value, Tensor):
            return self._tensor(value, name)
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, (Mapping, list, tuple)):
            with self._inside(value, name):
                return self._container(value, name)
        raise TypeError(
            f"{name} has type {type(value).__name__}, which a checkpoint cannot hold: it holds "
            "numbers, texts, None, tensors, and lists, tuples and dicts of them"
        )

    @contextmanager
    def _inside(self, value: Any, name: str) -> Iterator[None]:
        if id(value) in self._around:
            raise ValueError(f"{name:.200} ({type(value).__name__}) contains itself")
        if len(self._around) == DEEPEST:
            raise ValueError(f"{name:.200} lies in {DEEPEST} containers, the most that can be read")
        self._around.add(id(value))
        try:
            yield
        finally:
            self._around.remove(id(value))

    def _container(self, value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            kind = "counter" if isinstance(value, Counter) else "dict"
            pairs = [(key, value[key]) for key in value]
            return {kind: [self._pair(key, item, name) for key, item in pairs]}
        items = [self.pack(item, f"{name}.{i}") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}

    def _pair(self, key: Any, item: Any, name: str) -> list[Any]:
        return [self.pack(key, f"{name} (a key)"), self.pack(item, f"{name}.{key}")]

    def _tensor(self, tensor: Tensor, name: str) -> Any:
        _check_kind(tensor, name)
        if tensor.dim() == 0 and not tensor.is_complex() and tensor.dtype.itemsize > 1:
            number = tensor.item()
            # the bits of a NaN are kept in the bytes of a tensor
            if math.isfinite(number):
                return {"number": [number, str(tensor.dtype).removeprefix("torch.")]}
        return {"complex" if tensor.is_complex() else "tensor": self._store(tensor, name)}

    def _store(self, tensor: Tensor, name: str) -> str:
        """Take in a tensor; returns the name under which the file has it."""
        memory = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        # a conjugate, and its imaginary part, are other numbers in the same memory
        place = *memory, tensor.is_conj(), tensor.is_neg()
        if tensor.numel() and place in self._known:
            return self._known[place]
        unique = name
        while unique in self.tensors:
            self._met[name] += 1
            unique = f"{name} ({self._met[name] + 1})"
        self.tensors[unique] = tensor.detach()
        self._known[place] = unique
        return unique


def _integer(value: int, name: str) -> int:
    if value.bit_length() > WIDEST:
        raise ValueError(
            f"{name} is a number of {value.bit_length():,} bits, a checkpoint holds {WIDEST:,}"
        )
    return value


def _number(value: Any, name: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} is a number of numpy of kind {type(value).__name__}")
    return value if math.isfinite(value) else {"float": repr(float(value))}


def _check_kind(tensor: Tensor, name: str) -> None:
    if is_lazy(tensor):
        raise TypeError(f"{name} has no shape yet: pass data through the model first")
    if hasattr(tensor, "to_local"):
        raise TypeError(
            f"{name} is spread over processes; save such tensors with torch.distributed.checkpoint"
        )
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise TypeError(f"{name}: only dense tensors with values can be saved")


def unpack(packed: Any, tensor: Source) -> Any:
    """The value that was packed.

    Args:
        packed: what `Packer.pack` returned
        tensor: gives the tensors

    Raises:
        CheckpointError: nothing that was packed looks like this
    """
    if type(packed) in (*PLAIN, int, float):
        return packed
    if isinstance(packed, list):
        return [unpack(item, tensor) for item in packed]
    try:
        ((kind, content),) = packed.items()
        return _KINDS[kind](content, tensor)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"is damaged: {packed!r:.80} is no value") from None


def dtype_named(name: Any) -> torch.dtype:
    """The dtype of this name.

    Raises:
        CheckpointError: there is none
    """
    if not isinstance(name, str) or name not in DTYPES:
        raise CheckpointError(f"is damaged: {name!r:.40} is no dtype")
    return DTYPES[name]


def _pairs(content: Any, tensor: Source) -> dict[Any, Any]:
    found = {unpack(key, tensor): unpack(item, tensor) for key, item in content}
    if len(found) != len(content):
        raise ValueError("a key stands twice")
    return found


def _float(content: Any, _: Any) -> float:
    if content not in ("inf", "-inf", "nan"):
        raise ValueError("no number")
    # each a NaN of its own, as they are keys of their own
    return float(content)


def _name(content: Any) -> str:
    if not isinstance(content, str):
        raise TypeError("no name")
    return content


def _scalar(content: Any, _: Any) -> Tensor:
    number, name = content
    dtype = dtype_named(name)
    if type(number) not in (bool, int, float) or dtype not in CODES:
        raise TypeError("no number")
    return torch.tensor(number, dtype=dtype, device="cpu")


_KINDS: dict[str, Callable[[Any, Any], Any]] = {
    "complex": lambda content, tensor: tensor(_name(content), True),
    "counter": lambda content, tensor: Counter(_pairs(content, tensor)),
    "dict": _pairs,
    "dtype": lambda content, _: dtype_named(content),
    "float": _float,
    "number": _scalar,
    "tensor": lambda content, tensor: tensor(_name(content), False),
    "tuple": lambda content, tensor: tuple(unpack(item, tensor) for item in content),
}
