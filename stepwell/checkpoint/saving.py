"""save: a training into one file."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .contents import describe
from .folder import check_keep, prune
from .pieces import check_system
from .randomness import random_state
from .values import Packer
from .writing import write

__all__ = ["Writing", "save"]


def save(
    path: str | os.PathLike[str],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    model: torch.nn.Module | None = None,
    scheduler: Any = None,
    averaged: torch.nn.Module | None = None,
    extra: Any = None,
    with_random_state: bool = False,
    keep: int | None = None,
    background: bool = False,
) -> Writing:
    """Save a training to one file, all or nothing.

    The file has the safetensors format; what is no tensor stands in its header. It is written
    beside its place, synced and renamed: a checkpoint of the same name is whole until then.

    Args:
        path: the file
        optimizer: its groups and state; parameters are known by name, its own or the model's
        model: its state dict, under the names of the module inside of DistributedDataParallel and
            torch.compile
        scheduler: its state dict
        averaged: a `swa_utils.AveragedModel`, say
        extra: numbers, texts, None, tensors, and lists, tuples and dicts of them
        with_random_state: save the states of all random number generators
        keep: afterwards, leave this many of the checkpoints in the folder whose names differ from
            this one in their digits alone, the newest, and remove the others
        background: copy the tensors and return; a thread writes the copies. What goes wrong there
            is raised by `wait()`, or by the next save

    Returns:
        a handle, whose `wait()` returns once the file is written

    Raises:
        OSError: the file cannot be written; it is named, and what was there before still is
        TypeError, ValueError: something cannot be saved; nothing is written
    """
    path = Path(path)
    _Pending.take(path)
    if keep is not None:
        check_keep(path, keep)
    packer = Packer()
    randomness = random_state() if with_random_state else None
    description = describe(packer, optimizer, model, scheduler, averaged, extra, randomness)
    writing = Writing(path, packer.tensors, description, keep)
    if background:
        writing.start()
    else:
        writing.run()
    return writing


class Writing:
    """A file that is being written.

    Attributes:
        path: the file
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, Tensor],
        description: Mapping[str, Any],
        keep: int | None,
    ) -> None:
        check_system()
        self.path = path
        self._tensors, self._description, self._keep = tensors, description, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def run(self, threads: int = 4) -> None:
        """Write it here and now."""
        tensors, self._tensors = self._tensors, {}
        write(self.path, tensors, self._description, threads=threads)
        if self._keep is not None:
            prune(self.path, self._keep)

    def start(self) -> None:
        """Copy the tensors, and have a thread write the copies."""
        self._tensors = {name: _copied(tensor) for name, tensor in self._tensors.items()}
        self._thread = threading.Thread(target=self._run, name=f"writes {self.path.name}")
        _Pending.add(self)
        self._thread.start()

    def _run(self) -> None:
        try:
            # one thread: training needs the others
            self.run(threads=1)
        except BaseException as error:
            self._error = error

    @property
    def is_done(self) -> bool:
        """Whether the thread has ended, well or not."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Return once the file is written.

        Raises:
            OSError: it was not; said once
        """
        if self._thread is not None:
            self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error


def _copied(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu").copy_(tensor)


class _Pending:
    """The thread that writes to each folder: there is one at a time."""

    _lock = threading.Lock()
    _folders: dict[Path, Writing] = {}  # noqa: RUF012

    @classmethod
    def add(cls, writing: Writing) -> None:
        with cls._lock:
            cls._folders[writing.path.parent.absolute()] = writing
        # once; after the last save of a process nobody may ask what became of it
        atexit.unregister(cls.say_what_failed)
        atexit.register(cls.say_what_failed)

    @classmethod
    def say_what_failed(cls) -> None:
        """Print the errors of threads that have ended."""
        for writing in cls._folders.values():
            error = writing._error
            if error is not None:
                sys.excepthook(type(error), error, error.__traceback__)

    @classmethod
    def take(cls, path: Path) -> None:
        """Wait for the one that writes to the folder of this file, and raise its error."""
        with cls._lock:
            writing = cls._folders.pop(path.parent.absolute(), None)
        if writing is not None:
            writing.wait()
