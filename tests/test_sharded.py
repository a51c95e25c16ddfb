"""Are the parts of distributed tensors updated as the whole tensor would be, in compiled code?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import stepwell

from .cases import NATIVE, PLAIN, numbers, per_element
from .compare import assert_within, backends
from .processes import WORLD, in_processes
from .rules import LAMB

pytestmark = pytest.mark.interpret

SHAPES = ((5, 6), (8,), (3, 4, 2), (1, 7))
CUTS = ([Shard(0)], [Shard(-1)], [Replicate()])


def _whole(step: int) -> list[Any]:
    return [numbers(shape, torch.float32, 100 * step + i) for i, shape in enumerate(SHAPES)]


def _cut(tensors: list[Any], mesh: Any, cut: Any) -> list[Any]:
    """The same tensors, each process holding its part."""
    return [distribute_tensor(tensor, mesh, cut) for tensor in tensors]


def _same_as_whole(mesh: Any) -> None:
    for case in PLAIN:
        for cut in CUTS:
            params = [nn.Parameter(tensor) for tensor in _cut(_whole(0), mesh, cut)]
            wholes = [nn.Parameter(tensor) for tensor in _whole(0)]
            sharded, plain = case.make(params), case.make(wholes)
            for step in range(1, 4):
                for param, grad in zip(params, _cut(_whole(step), mesh, cut), strict=True):
                    param.grad = grad
                for param, grad in zip(wholes, _whole(step), strict=True):
                    param.grad = grad
                sharded.step()
                plain.step()
            # sums over what lies elsewhere are for those who know where
            backend = NATIVE if case in per_element(PLAIN) else "eager"
            assert backends(sharded) == {backend}, (case.name, cut)
            for param, whole in zip(params, wholes, strict=True):
                # the same operations on the same numbers, but in other places of a vector
                assert_within(param.full_tensor(), whole.detach(), 2, f"{case.name} {cut}")
                for name, entry in sharded.state[param].items():
                    assert isinstance(entry, DTensor) == (entry.dim() > 0), name


def _sharded_model(mesh: Any) -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))

    whole, cut = model(), model()
    fully_shard(cut, mesh=mesh)
    plain = stepwell.AdamW(whole.parameters(), lr=0.1)
    sharded = stepwell.AdamW(cut.parameters(), lr=0.1)
    for step in range(4):
        inputs = numbers((4, 6), torch.float32, step)
        for net, optimizer in ((whole, plain), (cut, sharded)):
            optimizer.zero_grad()
            net(inputs).square().mean().backward()
            optimizer.step()
    assert backends(sharded) == {NATIVE}
    for mine, other in zip(cut.parameters(), whole.parameters(), strict=True):
        # the gradient is a mean over two processes here
        torch.testing.assert_close(mine.full_tensor(), other, rtol=1e-4, atol=1e-5)


def _where_it_must_not_run(mesh: Any) -> None:
    # a norm over a part is not the norm, and a pending sum is no number yet
    (param,) = _cut([torch.ones(8)], mesh, [Shard(0)])
    param = nn.Parameter(param)
    param.grad = _cut([torch.ones(8)], mesh, [Shard(0)])[0]
    made = LAMB([param])
    made.step()
    assert backends(made) == {"eager"}
    param = nn.Parameter(_cut([torch.ones(8)], mesh, [Replicate()])[0])
    made = stepwell.SGD([param], lr=0.5)
    pending = DTensor.from_local(torch.ones(8), mesh, [Partial()])
    param.grad = pending
    made.step()
    assert backends(made) == {"eager"}
    assert param.full_tensor().tolist() == [1 - 0.5 * WORLD] * 8


def _questions(mesh: Any, _: Path) -> None:
    for question in (_same_as_whole, _sharded_model, _where_it_must_not_run):
        question(mesh)


def test_parts_are_updated_as_the_whole(tmp_path: Path) -> None:
    in_processes(_questions, tmp_path)
