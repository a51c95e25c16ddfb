"""Does a list, or a dict, still hold the very same objects? A step asks so of what it is held for.

Comparing would ask tensors whether their numbers are equal, and hashing one is a call into Python.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from operator import is_
from typing import Any, NamedTuple

from . import llvm
from .calls import builtin, entry, python_function

__all__ = ["Checks", "checks"]

IR = """
; Whether two lists hold the same objects in the same order.
define i64 @same_items(ptr %found, ptr %expected) {{
entry:
  %size = call i64 {PyList_Size}(ptr %found)
  %wanted = call i64 {PyList_Size}(ptr %expected)
  %as_many = icmp eq i64 %size, %wanted
  br i1 %as_many, label %next, label %differs

next:
  %i = phi i64 [ 0, %entry ], [ %i1, %item ]
  %end = icmp eq i64 %i, %size
  br i1 %end, label %same, label %item

item:
  %a = call ptr {PyList_GetItem}(ptr %found, i64 %i)
  %b = call ptr {PyList_GetItem}(ptr %expected, i64 %i)
  %is = icmp eq ptr %a, %b
  %i1 = add i64 %i, 1
  br i1 %is, label %next, label %differs

same:
  ret i64 1

differs:
  call void {PyErr_Clear}()
  ret i64 0
}}

; Whether a dict has these keys and values in this order, which are lists of one length.
define i64 @same_entries(ptr %found, ptr %keys, ptr %values) {{
entry:
  %place = alloca i64
  %key_at = alloca ptr
  %value_at = alloca ptr
  store i64 0, ptr %place
  %size = call i64 {PyDict_Size}(ptr %found)
  %wanted = call i64 {PyList_Size}(ptr %keys)
  %as_many = icmp eq i64 %size, %wanted
  br i1 %as_many, label %next, label %differs

next:
  %i = phi i64 [ 0, %entry ], [ %i1, %item ]
  %more = call i32 {PyDict_Next}(ptr %found, ptr %place, ptr %key_at, ptr %value_at)
  %end = icmp eq i32 %more, 0
  br i1 %end, label %same, label %item

item:
  %key = load ptr, ptr %key_at
  %value = load ptr, ptr %value_at
  %a = call ptr {PyList_GetItem}(ptr %keys, i64 %i)
  %b = call ptr {PyList_GetItem}(ptr %values, i64 %i)
  %same_key = icmp eq ptr %key, %a
  %same_value = icmp eq ptr %value, %b
  %is = and i1 %same_key, %same_value
  %i1 = add i64 %i, 1
  br i1 %is, label %next, label %differs

same:
  ret i64 1

differs:
  call void {PyErr_Clear}()
  ret i64 0
}}

; Whether a list holds these dicts, each with as many keys as before and, under one key, a list of
; the same objects.
define i64 @same_groups(ptr %found, ptr %expected, ptr %sizes, ptr %key, ptr %lists) {{
entry:
  %as_many = call i64 @same_items(ptr %found, ptr %expected)
  %are_same = icmp eq i64 %as_many, 1
  br i1 %are_same, label %begin, label %differs

begin:
  %size = call i64 {PyList_Size}(ptr %expected)
  br label %next

next:
  %i = phi i64 [ 0, %begin ], [ %i1, %list ]
  %end = icmp eq i64 %i, %size
  br i1 %end, label %same, label %group

group:
  %dict = call ptr {PyList_GetItem}(ptr %expected, i64 %i)
  %has = call i64 {PyDict_Size}(ptr %dict)
  %number = call ptr {PyList_GetItem}(ptr %sizes, i64 %i)
  %had = call i64 {PyLong_AsLongLong}(ptr %number)
  %a = call ptr {PyDict_GetItem}(ptr %dict, ptr %key)
  %is_there = icmp ne ptr %a, null
  %as_large = icmp eq i64 %has, %had
  %may_be = and i1 %is_there, %as_large
  br i1 %may_be, label %list, label %differs

list:
  %b = call ptr {PyList_GetItem}(ptr %lists, i64 %i)
  %is = call i64 @same_items(ptr %a, ptr %b)
  %i1 = add i64 %i, 1
  %equal = icmp eq i64 %is, 1
  br i1 %equal, label %next, label %differs

same:
  ret i64 1

differs:
  call void {PyErr_Clear}()
  ret i64 0
}}
"""


class Checks(NamedTuple):
    """Comparisons by identity.

    Attributes:
        items: returns whether a list holds these objects
        entries: returns whether a dict has these keys and these values
        groups: returns whether a list holds these dicts, of these sizes, that hold these lists
            under a key
    """

    items: Callable[[Any, list[Any]], Any]
    entries: Callable[[Any, list[Any], list[Any]], Any]
    groups: Callable[[Any, list[Any], list[int], str, list[Any]], Any]


def _same_items(found: Any, expected: list[Any]) -> bool:
    return len(found) == len(expected) and all(map(is_, found, expected))


def _same_entries(found: Any, keys: list[Any], values: list[Any]) -> bool:
    return _same_items(found, keys) and all(map(is_, found.values(), values))


def _same_groups(
    found: Any, dicts: list[Any], sizes: list[int], key: str, lists: list[Any]
) -> bool:
    if not _same_items(found, dicts) or list(map(len, dicts)) != sizes:
        return False
    return all(key in each for each in dicts) and all(
        _same_items(each[key], items) for each, items in zip(dicts, lists, strict=True)
    )


@cache
def _compiled() -> Checks:
    names = (
        *("PyDict_GetItem", "PyDict_Next", "PyDict_Size", "PyErr_Clear"),
        *("PyList_GetItem", "PyList_Size", "PyLong_AsLongLong"),
    )
    ir = IR.format(**{name: python_function(name) for name in names})
    items = entry("same_items", ["object"] * 2, result=True)
    entries = entry("same_entries", ["object"] * 3, result=True)
    groups = entry("same_groups", ["object"] * 5, result=True)
    library = llvm.load(ir + items + entries + groups, optimise=False)
    found = (builtin(library, f"same_{what}") for what in Checks._fields)
    return Checks(*found)


def checks(lists: Iterable[object], entries: object) -> Checks:
    """The fastest way to ask of such lists and such a dict; LLVM is not loaded for it alone."""
    # a subclass may have an order of its own
    plain = type(entries) in (dict, defaultdict) and all(type(found) is list for found in lists)
    if plain and sys.modules.get("llvmlite") and not llvm.unusable():
        return _compiled()
    return Checks(_same_items, _same_entries, _same_groups)
