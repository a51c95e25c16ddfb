"""Does LBFGS take the steps of the whole model where its parameters are distributed?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import stepwell

from .cases import numbers
from .processes import WORLD, in_processes

SEARCHES: tuple[dict[str, Any], ...] = ({}, {"line_search_fn": "strong_wolfe"})


class Net(nn.Module):
    """Sizes that two processes do not share evenly, and one that only the first has a part of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def _plain(net: Net, mesh: Any) -> None:
    pass


def _fsdp(net: Net, mesh: Any) -> None:
    fully_shard(net.up, mesh=mesh)
    fully_shard(net, mesh=mesh)


def _tensor_parallel(net: Net, mesh: Any) -> None:
    parallelize_module(net, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def _both(net: Net, mesh: Any) -> None:
    both = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("fsdp", "tp"))
    _tensor_parallel(net, both["tp"])
    fully_shard(net, mesh=both["fsdp"])


WAYS = (_plain, _fsdp, _tensor_parallel, _both)


def _walk(way: Any, mesh: Any, search: dict[str, Any], rank: int | None) -> Any:
    """Parameters and state after two steps; each rank has data of its own, None all of it."""
    net = Net()
    way(net, mesh)
    inputs, targets = numbers((8, 3), torch.float32, 1), numbers((8, 1), torch.float32, 2)
    if rank is not None:
        inputs, targets = inputs[rank::WORLD], targets[rank::WORLD]
    optimizer = stepwell.LBFGS(net.parameters(), max_iter=5, **search)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (net(inputs) - targets).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    wholes = [p.full_tensor() if isinstance(p, DTensor) else p for p in net.parameters()]
    return [whole.detach() for whole in wholes], optimizer


def _same_as_whole(mesh: Any) -> None:
    for search in SEARCHES:
        expected, plain = _walk(_plain, mesh, search, None)
        for way in WAYS:
            found, optimizer = _walk(way, mesh, search, None)
            # sums in another order, ten iterations long
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=way.__name__)
            one, other = (o.state_dict()["state"][0] for o in (optimizer, plain))
            assert (one["n_iter"], one["func_evals"]) == (other["n_iter"], other["func_evals"])
            assert not any(isinstance(value, DTensor) for value in one.values())
        # each process has another half of the data, and another loss
        found, _ = _walk(_fsdp, mesh, search, dist.get_rank())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def _frozen_complex_and_loaded(mesh: Any) -> None:
    wholes = [
        torch.full((3, 2), 2.0),
        torch.tensor([1 + 2j, 3 - 1j, 0.5j]),
        torch.full((1,), 5.0),
        torch.zeros(0, 2),
    ]
    runs = []
    for cut in (None, Shard(0), Replicate()):
        params = [
            nn.Parameter(w.clone() if cut is None else distribute_tensor(w, mesh, [cut]))
            for w in wholes
        ]
        params[2].requires_grad = False

        def closure(params: Any = params) -> Tensor:
            for param in params[:2]:
                param.grad = 2 * param.detach() ** 3
            total = sum((p.detach().abs() ** 4).sum() / 2 for p in params[:2])
            return total.full_tensor() if isinstance(total, DTensor) else total

        first = stepwell.LBFGS(params, max_iter=4, lr=0.1)
        first.step(closure)
        second = stepwell.LBFGS(params, max_iter=4, lr=0.1)
        second.load_state_dict(first.state_dict())
        second.step(closure)
        runs.append([p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in params])
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0])
    assert runs[0][2].item() == 5


def _questions(mesh: Any, _: Path) -> None:
    for question in (_same_as_whole, _frozen_complex_and_loaded):
        question(mesh)


def test_shards(tmp_path: Path) -> None:
    in_processes(_questions, tmp_path)
