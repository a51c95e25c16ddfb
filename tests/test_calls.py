"""Are compiled functions called rightly without ctypes, with and without the interpreter's lock?"""

from __future__ import annotations

import gc
import sys
import threading

import numpy as np
import pytest

from stepwell.native import llvm
from stepwell.native.calls import builtin, entry, python_function

IR = f"""
define i64 @take(ptr %list, ptr %numbers, i64 %index) {{
  %size = call i64 {python_function("PyList_Size")}(ptr %list)
  %at = getelementptr i64, ptr %numbers, i64 %index
  %number = load i64, ptr %at
  %sum = add i64 %size, %number
  ret i64 %sum
}}

define void @put(ptr %numbers, i64 %number) {{
  store i64 %number, ptr %numbers
  ret void
}}

define void @wait(ptr %flag) {{
  br label %again
again:
  %set = load atomic i64, ptr %flag seq_cst, align 8
  %waiting = icmp eq i64 %set, 0
  br i1 %waiting, label %again, label %done
done:
  ret void
}}
"""


@pytest.fixture(scope="module")
def library() -> llvm.Library:
    entries = [
        entry("take", ["object", "address", "number"], result=True),
        entry("put", ["address", "number"], result=False),
        entry("wait", ["address"], result=False, unlocked=True),
    ]
    return llvm.load("\n".join([IR, *entries]))


@pytest.mark.tiny
@pytest.mark.parametrize("number", [0, -7, 2**62])
def test_objects_addresses_and_numbers_arrive(library: llvm.Library, number: int) -> None:
    numbers = np.array([1, number], np.int64)
    assert builtin(library, "take")(["a", "b"], numbers.ctypes.data, 1) == 2 + number
    assert builtin(library, "put")(numbers.ctypes.data, 5) == 0
    assert numbers.tolist() == [5, number]


def test_a_function_keeps_its_code() -> None:
    call = builtin(llvm.load(IR + entry("put", ["address", "number"], result=False)), "put")
    gc.collect()
    numbers = np.zeros(1, np.int64)
    call(numbers.ctypes.data, 3)
    assert numbers[0] == 3


def test_a_call_keeps_no_references(library: llvm.Library) -> None:
    items, numbers = ["a"], np.zeros(1, np.int64)
    take = builtin(library, "take")
    before = sys.getrefcount(items)
    for _ in range(100):
        take(items, numbers.ctypes.data, 0)
    assert sys.getrefcount(items) == before


def test_without_the_lock_other_threads_run(library: llvm.Library) -> None:
    flag = np.zeros(1, np.int64)
    setter = threading.Thread(target=lambda: flag.__setitem__(0, 1))
    wait = builtin(library, "wait")
    started = threading.Thread(target=wait, args=(flag.ctypes.data,))
    started.start()
    setter.start()
    started.join(timeout=30)
    assert not started.is_alive()
