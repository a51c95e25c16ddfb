"""The save that goes on while a training does: who saves or loads next waits for it."""

from __future__ import annotations

import os
import threading
from typing import Protocol

__all__ = ["Background"]


class Writes(Protocol):
    """A file that a thread writes."""

    def start(self) -> None:
        """Begin."""

    def settle(self) -> None:
        """Return once the thread has ended, well or not."""

    def wait(self) -> None:
        """Return once the file is written, or raise what went wrong."""


class Background:
    """The save of this process that goes on behind its back: there is one at a time."""

    _lock = threading.Lock()
    _latest: Writes | None = None

    @classmethod
    def start(cls, writing: Writes) -> None:
        """Begin one, when nothing else is under way."""
        with cls._lock:
            cls.wait()
            cls._latest = writing
            writing.start()

    @classmethod
    def wait(cls) -> None:
        """Wait for the one that is under way, if one is, and raise its error."""
        if cls._latest is not None:
            cls._latest.wait()

    @classmethod
    def settle(cls) -> None:
        """Wait for the one that is under way, whose error is for `wait` to raise."""
        if cls._latest is not None:
            cls._latest.settle()

    @classmethod
    def forget(cls) -> None:
        """Begin anew in a forked process: it has no thread that would let go of the lock."""
        cls._lock, cls._latest = threading.Lock(), None


# not on Windows
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Background.forget)
