"""Saving and loading 50 M parameters of AdamW (600 MB), beside the least that could be done.

Both sides write a new file beside the old one, sync it and rename it; both read into the model what
is its own, and into new memory what is the optimizer's state. New is what the process has not had
before, as when it resumes: what was freed is given back to the system. A save in the background is
measured until it returns, beside one copy of the same tensors. Both sides take turns, since a disk
does not always run at one speed, and each begins with nothing left to write. TMPDIR says on which
disk.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import stepwell
from stepwell.checkpoint import Writing, load, save

TITLE = "a checkpoint of 50 M parameters of AdamW, 600 MB; medians"
LAYERS, WIDTH = 50, 1000
BAR = 1.15
BAR_MEGABYTES = 64
ROUNDS = 9


@dataclass(frozen=True)
class Compared:
    """Seconds of each round, and the megabytes that were taken beyond what is left.

    A save in the background holds a copy on purpose: its megabytes are not counted.
    """

    what: str
    beside: str
    stepwell: list[float]
    plain: list[float]
    extra_megabytes: float | None

    @property
    def ratio(self) -> float:
        """How many times as long as the other side: the median over the rounds."""
        pairs = zip(self.stepwell, self.plain, strict=True)
        return statistics.median(ours / plain for ours, plain in pairs)

    def misses(self) -> list[str]:
        """What is slower, or takes more memory, than it must."""
        large = (self.extra_megabytes or 0) > BAR_MEGABYTES
        return [f"{self.ratio:.2f}x > {BAR}x"] * (self.ratio > BAR) + ["too much memory"] * large


def _training() -> tuple[nn.Module, stepwell.AdamW]:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    return model, stepwell.AdamW(model.parameters())


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().numpy()).cast("B")


def write_plainly(path: Path, tensors: Sequence[Tensor]) -> None:
    """What cannot be saved on: the bytes, a sync, a new name that survives a loss of power."""
    unfinished = path.with_suffix(".new")
    with unfinished.open("xb", buffering=0) as file:
        for tensor in tensors:
            file.write(_bytes(tensor))
        os.fsync(file.fileno())
    unfinished.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def read_plainly(path: Path, model: nn.Module) -> list[Tensor]:
    """The bytes, into the model and into new tensors."""
    params = list(model.parameters())
    state = [torch.empty_like(param) for param in params for _ in range(2)]
    with path.open("rb", buffering=0) as file:
        for tensor in (*params, *state):
            file.readinto(_bytes(tensor))
    return state


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - begin
    if isinstance(result, Writing):
        result.wait()
    return seconds


def settle() -> None:
    """Leave nothing to write, and have what was freed be new to the process when it is needed."""
    os.sync()
    ctypes.CDLL(None).malloc_trim(0)


def _extra_megabytes(work: Callable[[], object]) -> float:
    """What it takes at its most, beyond what is there before and after."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    kept = work()
    after = max(before, _resident("VmRSS"))
    del kept
    return _resident("VmHWM") - after


def _resident(what: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) * 1024 / 1e6


def compare() -> list[Compared]:
    """Save and load, each in turns with plain file calls; the first round is for warming up."""
    with tempfile.TemporaryDirectory() as folder:
        return _compare(Path(folder))


def _compare(folder: Path) -> list[Compared]:
    model, optimizer = _training()
    optimizer.init_state()
    moments = [optimizer.state[p][m] for p in model.parameters() for m in ("exp_avg", "exp_avg_sq")]
    tensors = [param.detach() for param in (*model.parameters(), *moments)]
    ours, plain = folder / "run.safetensors", folder / "plain"

    def forget() -> None:
        settle()
        for path in (ours, plain):
            forget_file(path)

    def load_ours() -> object:
        fresh = stepwell.AdamW(model.parameters())
        load(ours, model=model, optimizer=fresh)
        return fresh

    def save_ours() -> object:
        return save(ours, model=model, optimizer=optimizer)

    def save_behind() -> object:
        return save(ours, model=model, optimizer=optimizer, background=True)

    def write() -> None:
        write_plainly(plain, tensors)

    def read() -> object:
        return read_plainly(plain, model)

    def copy() -> object:
        return [tensor.clone() for tensor in tensors]

    return [
        _in_turns("save", "writes and a sync", save_ours, write),
        _in_turns("load from the disk", "reads", load_ours, read, forget),
        _in_turns("load from the system's cache", "reads", load_ours, read),
        _in_turns(
            "save in the background, until it returns",
            "a copy of the tensors",
            save_behind,
            copy,
            holds_a_copy=True,
        ),
    ]


def forget_file(path: Path) -> None:
    """Have the system drop what it remembers of a file, so that it is read from the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_turns(
    what: str,
    beside: str,
    ours: Callable[[], object],
    plain: Callable[[], object],
    before: Callable[[], None] = settle,
    *,
    holds_a_copy: bool = False,
) -> Compared:
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(ROUNDS + 1):
        for side, work in zip(seconds, (ours, plain), strict=True):
            before()
            side.append(_seconds(work))
    # the first one warms up
    one, other = (side[1:] for side in seconds)
    return Compared(what, beside, one, other, None if holds_a_copy else _extra_megabytes(ours))


def table(compared: Sequence[Compared]) -> Table:
    """What was measured, and whether it is enough."""
    made = Table(title=TITLE)
    made.add_column("")
    for name in ("stepwell", "beside it", "", "ratio", "must be", "memory beyond the result"):
        made.add_column(name, justify="left" if not name else "right")
    for one in compared:
        colour = "red" if one.misses() else "green"
        counted = one.extra_megabytes is not None
        made.add_row(
            one.what,
            f"{statistics.median(one.stepwell):.2f} s",
            f"{statistics.median(one.plain):.2f} s",
            one.beside,
            f"[{colour}]{one.ratio:.2f}x[/{colour}]",
            f"{BAR:g}x" + f", {BAR_MEGABYTES} MB" * counted,
            f"{one.extra_megabytes:.0f} MB" if counted else "a copy",
        )
    return made


def saved(one: Compared) -> dict[str, Any]:
    """The same for the JSON file."""
    return {
        "what": one.what,
        "beside": one.beside,
        "seconds": {
            "stepwell": round(statistics.median(one.stepwell), 3),
            "plain": round(statistics.median(one.plain), 3),
        },
        "ratio": round(one.ratio, 3),
        "megabytes_beyond_the_result": one.extra_megabytes and round(one.extra_megabytes, 1),
        "missed": one.misses(),
    }
