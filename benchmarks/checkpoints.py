"""Saving and loading 50 M parameters of AdamW (600 MB), beside plain file calls and a sync.

Both sides write a new file beside the old one, sync it and rename it; both read into fresh memory
what is the optimizer's state, and into the model what is its own. They take turns, since a disk
does not always run at one speed. TMPDIR says on which disk.
"""

from __future__ import annotations

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
from stepwell.checkpoint import load, save

TITLE = "a checkpoint of 50 M parameters of AdamW, 600 MB; medians"
LAYERS, WIDTH = 50, 1000
BAR = 1.15
BAR_MEGABYTES = 64
ROUNDS = 9


@dataclass(frozen=True)
class Compared:
    """Seconds of each round, and the megabytes that a load took beyond what it leaves."""

    what: str
    stepwell: list[float]
    plain: list[float]
    extra_megabytes: float
    bar: float | None

    @property
    def ratio(self) -> float:
        """How many times as long as plain file calls: the median over the rounds."""
        pairs = zip(self.stepwell, self.plain, strict=True)
        return statistics.median(ours / plain for ours, plain in pairs)

    def misses(self) -> list[str]:
        """What is slower, or takes more memory, than it must."""
        slow = self.bar is not None and self.ratio > self.bar
        large = self.extra_megabytes > BAR_MEGABYTES
        return [f"{self.ratio:.2f}x > {self.bar}x"] * slow + ["too much memory"] * large


def _training() -> tuple[nn.Module, stepwell.AdamW]:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    return model, stepwell.AdamW(model.parameters())


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().numpy()).cast("B")


def write_plainly(path: Path, tensors: Sequence[Tensor]) -> None:
    """What cannot be saved on: the bytes, a sync, a new name."""
    unfinished = path.with_suffix(".new")
    with unfinished.open("xb", buffering=0) as file:
        for tensor in tensors:
            file.write(_bytes(tensor))
        os.fsync(file.fileno())
    unfinished.replace(path)


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
    work()
    return time.perf_counter() - begin


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
    ours, plain = folder / "run.safetensors", folder / "plain"

    def forget() -> None:
        for path in (ours, plain):
            forget_file(path)

    def load_ours() -> object:
        fresh = stepwell.AdamW(model.parameters())
        load(ours, model=model, optimizer=fresh)
        return fresh

    def save_ours() -> object:
        return save(ours, model=model, optimizer=optimizer)

    def write() -> object:
        return write_plainly(plain, [*model.parameters(), *moments])

    def read() -> object:
        return read_plainly(plain, model)

    return [
        _in_turns("save", save_ours, write),
        _in_turns("load from the disk", load_ours, read, forget),
        _in_turns("load from the system's cache", load_ours, read, bar=None),
    ]


def forget_file(path: Path) -> None:
    """Have the system drop what it remembers of a file, so that it is read from the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_turns(
    what: str,
    ours: Callable[[], object],
    plain: Callable[[], object],
    before: Callable[[], None] = lambda: None,
    bar: float | None = BAR,
) -> Compared:
    rounds = []
    for _ in range(ROUNDS + 1):
        before()
        rounds.append((_seconds(ours), _seconds(plain)))
    # the first one warms up
    return Compared(what, *map(list, zip(*rounds[1:], strict=True)), _extra_megabytes(ours), bar)


def table(compared: Sequence[Compared]) -> Table:
    """What was measured, and whether it is enough."""
    made = Table(title=TITLE)
    made.add_column("")
    for name in ("stepwell", "file calls and sync", "ratio", "must be", "memory beyond the result"):
        made.add_column(name, justify="right")
    for one in compared:
        colour = "red" if one.misses() else "green"
        made.add_row(
            one.what,
            f"{statistics.median(one.stepwell):.2f} s",
            f"{statistics.median(one.plain):.2f} s",
            f"[{colour}]{one.ratio:.2f}x[/{colour}]",
            f"{'-' if one.bar is None else f'{one.bar:g}x'}, {BAR_MEGABYTES} MB",
            f"{one.extra_megabytes:.0f} MB",
        )
    return made


def saved(one: Compared) -> dict[str, Any]:
    """The same for the JSON file."""
    return {
        "what": one.what,
        "seconds": {
            "stepwell": round(statistics.median(one.stepwell), 3),
            "plain": round(statistics.median(one.plain), 3),
        },
        "ratio": round(one.ratio, 3),
        "megabytes_beyond_the_result": round(one.extra_megabytes, 1),
        "missed": one.misses(),
    }
