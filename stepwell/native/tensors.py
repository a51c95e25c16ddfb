"""Read the facts and addresses of many tensors in one call.

The DLPack exchange interface of torch.Tensor is a table of C functions; one of them describes a
tensor (address, device, dtype, shape, strides) without allocating. A small compiled loop calls it
for every tensor of a step: it holds what it finds against what was expected, and fills a table of
addresses. https://dmlc.github.io/dlpack/latest/python_spec.html
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import llvm

__all__ = ["PLAIN_TYPES", "Reader", "is_available", "overlapping"]

PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
"""The types whose memory is what it seems to be; a subclass may mean something else."""

# Fields of DLPackExchangeAPI, in words: version, previous, allocate, import, export, describe.
DESCRIBE = 5
MAJOR_VERSION = 1


@cache
def _describe() -> int | None:
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    table = pointer(capsule, b"dlpack_exchange_api")
    if ctypes.c_uint32.from_address(table).value != MAJOR_VERSION:
        return None
    return (ctypes.c_uint64 * (DESCRIBE + 1)).from_address(table)[DESCRIBE] or None


def is_available() -> bool:
    """Whether this torch describes its tensors to native code."""
    return _describe() is not None


# struct DLTensor: data, (device type, device id), (ndim, dtype), shape, strides, byte offset.
IR = """
%DLTensor = type {{ ptr, i64, i64, ptr, ptr, i64 }}

define i64 @read(ptr %list, i64 %count, ptr %facts, ptr %offsets, ptr %addresses) {{
entry:
  %tensor = alloca %DLTensor, align 8
  %item_of = inttoptr i64 {PyList_GetItem} to ptr
  %type_of = inttoptr i64 {PyObject_Type} to ptr
  %release = inttoptr i64 {Py_DecRef} to ptr
  %clear = inttoptr i64 {PyErr_Clear} to ptr
  %describe = inttoptr i64 {describe} to ptr
  %word1 = getelementptr i64, ptr %tensor, i64 1
  %word2 = getelementptr i64, ptr %tensor, i64 2
  %word3 = getelementptr i64, ptr %tensor, i64 3
  %word4 = getelementptr i64, ptr %tensor, i64 4
  %word5 = getelementptr i64, ptr %tensor, i64 5
  %nothing = icmp eq i64 %count, 0
  br i1 %nothing, label %done, label %next

next:
  %i = phi i64 [ 0, %entry ], [ %i1, %store ]
  %item = call ptr %item_of(ptr %list, i64 %i)
  %type = call ptr %type_of(ptr %item)
  call void %release(ptr %type)
  %type_word = ptrtoint ptr %type to i64
  %tensor_type = icmp eq i64 %type_word, {tensor_type}
  %parameter_type = icmp eq i64 %type_word, {parameter_type}
  %plain = or i1 %tensor_type, %parameter_type
  br i1 %plain, label %look, label %differs

look:
  %failed = call i32 %describe(ptr %item, ptr %tensor)
  %fine = icmp eq i32 %failed, 0
  br i1 %fine, label %compare, label %raised

compare:
  %offset_at = getelementptr i64, ptr %offsets, i64 %i
  %offset = load i64, ptr %offset_at
  %fact = getelementptr i64, ptr %facts, i64 %offset
  %fact1 = getelementptr i64, ptr %fact, i64 1
  %device = load i64, ptr %word1
  %kind = load i64, ptr %word2
  %wanted_device = load i64, ptr %fact
  %wanted_kind = load i64, ptr %fact1
  %same_device = icmp eq i64 %device, %wanted_device
  %same_kind = icmp eq i64 %kind, %wanted_kind
  %same = and i1 %same_device, %same_kind
  %ndim32 = trunc i64 %kind to i32
  %ndim = zext i32 %ndim32 to i64
  %shape = load ptr, ptr %word3
  %strides = load ptr, ptr %word4
  %sizes_wanted = getelementptr i64, ptr %fact, i64 2
  %strides_wanted = getelementptr i64, ptr %sizes_wanted, i64 %ndim
  br i1 %same, label %dims, label %differs

dims:
  %d = phi i64 [ 0, %compare ], [ %d1, %dim_fine ]
  %over = icmp eq i64 %d, %ndim
  br i1 %over, label %store, label %dim

dim:
  %size_at = getelementptr i64, ptr %shape, i64 %d
  %size_wanted_at = getelementptr i64, ptr %sizes_wanted, i64 %d
  %size = load i64, ptr %size_at
  %size_wanted = load i64, ptr %size_wanted_at
  %stride_at = getelementptr i64, ptr %strides, i64 %d
  %stride_wanted_at = getelementptr i64, ptr %strides_wanted, i64 %d
  %stride = load i64, ptr %stride_at
  %stride_wanted = load i64, ptr %stride_wanted_at
  %same_size = icmp eq i64 %size, %size_wanted
  %same_stride = icmp eq i64 %stride, %stride_wanted
  %flat = icmp sle i64 %size, 1
  %stride_fine = or i1 %same_stride, %flat
  %fine_dim = and i1 %same_size, %stride_fine
  br i1 %fine_dim, label %dim_fine, label %differs

dim_fine:
  %d1 = add i64 %d, 1
  br label %dims

store:
  %data = load i64, ptr %tensor
  %byte_offset = load i64, ptr %word5
  %address = add i64 %data, %byte_offset
  %address_at = getelementptr i64, ptr %addresses, i64 %i
  store i64 %address, ptr %address_at
  %i1 = add i64 %i, 1
  %last = icmp eq i64 %i1, %count
  br i1 %last, label %done, label %next

raised:
  call void %clear()
  br label %differs

differs:
  ret i64 %i

done:
  ret i64 -1
}}
"""


def overlapping(
    starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Which of these stretches of memory share bytes with another of them."""
    found = np.zeros(starts.shape, bool)
    used = np.flatnonzero(ends > starts)
    order = used[np.argsort(starts[used], kind="stable")]
    reach = np.maximum.accumulate(ends[order])
    behind = np.zeros(len(order), bool)
    behind[1:] = starts[order][1:] < reach[:-1]
    found[order] = behind
    # whoever is reached into shares as well
    found[order[:-1]] |= behind[1:]
    return found


