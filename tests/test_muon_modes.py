"""Are the steps of Muon the same whatever mode of torch, scaler or mesh is around them?"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from stepwell.optimizers.muon import Muon

from .processes import WORLD, in_processes
from .shell_cases import assert_same, fill_grads, refused, snapshot, train, weights
from .test_modes import AROUND

SHAPES = ((4, 6), (4, 6), (6, 4), (3, 4, 2))
DTYPES = {"ns_dtype": "float32"}, {"ns_dtype": "bfloat16"}


def moved(around: Any = nullcontext, shapes: Any = SHAPES, **options: Any) -> Any:
    params = weights(shapes)
    optimizer = Muon(params, lr=0.1, weight_decay=0.5, **options)
    for step in range(3):
        fill_grads(params, step)
        with around():
            optimizer.step()
    return [p.detach() for p in params], optimizer.state_dict()["state"]


@pytest.mark.parametrize("around", AROUND.values(), ids=[*AROUND])
@pytest.mark.parametrize("options", DTYPES, ids=str)
def test_what_is_around_a_step_changes_nothing(around: Any, options: dict[str, Any]) -> None:
    assert_same(moved(around, **options), moved(**options))


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        found = moved()
    assert_same(found, moved())
    # and one that was not, with such state
    with torch.inference_mode():
        buffer = torch.ones(4, 6)
    (param,) = weights(((4, 6),))
    optimizer = Muon([param])
    optimizer.state[param]["momentum_buffer"] = buffer
    train(optimizer, 1)
    assert not (buffer == 1).any()


def test_fake_tensors_have_state_of_the_right_shape() -> None:
    with FakeTensorMode():
        params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        optimizer = Muon(params)
        for _ in range(2):
            for param in params:
                param.grad = torch.randn(param.shape)
            optimizer.step()
        state = optimizer.state_dict()["state"]
    assert [tuple(state[i]["momentum_buffer"].shape) for i in range(4)] == list(SHAPES)


# Scalers


def test_a_step_in_which_a_scaler_found_infinity_is_none() -> None:
    params = weights(SHAPES)
    optimizer = Muon(params)
    for _ in range(2):
        fill_grads(params, 1)
        before = snapshot(optimizer)
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(2.0)
        optimizer.step()
        assert_same(snapshot(optimizer), before)
        del optimizer.found_inf, optimizer.grad_scale
        optimizer.step()


class Elsewhere(Tensor):
    """A number that says it lies on an accelerator."""

    device = torch.device("cuda")


def test_infinity_that_was_found_on_a_device_is_waited_for() -> None:
    params = weights(SHAPES)
    optimizer = Muon(params)
    fill_grads(params, 1)
    before = snapshot(optimizer)
    optimizer.found_inf = torch.tensor(1.0).as_subclass(Elsewhere)
    assert optimizer.found_inf.device.type == "cuda"
    optimizer.step()
    assert_same(snapshot(optimizer), before)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_unscaled_once_and_where_others_see_them(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stepwell.optimizers.muon.MOST_ON_CPU", 20)
    runs = []
    for scale in (1.0, 2.0**6):
        params, experts = weights(SHAPES, dtype=dtype), weights(((4, 3, 3),), dtype=dtype)
        groups = [{"params": [*params, params[0]]}, {"params": experts, "batch_dims": 1}]
        optimizer = Muon(groups, lr=0.1, ns_dtype="float32")
        for step in range(2):
            fill_grads([*params, *experts], step)
            for param in (*params, *experts):
                param.grad *= scale
            if scale != 1:
                optimizer.grad_scale = torch.tensor(scale)
            optimizer.step()
        grads = [p.grad for p in (*params, *experts)]
        runs.append((grads, [p.detach() for p in params], optimizer.state_dict()["state"]))
    assert_same(*runs)


def test_nothing_is_unscaled_where_a_step_is_refused() -> None:
    params = weights(SHAPES)
    optimizer = Muon(params)
    fill_grads(params, 1)
    kept = [param.grad.clone() for param in params]
    params[2].grad = params[2].grad.to_sparse()
    optimizer.grad_scale = torch.tensor(2.0)
    assert "sparse" in str(refused(optimizer.step))
    assert_same([params[i].grad for i in (0, 1, 3)], [kept[i] for i in (0, 1, 3)])


# Newer torch's


@pytest.mark.parametrize("shape", [(2, 8), (8, 2), (3, 3), (2, 4, 2)])
def test_the_spectral_factor_is_not_clamped(shape: tuple[int, ...]) -> None:
    rows, columns = shape[0], math.prod(shape[1:])
    options = {"shapes": (shape,), "ns_dtype": "float32"}
    start = weights((shape,))[0].detach()

    def change(name: str) -> Tensor:
        params = weights((shape,))
        optimizer = Muon(params, lr=0.1, weight_decay=0, adjust_lr_fn=name, ns_dtype="float32")
        train(optimizer, 1)
        return params[0].detach() - start

    assert moved(adjust_lr_fn="spectral_unclamped", **options) is not None
    factor = math.sqrt(rows / columns) / math.sqrt(max(1, rows / columns))
    torch.testing.assert_close(change("spectral_unclamped"), change("original") * factor)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ns_dtype", ["bfloat16", "float32"])
def test_a_buffer_is_the_running_mean(nesterov: bool, dtype: torch.dtype, ns_dtype: Any) -> None:
    """torch before 2.15 divides a bfloat16 one by its norm, without nesterov."""
    params = weights(((4, 6),), dtype=dtype)
    optimizer = Muon(params, momentum=0.5, nesterov=nesterov, ns_dtype=ns_dtype)
    expected = torch.zeros(4, 6, dtype=dtype)
    for step in range(3):
        fill_grads(params, step)
        expected.lerp_(params[0].grad, 0.5)
        optimizer.step()
    assert_same(optimizer.state[params[0]]["momentum_buffer"], expected)


# Meshes


def _cut_by(mesh: Any) -> list[Any]:
    def fsdp(net: nn.Module) -> None:
        fully_shard(net[0], mesh=mesh)
        fully_shard(net, mesh=mesh)

    def tensor_parallel(net: nn.Module, mesh: Any = mesh) -> None:
        parallelize_module(net, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})

    def both(net: nn.Module) -> None:
        grid = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("fsdp", "tp"))
        tensor_parallel(net, grid["tp"])
        fully_shard(net, mesh=grid["fsdp"])

    return [fsdp, tensor_parallel, both]


def _models(mesh: Any, _: Path) -> None:
    def run(cut: Any) -> list[Tensor]:
        torch.manual_seed(0)
        # one matrix has fewer rows than there are processes
        net = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Linear(6, 1, bias=False))
        cut(net)
        optimizer = Muon(net.parameters(), lr=0.1, ns_dtype="float32")
        inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            optimizer.zero_grad()
            net(inputs).square().mean().backward()
            optimizer.step()
        state = [optimizer.state[p]["momentum_buffer"] for p in net.parameters()]
        tensors = [*net.parameters(), *state]
        return [t.full_tensor() if isinstance(t, DTensor) else t.detach() for t in tensors]

    expected = run(lambda net: None)
    for cut in _cut_by(mesh):
        torch.testing.assert_close(run(cut), expected, rtol=1e-4, atol=1e-5, msg=cut.__name__)
    # a gradient whose sum is pending
    whole = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    halves = DTensor.from_local(whole / WORLD, mesh, [Partial()])
    plain = nn.Parameter(torch.ones(4, 6))
    param = nn.Parameter(DTensor.from_local(torch.ones(4, 6), mesh, [Replicate()]))
    plain.grad, param.grad = whole, halves
    for p in (plain, param):
        Muon([p], lr=0.1, ns_dtype="float32").step()
    torch.testing.assert_close(param.full_tensor(), plain.detach())


def test_models_are_updated_as_the_whole(tmp_path: Path) -> None:
    in_processes(_models, tmp_path)
