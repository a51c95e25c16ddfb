"""Read the facts and addresses of many tensors in one call.

The DLPack exchange interface of torch.Tensor is a table of C functions; one of them describes a
tensor (address, device, dtype, shape, strides) without allocating. A small compiled loop calls it
for every tensor of a step: it holds what it finds against what was expected, and fills a table of
addresses. https://dmlc.github.io/dlpack/latest/python_spec.html
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..cohort import PLAIN_TYPES
from . import llvm
from .calls import builtin, entry, python_function

__all__ = [
    "DIFFERS",
    "NO_GRADIENT",
    "PARTLY",
    "SAME",
    "TURNED",
    "Reader",
    "is_available",
]

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

; Hold a tensor against [device, ndim and dtype, sizes, strides]; note its address.
define internal i1 @look(ptr %item, ptr %facts, ptr %address) {{
entry:
  %tensor = alloca %DLTensor, align 8
  %type = call ptr {PyObject_Type}(ptr %item)
  call void {Py_DecRef}(ptr %type)
  %type_word = ptrtoint ptr %type to i64
  %tensor_type = icmp eq i64 %type_word, {tensor_type}
  %parameter_type = icmp eq i64 %type_word, {parameter_type}
  %plain = or i1 %tensor_type, %parameter_type
  br i1 %plain, label %describe, label %differs

describe:
  %failed = call i32 inttoptr (i64 {describe} to ptr)(ptr %item, ptr %tensor)
  %fine = icmp eq i32 %failed, 0
  br i1 %fine, label %compare, label %raised

compare:
  %device_at = getelementptr i64, ptr %tensor, i64 1
  %kind_at = getelementptr i64, ptr %tensor, i64 2
  %shape_at = getelementptr i64, ptr %tensor, i64 3
  %strides_at = getelementptr i64, ptr %tensor, i64 4
  %kind_fact_at = getelementptr i64, ptr %facts, i64 1
  %device = load i64, ptr %device_at
  %device_fact = load i64, ptr %facts
  %kind = load i64, ptr %kind_at
  %kind_fact = load i64, ptr %kind_fact_at
  %same_device = icmp eq i64 %device, %device_fact
  %same_kind = icmp eq i64 %kind, %kind_fact
  %same = and i1 %same_device, %same_kind
  %ndim_word = trunc i64 %kind to i32
  %ndim = zext i32 %ndim_word to i64
  %shape = load ptr, ptr %shape_at
  %strides = load ptr, ptr %strides_at
  %size_facts = getelementptr i64, ptr %facts, i64 2
  %stride_facts = getelementptr i64, ptr %size_facts, i64 %ndim
  br i1 %same, label %dims, label %differs

dims:
  %d = phi i64 [ 0, %compare ], [ %d1, %dim_fine ]
  %over = icmp eq i64 %d, %ndim
  br i1 %over, label %note, label %dim

dim:
  %size_at = getelementptr i64, ptr %shape, i64 %d
  %size_fact_at = getelementptr i64, ptr %size_facts, i64 %d
  %size = load i64, ptr %size_at
  %size_fact = load i64, ptr %size_fact_at
  %stride_at = getelementptr i64, ptr %strides, i64 %d
  %stride_fact_at = getelementptr i64, ptr %stride_facts, i64 %d
  %stride = load i64, ptr %stride_at
  %stride_fact = load i64, ptr %stride_fact_at
  %same_size = icmp eq i64 %size, %size_fact
  %same_stride = icmp eq i64 %stride, %stride_fact
  %single = icmp sle i64 %size, 1
  %stride_fine = or i1 %same_stride, %single
  %dim_same = and i1 %same_size, %stride_fine
  br i1 %dim_same, label %dim_fine, label %differs

dim_fine:
  %d1 = add i64 %d, 1
  br label %dims

note:
  %offset_at = getelementptr i64, ptr %tensor, i64 5
  %data = load i64, ptr %tensor
  %offset = load i64, ptr %offset_at
  %found = add i64 %data, %offset
  store i64 %found, ptr %address
  ret i1 true

raised:
  call void {PyErr_Clear}()
  ret i1 false

differs:
  ret i1 false
}}

; Slot `slot` of parameter `row`: where its facts begin, and where its address goes.
define internal i1 @look_at(ptr %item, i64 %slot, i64 %row, ptr %context) {{
  %rows = load i64, ptr %context
  %facts_at = getelementptr i64, ptr %context, i64 3
  %offsets_at = getelementptr i64, ptr %context, i64 4
  %addresses_at = getelementptr i64, ptr %context, i64 5
  %facts = load ptr, ptr %facts_at
  %offsets = load ptr, ptr %offsets_at
  %addresses = load ptr, ptr %addresses_at
  %before = mul i64 %slot, %rows
  %index = add i64 %before, %row
  %offset_at = getelementptr i64, ptr %offsets, i64 %index
  %offset = load i64, ptr %offset_at
  %fact = getelementptr i64, ptr %facts, i64 %offset
  %address = getelementptr i64, ptr %addresses, i64 %index
  %same = call i1 @look(ptr %item, ptr %fact, ptr %address)
  ret i1 %same
}}

; context: rows, number of keys, keys, facts, offsets, addresses. Without a list of gradients they
; are the parameters' own.
define i64 @read(ptr %params, ptr %states, ptr %grads, ptr %context) {{
entry:
  %keys_count_at = getelementptr i64, ptr %context, i64 1
  %keys_at = getelementptr i64, ptr %context, i64 2
  %rows = load i64, ptr %context
  %keys_count = load i64, ptr %keys_count_at
  %keys = load ptr, ptr %keys_at
  %last_slot = add i64 %keys_count, 1
  %own_grads = icmp eq ptr %grads, inttoptr (i64 {none} to ptr)
  br label %next

next:
  %row = phi i64 [ 0, %entry ], [ %row1, %straight ], [ %row2, %absent ]
  %code = phi i64 [ {same}, %entry ], [ %code, %straight ], [ {partly}, %absent ]
  %end = icmp eq i64 %row, %rows
  br i1 %end, label %done, label %param

param:
  %p = call ptr {PyList_GetItem}(ptr %params, i64 %row)
  %p_same = call i1 @look_at(ptr %p, i64 0, i64 %row, ptr %context)
  br i1 %p_same, label %state, label %differs

state:
  %dict = call ptr {PyList_GetItem}(ptr %states, i64 %row)
  br label %entries

entries:
  %k = phi i64 [ 0, %state ], [ %k1, %entry_same ]
  %no_more = icmp eq i64 %k, %keys_count
  br i1 %no_more, label %grad, label %find

find:
  %key_at = getelementptr ptr, ptr %keys, i64 %k
  %key = load ptr, ptr %key_at
  %value = call ptr {PyDict_GetItemWithError}(ptr %dict, ptr %key)
  %missing = icmp eq ptr %value, null
  br i1 %missing, label %raised, label %found

found:
  %k1 = add i64 %k, 1
  %v_same = call i1 @look_at(ptr %value, i64 %k1, i64 %row, ptr %context)
  br i1 %v_same, label %entry_same, label %differs

entry_same:
  br label %entries

grad:
  br i1 %own_grads, label %own, label %given

own:
  %attribute = call ptr {PyObject_GetAttr}(ptr %p, ptr {grad_name})
  br label %have

given:
  %listed = call ptr {PyList_GetItem}(ptr %grads, i64 %row)
  call void {Py_IncRef}(ptr %listed)
  br label %have

have:
  %g = phi ptr [ %attribute, %own ], [ %listed, %given ]
  %none = icmp eq ptr %g, null
  br i1 %none, label %raised, label %check

check:
  %is_absent = icmp eq ptr %g, inttoptr (i64 {none} to ptr)
  br i1 %is_absent, label %absent, label %present

absent:
  call void {Py_DecRef}(ptr %g)
  %table_at = getelementptr i64, ptr %context, i64 5
  %table = load ptr, ptr %table_at
  %last_row = mul i64 %last_slot, %rows
  %g_index = add i64 %last_row, %row
  %g_address = getelementptr i64, ptr %table, i64 %g_index
  store i64 {no_gradient}, ptr %g_address
  %row2 = add i64 %row, 1
  br label %next

present:
  %g_same = call i1 @look_at(ptr %g, i64 %last_slot, i64 %row, ptr %context)
  br i1 %g_same, label %turn, label %drop

turn:
  %answer = call ptr {PyObject_CallOneArg}(ptr {is_turned}, ptr %g)
  call void {Py_DecRef}(ptr %g)
  %is_answer = icmp ne ptr %answer, null
  br i1 %is_answer, label %judge, label %raised

judge:
  call void {Py_DecRef}(ptr %answer)
  %is_straight = icmp eq ptr %answer, {false}
  br i1 %is_straight, label %straight, label %turned

straight:
  %row1 = add i64 %row, 1
  br label %next

drop:
  call void {Py_DecRef}(ptr %g)
  ret i64 {differs}

raised:
  call void {PyErr_Clear}()
  br label %differs

turned:
  ret i64 {turned}

differs:
  ret i64 {differs}

done:
  ret i64 %code
}}
"""

