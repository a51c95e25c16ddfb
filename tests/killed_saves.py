"""Saves in a loop, killed at random moments: `python -m tests.killed_saves KILLS FOLDER`.

Each time a process is forked off, which says after every save how far it is, and is killed. What
is left must have a newest checkpoint that verifies and loads, of the last save that was finished,
or of the one that was under way. A fork is as good as a new process, and needs no seconds to import
torch: the kernel kills it as any other, in the same calls, and it holds no file of its parent.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

import torch

import stepwell
from stepwell.checkpoint import latest, load, save


def saved_in_a_loop(folder: Path, step: int, progress: int, rotates: bool) -> None:
    """Save until killed; the numbers in the state say at which step."""
    weight = torch.nn.Parameter(torch.zeros(200, 200))
    optimizer = stepwell.SGD([("weight", weight)], momentum=0.9)
    while True:
        step += 1
        optimizer.state[weight]["momentum_buffer"] = torch.full_like(weight, step).detach()
        name = f"step-{step}.safetensors" if rotates else "run.safetensors"
        save(folder / name, optimizer=optimizer, extra=step, keep=3 if rotates else None)
        os.write(progress, struct.pack("q", step))


def kill_one(folder: Path, step: int, rng: random.Random, rotates: bool) -> int:
    """Kill a process that saves; returns the last step that it said was saved."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            saved_in_a_loop(folder, step, writing, rotates)
        finally:
            os._exit(1)
    os.close(writing)
    # after some saves, most often in the middle of the next one, however fast the machine is
    said = b"".join(os.read(reading, 8) for _ in range(rng.randrange(3)))
    time.sleep(rng.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        raise AssertionError(f"a save failed: status {status}")
    while part := os.read(reading, 1 << 16):
        said += part
    os.close(reading)
    return struct.unpack("q", said[-8:])[0] if said else step


def check(folder: Path, done: int) -> int:
    """Load the newest; returns its step."""
    newest = latest(folder)
    if newest is None:
        if done:
            raise AssertionError(f"nothing verifies, although step {done} was saved")
        return 0
    weight = torch.nn.Parameter(torch.zeros(200, 200))
    optimizer = stepwell.SGD([("weight", weight)], momentum=0.9)
    step = load(newest, optimizer=optimizer).extra
    buffer = optimizer.state[weight]["momentum_buffer"]
    if step not in (done, done + 1) or not bool((buffer == step).all()):
        raise AssertionError(f"{newest.name} is of step {step}, saved were {done}")
    return step


def main(kills: int, folder: Path) -> None:
    """Kill so many times, half of them with one file, half with a rotating set."""
    torch.set_num_threads(1)
    rng = random.Random(0)
    finished = interrupted = 0
    for rotates in (False, True):
        step, place = 0, folder / ("set" if rotates else "one")
        place.mkdir()
        for _ in range(kills // 2):
            done = kill_one(place, step, rng, rotates)
            finished += done - step
            interrupted += any(name.name.startswith(".") for name in place.iterdir())
            step = check(place, done)
        # the next save removes what killed ones have left
        save(place / "step-0.safetensors", keep=3)
        left = len(list(place.iterdir()))
        if left != (3 if rotates else 2):
            raise AssertionError(f"{left} files are left in {place}")
    print(f"{kills} kills, {interrupted} in the middle of a file, {finished} saves finished")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
