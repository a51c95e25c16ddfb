"""save: a training into one file."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from multiprocessing.util import Finalize, is_exiting
from pathlib import Path
from traceback import clear_frames
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..wrapped import inner_optimizer, inner_scheduler
from .background import Background
from .contents import check_named, check_scheduler, describe
from .folder import check_keep, prune
from .pieces import check_system, synchronize
from .randomness import random_state
from .values import Packer
from .writing import write

__all__ = ["Writing", "save"]


def save(
    path: str | os.PathLike[str],
    *unnamed: NoReturn,
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
        path: the file; its folder is made if there is none
        unnamed: nothing; parts of a training have names
        optimizer: its groups and state; parameters are known by name, its own or the model's. Of a
            wrapper, as accelerate's and Lightning's, what is inside
        model: its state dict, under the names of the module inside of DistributedDataParallel and
            torch.compile
        scheduler: its state dict, or that of the schedule inside of a wrapper
        averaged: a `swa_utils.AveragedModel`, say
        extra: numbers, texts, None, tensors, and lists, tuples and dicts of them
        with_random_state: save the states of all random number generators
        keep: afterwards, remove checkpoints that are older than the newest `keep` whole ones, of
            those in the folder whose names differ from this one in the number at their end alone
            (before suffixes, as in run7-step-1000.safetensors). Those that stay are verified, once
            in a process, except for what it has written itself. Links do not count, and neither
            they nor what they lead to are removed
        background: copy the tensors and return; a thread writes the copies. A process has one such
            save at a time: the next one, of whatever kind, waits for it. What goes wrong there is
            raised by `wait()`, or by the next save instead of saving, or printed at exit. While
            the interpreter ends, it is written before this returns

    Returns:
        a handle, whose `wait()` returns once the file is written

    Raises:
        OSError: the file cannot be written; it is named, and what was there before still is
        TypeError, ValueError: something cannot be saved, or nothing is given; nothing is written
    """
    check_named(unnamed, "save")
    given = (optimizer, model, scheduler, averaged, extra)
    if all(part is None for part in given) and not with_random_state:
        raise TypeError(
            "save: nothing to save: pass model=, optimizer=, scheduler=, averaged= or extra="
        )
    if scheduler is not None:
        check_scheduler(scheduler, "save")
    path = Path(path).absolute()
    Background.wait()
    if keep is not None:
        check_keep(path, keep)
    packer = Packer()
    randomness = random_state() if with_random_state else None
    if optimizer is not None:
        optimizer = inner_optimizer(optimizer, "save")
    scheduler = inner_scheduler(scheduler)
    description = describe(packer, optimizer, model, scheduler, averaged, extra, randomness)
    synchronize(packer.tensors.values())
    writing = Writing(path, packer.tensors, description, keep)
    # afterwards nobody would wait for it
    if background and not is_exiting():
        Background.start(writing)
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
        # not the thread: its join() may take an interrupt for its end (Python 3.11)
        self._done: threading.Event | None = None
        self._process = os.getpid()
        self._error: BaseException | None = None
        self._at_exit: Finalize | None = None

    def run(self, threads: int = 4) -> None:
        """Write it here and now."""
        tensors, self._tensors = self._tensors, {}
        write(self.path, tensors, self._description, threads=threads)
        if self._keep is not None:
            prune(self.path, self._keep)

    def start(self) -> None:
        """Copy the tensors, and have a thread write the copies."""
        self._tensors = {name: _copied(tensor) for name, tensor in self._tensors.items()}
        done = threading.Event()
        thread = threading.Thread(target=self._run, args=(done,), name=f"writes {self.path.name}")
        # unlike atexit, it is heeded in processes of multiprocessing too
        self._at_exit = Finalize(None, self.wait, exitpriority=0)
        try:
            thread.start()
        except RuntimeError:
            # there are no new ones while the interpreter ends, in functions of atexit (Python 3.12)
            self._at_exit.cancel()
            self.run()
        else:
            self._done = done

    def _run(self, done: threading.Event) -> None:
        try:
            # one thread: training needs the others
            self.run(threads=1)
        except BaseException as error:
            self._error = error
            for each in (error, error.__cause__):
                # they hold the copies
                clear_frames(None if each is None else each.__traceback__)
        finally:
            done.set()

    @property
    def is_done(self) -> bool:
        """Whether the thread has ended, well or not."""
        return self._done is None or self._done.is_set()

    def settle(self) -> None:
        """Return once the thread has ended, well or not."""
        # a forked process has a copy of this, and not the thread
        if self._done is not None and self._process == os.getpid():
            self._done.wait()

    def wait(self) -> None:
        """Return once the file is written.

        Raises:
            OSError: it was not; said once
        """
        self.settle()
        if self._at_exit is not None:
            self._at_exit.cancel()
        error, self._error = self._error, None
        if error is not None:
            raise error


def _copied(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu").copy_(tensor)