SAME, PARTLY, TURNED, DIFFERS = range(4)
"""What a reading finds: everything as expected, gradients that are None, a gradient that is a
lazy conjugate or negative of its memory, or something of another kind."""

NO_GRADIENT = -1
"""The address of a gradient that is None; an empty tensor may well have address 0."""

GRAD = "grad"


@cache
def _read(is_turned: Any) -> Any:
    names = (
        "PyDict_GetItemWithError",
        "PyErr_Clear",
        "PyList_GetItem",
        "PyObject_CallOneArg",
        "PyObject_GetAttr",
        "PyObject_Type",
        "Py_DecRef",
        "Py_IncRef",
    )
    objects = {"grad_name": GRAD, "is_turned": is_turned, "false": False}
    ir = IR.format(
        describe=_describe(),
        tensor_type=id(PLAIN_TYPES[0]),
        parameter_type=id(PLAIN_TYPES[1]),
        none=id(None),
        same=SAME,
        differs=DIFFERS,
        turned=TURNED,
        partly=PARTLY,
        no_gradient=NO_GRADIENT,
        **{name: python_function(name) for name in names},
        **{name: f"inttoptr (i64 {id(value)} to ptr)" for name, value in objects.items()},
    )
    # calls, one after the other: optimising them takes longer than it ever saves
    call = entry("read", ["object", "object", "object", "address"], result=True)
    return builtin(llvm.load(ir + call, optimise=False), "read")


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


