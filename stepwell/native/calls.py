"""Compiled functions as built-in functions of Python, without ctypes in between.

ctypes looks at each argument of each call, which takes longer than the arithmetic of a small step.
CPython calls a function of this shape as it calls its own:
https://docs.python.org/3/c-api/structures.html#c.METH_FASTCALL
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from . import llvm

__all__ = ["builtin", "entry", "python_function"]

METH_FASTCALL = 0x80

ARGUMENTS = {"object": "ptr", "address": "ptr", "number": "i64"}
"""What a function may take: an object, or the address or number that an int holds."""


class _MethodDef(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


def python_function(name: str) -> str:
    """A function of Python's C API, as the operand of a call in LLVM IR."""
    address = ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value
    return f"inttoptr (i64 {address} to ptr)"


def entry(function: str, arguments: list[str], *, result: bool, unlocked: bool = False) -> str:
    """IR of `call_<function>`, which `builtin` makes callable; without a result it returns 0.

    Args:
        function: a function in the same module
        arguments: what it takes, by the names in `ARGUMENTS`
        result: whether it returns an i64, or nothing
        unlocked: give the interpreter's lock away while it runs
    """
    as_number = python_function("PyLong_AsLongLong")
    lines, values = [], []
    for index, kind in enumerate(arguments):
        lines += [
            f"%at{index} = getelementptr ptr, ptr %args, i64 {index}",
            f"%object{index} = load ptr, ptr %at{index}",
        ]
        if kind != "object":
            lines.append(f"%number{index} = call i64 {as_number}(ptr %object{index})")
        if kind == "address":
            lines.append(f"%address{index} = inttoptr i64 %number{index} to ptr")
        values.append(f"{ARGUMENTS[kind]} %{kind}{index}")
    call = f"@{function}({', '.join(values)})"
    work = [f"%result = call i64 {call}" if result else f"call void {call}"]
    if unlocked:
        save, restore = map(python_function, ("PyEval_SaveThread", "PyEval_RestoreThread"))
        work = [f"%thread = call ptr {save}()", *work, f"call void {restore}(ptr %thread)"]
    value = "%result" if result else "0"
    number = f"call ptr {python_function('PyLong_FromLongLong')}(i64 {value})"
    body = [*lines, *work, f"%returned = {number}", "ret ptr %returned"]
    header = f"define ptr @call_{function}(ptr %self, ptr %args, i64 %count) {{"
    return "\n".join([header, *(f"  {line}" for line in body), "}", ""])


def builtin(library: llvm.Library, function: str) -> Callable[..., int]:
    """A compiled function whose `entry` is in the library, which lives as long as this object.

    It takes exactly the arguments of its entry, and does not check them.
    """
    address = library.address(f"call_{function}")
    definition = _MethodDef(function.encode(), address, METH_FASTCALL, None)
    make = ctypes.pythonapi.PyCFunction_NewEx
    make.restype, make.argtypes = (
        ctypes.py_object,
        (ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p),
    )
    # Python keeps the object that a method belongs to: here, what it needs to be there
    made: Any = make(ctypes.addressof(definition), (library, definition), None)
    return made  # type: ignore[no-any-return]