def _python_function(name: str) -> int:
    return ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value or 0


@cache
def _read() -> tuple[llvm.Library, Any]:
    names = ("PyList_GetItem", "PyObject_Type", "Py_DecRef", "PyErr_Clear")
    ir = IR.format(
        describe=_describe(),
        tensor_type=id(PLAIN_TYPES[0]),
        parameter_type=id(PLAIN_TYPES[1]),
        **{name: _python_function(name) for name in names},
    )
    library = llvm.load(ir)
    # PYFUNCTYPE keeps the interpreter's lock, which the calls into Python need
    kind = ctypes.PYFUNCTYPE(
        ctypes.c_int64, ctypes.py_object, *[ctypes.c_int64, *[ctypes.c_void_p] * 3]
    )
    return library, kind(library.address("read"))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _facts(tensor: Tensor) -> list[int]:
    """[device, dtype and number of dimensions, sizes, strides], as the exchange tells them."""
    describe = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)(_describe() or 0)
    found = _DLTensor()
    describe(tensor, ctypes.addressof(found))
    ndim = tensor.dim()
    return [found.device, found.kind, *found.shape[:ndim], *found.strides[:ndim]]


class Reader:
    """Reads a fixed number of tensors and holds them against those it was made with."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        facts: list[int] = []
        offsets: list[int] = []
        for tensor in tensors:
            offsets.append(len(facts))
            facts += _facts(tensor)
        self._facts = np.array(facts, np.int64)
        self._offsets = np.array(offsets, np.int64)
        self.addresses: npt.NDArray[np.int64] = np.zeros(len(tensors), np.int64)
        self._library, self._call = _read()
        tables = (self._facts, self._offsets, self.addresses)
        self._arguments = (len(tensors), *(table.ctypes.data for table in tables))

    def read(self, tensors: list[Tensor]) -> bool:
        """Fill `addresses`; False if a tensor is not of the expected kind (then it is partial)."""
        return bool(self._call(tensors, *self._arguments) < 0)