@cache
def _exchange() -> Any:
    # ctypes makes a class for a type of function, which takes longer than to call it
    return ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)(_describe() or 0)


def _facts(tensor: Tensor) -> list[int]:
    """[device, dtype and number of dimensions, sizes, strides], as the exchange tells them."""
    found = _DLTensor()
    _exchange()(tensor, ctypes.addressof(found))
    ndim = tensor.dim()
    return [found.device, found.kind, *found.shape[:ndim], *found.strides[:ndim]]


def _is_turned(tensor: Tensor) -> bool:
    return tensor.is_conj() or tensor.is_neg()


class Reader:
    """Reads parameters, entries of their state and gradients, always of the same kinds.

    It fills `addresses`, which has a row per slot (the parameter, each of `keys`, the gradient)
    and a column per parameter.
    """

    def __init__(
        self,
        params: list[Tensor],
        states: list[dict[str, Any]],
        keys: Sequence[str],
        grads: list[Tensor],
        addresses: npt.NDArray[np.int64],
    ) -> None:
        slots = [params, *([state[key] for state in states] for key in keys), grads]
        facts: list[int] = []
        offsets: list[int] = []
        for tensor in (tensor for slot in slots for tensor in slot):
            offsets.append(len(facts))
            facts += _facts(tensor)
        self._keys = [sys.intern(key) for key in keys]
        self._tables = (
            np.array([id(key) for key in self._keys], np.int64),
            np.array(facts, np.int64),
            np.array(offsets, np.int64),
        )
        self._addresses = addresses
        pointers = [table.ctypes.data for table in (*self._tables, addresses)]
        self._context = np.array([len(params), len(keys), *pointers], np.int64)
        self._at = self._context.ctypes.data
        is_complex = params[0].is_complex()
        self._call = _read(_is_turned if is_complex else Tensor.is_neg)

    def read(
        self,
        params: list[Tensor],
        states: list[dict[str, Any]],
        grads: list[Any] | None = None,
    ) -> int:
        """Fill `addresses` if everything is as it was; without `grads`, each parameter's own."""
        found: int = self._call(params, states, grads, self._at)
        return found
