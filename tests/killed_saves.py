"""Saves in a loop, killed at random moments: `python -m tests.killed_saves KILLS FOLDER`.

Each time a process is forked off, which says after every save how far it is, and is killed. What
is left must have a newest checkpoint that verifies and loads, of the last save that was finished,
or of one that was under way. It saves to one file, to a rotating set, in the background, or beside
a rival that saves to another file of the folder and is killed too. A fork is as good as a new
process, and needs no seconds to import torch: the kernel kills it as any other, in the same calls,
and it holds no file of its parent.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import stepwell
from stepwell.checkpoint import latest, load, save, verify

MODES = ("one", "set", "background", "rival")


def saved_in_a_loop(folder: Path, step: int, progress: int, mode: str) -> None:
    """Save until killed; the numbers in the state say at which step."""
    weight = torch.nn.Parameter(torch.zeros(200, 200))
    optimizer = stepwell.SGD([("weight", weight)], momentum=0.9)
    while True:
        step += 1
        optimizer.state[weight]["momentum_buffer"] = torch.full_like(weight, step).detach()
        name = f"step-{step}.safetensors" if mode == "set" else "run.safetensors"
        save(
            folder / name,
            optimizer=optimizer,
            extra=step,
            keep=3 if mode == "set" else None,
            background=mode == "background",
        )
        # in the background, it is the one before that is finished
        os.write(progress, struct.pack("q", step - (mode == "background")))


def rival(folder: Path) -> None:
    """Save to another file until killed."""
    while True:
        save(folder / "rival.safetensors", extra=torch.ones(9))


def forked(function: Callable[..., None], *args: Any) -> int:
    """A process that does this, and does not come to an end by itself."""
    child = os.fork()
    if child == 0:
        try:
            function(*args)
        finally:
            os._exit(1)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        raise AssertionError(f"a save failed: status {status}")


def kill_one(folder: Path, step: int, rng: random.Random, mode: str) -> int:
    """Kill a process that saves; returns the last step that it said was saved."""
    reading, writing = os.pipe()
    children = [forked(saved_in_a_loop, folder, step, writing, mode)]
    if mode == "rival":
        children.append(forked(rival, folder))
    os.close(writing)
    # after some saves, most often in the middle of the next one, however fast the machine is
    said = b"".join(os.read(reading, 8) for _ in range(rng.randrange(3)))
    time.sleep(rng.uniform(0, 0.02))
    for child in children:
        kill(child)
    while part := os.read(reading, 1 << 16):
        said += part
    os.close(reading)
    return struct.unpack("q", said[-8:])[0] if said else step


def check(folder: Path, done: int, mode: str) -> int:
    """Load the newest; returns its step."""
    newest = latest(folder)
    if mode == "rival":
        newest = next(folder.glob("run*"), None)
        for other in folder.glob("rival*"):
            verify(other)
    if newest is None:
        if done:
            raise AssertionError(f"nothing verifies, although step {done} was saved")
        return 0
    weight = torch.nn.Parameter(torch.zeros(200, 200))
    optimizer = stepwell.SGD([("weight", weight)], momentum=0.9)
    step = load(newest, optimizer=optimizer).extra
    buffer = optimizer.state[weight]["momentum_buffer"]
    if step not in range(done, done + 2 + (mode == "background")) or not bool(
        (buffer == step).all()
    ):
        raise AssertionError(f"{newest.name} is of step {step}, saved were {done}")
    return step


def main(kills: int, folder: Path) -> None:
    """Kill so many times, in each mode equally often."""
    torch.set_num_threads(1)
    rng = random.Random(0)
    finished = interrupted = 0
    for mode in MODES:
        step, place = 0, folder / mode
        place.mkdir()
        for _ in range(kills // len(MODES)):
            done = kill_one(place, step, rng, mode)
            finished += done - step
            interrupted += any(name.name.startswith(".") for name in place.iterdir())
            step = check(place, done, mode)
        # the next save removes what killed ones have left
        save(place / "step-0.safetensors", extra=0, keep=3)
        left = len(list(place.iterdir()))
        if left != (2 if mode in ("one", "background") else 3):
            raise AssertionError(f"{left} files are left in {place}")
    print(f"{kills} kills, {interrupted} in the middle of a file, {finished} saves finished")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
