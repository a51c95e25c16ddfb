"""Several processes of torch.distributed on this machine, for tests of sharded training."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh

WORLD = 2


def in_processes(body: Callable[[Any, Path], None], folder: Path) -> None:
    """Call a function of a module, with a mesh and this folder, in `WORLD` processes.

    The test fails with their tracebacks if one of them raises, or dies.
    """
    try:
        multiprocessing.start_processes(
            _process, (body, folder), nprocs=WORLD, start_method="spawn", join=True
        )
    except Exception as error:
        tracebacks = [path.read_text() for path in sorted(folder.glob("traceback *"))]
        pytest.fail("\n".join(tracebacks) or f"a process died: {error}")


def _process(rank: int, body: Callable[[Any, Path], None], folder: Path) -> None:
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), WORLD)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
        body(init_device_mesh("cpu", (WORLD,)), folder)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"traceback {rank}").write_text(traceback.format_exc())
        raise
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of gloo that still let go of tensors while the interpreter ends abort the process:
    # https://github.com/pytorch/pytorch/pull/179291
    os._exit(0)
