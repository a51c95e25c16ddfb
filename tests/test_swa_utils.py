"""Are averages of models torch's, and right where torch's are not?"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.optim.swa_utils as theirs
from torch import Tensor, nn

import stepwell
from stepwell import swa_utils as ours

from .cases import named, numbers


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


def _change(model: nn.Module, step: int) -> None:
    """Move parameters and statistics, as a step of training does."""
    model(numbers((8, 4), torch.float32, 100 + step, scale=1 + step))
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.add_(numbers(param.shape, param.dtype, 10 * step + i, scale=0.1))


FUNCTIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "default": lambda package: {},
    "ema multi": lambda package: {"multi_avg_fn": package.get_ema_multi_avg_fn(0.9)},
    "swa multi": lambda package: {"multi_avg_fn": package.get_swa_multi_avg_fn()},
    "ema": lambda package: {"avg_fn": package.get_ema_avg_fn(0.9)},
    "swa": lambda package: {"avg_fn": package.get_swa_avg_fn()},
    "own": lambda package: {"avg_fn": lambda average, current, n: average + current / (2 * n)},
}


def _assert_equal(one: nn.Module, other: nn.Module, skip: Any = (), ulps: int = 0) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name in left.keys() - set(skip):
        eps = torch.finfo(torch.float32).eps * ulps
        torch.testing.assert_close(left[name], right[name], rtol=eps, atol=eps, msg=name)


# Twins


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_averaged_model_is_torchs(function: str, use_buffers: bool, device: Any) -> None:
    model = _model()
    if function == "swa multi":
        # torch cannot average it in place
        model[1].num_batches_tracked = None
    made = {
        package: package.AveragedModel(
            model, device, use_buffers=use_buffers, **FUNCTIONS[function](package)
        )
        for package in (ours, theirs)
    }
    # torch rounds whole numbers at every step
    skip = ["module.1.num_batches_tracked"] if use_buffers else []
    # without a function torch divides where it has no call for many tensors
    ulps = 4 if function == "default" else 0
    for step in range(5):
        _change(model, step)
        for averaged in made.values():
            averaged.update_parameters(model)
        _assert_equal(made[ours], made[theirs], skip, ulps)
    assert made[ours].n_averaged == 5
    batch = numbers((3, 4), torch.float32, 7)
    torch.testing.assert_close(made[ours].eval()(batch), made[theirs].eval()(batch))


@pytest.mark.tiny
def test_names_and_signatures_are_torchs() -> None:
    assert set(ours.__all__) == set(theirs.__all__)
    assert stepwell.swa_utils is ours
    assert isinstance(ours.AveragedModel(_model()), theirs.AveragedModel)
    for name in ours.__all__:
        mine, yours = (inspect.signature(getattr(m, name)).parameters for m in (ours, theirs))
        assert [(p.name, p.default, p.kind) for p in mine.values()] == [
            (p.name, p.default, p.kind) for p in yours.values()
        ], name


@pytest.mark.parametrize(("package", "other"), [(ours, theirs), (theirs, ours)])
def test_state_dicts_go_both_ways(package: Any, other: Any) -> None:
    model, settings = _model(), FUNCTIONS["swa multi"]
    first = package.AveragedModel(model, **settings(package))
    for step in range(3):
        _change(model, step)
        first.update_parameters(model)
    second = other.AveragedModel(_model(1), **settings(other))
    second.load_state_dict(first.state_dict())
    _change(model, 3)
    for averaged in (first, second):
        averaged.update_parameters(model)
    _assert_equal(first, second)
    assert second.n_averaged == 4


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("name", ["get_ema_avg_fn", "get_ema_multi_avg_fn"])
def test_a_decay_that_is_none_is_refused_in_torchs_words(name: str, decay: float) -> None:
    said = rf"Invalid decay value {decay} provided\. Please provide a value in \[0,1\] range\."
    with pytest.raises(ValueError, match=said):
        getattr(ours, name)(decay)
    if decay == decay:
        with pytest.raises(ValueError, match=said):
            getattr(theirs, name)(decay)


def test_two_functions_are_refused_in_torchs_words() -> None:
    for package in (ours, theirs):
        both = {"avg_fn": package.get_swa_avg_fn(), "multi_avg_fn": package.get_swa_multi_avg_fn()}
        with pytest.raises(AssertionError, match=r"^Only one of avg_fn and multi_avg_fn should be"):
            package.AveragedModel(_model(), **both)


# What torch's do not do


@pytest.mark.parametrize("function", ["default", "ema multi", "swa multi", "ema", "swa"])
def test_whole_numbers_are_averaged(function: str) -> None:
    """The oracle: the average in float64, of the numbers as they were."""
    model = nn.BatchNorm1d(2)
    averaged = ours.AveragedModel(model, use_buffers=True, **FUNCTIONS[function](ours))
    expected = 0.0
    for step in range(40):
        model.num_batches_tracked.fill_(3 * step)
        averaged.update_parameters(model)
        weight = 0.1 if "ema" in function else 1 / (step + 1)
        expected += (weight if step else 1.0) * (3 * step - expected)
        # what is stored is rounded towards zero
        assert abs(averaged.module.num_batches_tracked.item() - expected) <= 1
    assert averaged.module.num_batches_tracked.dtype is torch.int64
    assert expected > 50


def test_torch_cannot_average_whole_numbers_in_place() -> None:
    function = theirs.get_swa_multi_avg_fn()
    averaged = theirs.AveragedModel(nn.BatchNorm1d(2), multi_avg_fn=function, use_buffers=True)
    averaged.update_parameters(nn.BatchNorm1d(2))
    with pytest.raises(RuntimeError, match="Integer division with addcdiv is no longer supported"):
        averaged.update_parameters(nn.BatchNorm1d(2))


def test_truth_values_are_copied() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([True, False]))
    averaged = ours.AveragedModel(model, use_buffers=True)
    for mask in ([True, False], [False, True], [False, False]):
        model.mask.copy_(torch.tensor(mask))
        averaged.update_parameters(model)
        assert averaged.module.mask.tolist() == mask


@pytest.mark.parametrize("multi", ["get_ema_multi_avg_fn", "get_swa_multi_avg_fn"])
@pytest.mark.parametrize("count", [2, torch.tensor(2)])
def test_functions_take_lists_of_any_dtypes(multi: str, count: Any) -> None:
    dtypes = (torch.float32, torch.int64, torch.float64, torch.bfloat16, torch.complex64)
    averages = [numbers((5,), torch.float64, i, scale=9).to(d) for i, d in enumerate(dtypes)]
    currents = [numbers((5,), torch.float64, 9 + i, scale=9) for i in range(len(dtypes))]
    weight = 1 - 0.999 if "ema" in multi else 1 / 3
    expected = [
        (a.to(torch.complex128) + weight * (c - a.to(torch.complex128)))
        for a, c in zip(averages, currents, strict=True)
    ]
    getattr(ours, multi)()(averages, currents, count)
    for dtype, average, right in zip(dtypes, averages, expected, strict=True):
        assert average.dtype is dtype
        right = right if dtype.is_complex else right.real
        right = right.trunc() if dtype is torch.int64 else right
        # bfloat16: the current one is rounded, and so is the average
        torch.testing.assert_close(average, right.to(dtype))
    getattr(ours, multi)()([], [], count)


@pytest.mark.parametrize("dtype", **named((torch.bfloat16, torch.float16)))
@pytest.mark.parametrize("function", ["ema multi", "swa multi", "ema", "swa"])
def test_averages_in_half_precision_go_on_moving(function: str, dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2).to(dtype)
    exact = nn.Linear(3, 2)
    averaged = ours.AveragedModel(model, **FUNCTIONS[function](ours))
    # the same in float32, which torch averages
    truth = theirs.AveragedModel(exact, **FUNCTIONS[function](theirs))
    for step in range(30):
        if step < 2:
            with torch.no_grad():
                for param in model.parameters():
                    param.fill_(1.0 if step == 0 else 1.03125)
        exact.load_state_dict(model.state_dict())
        averaged.update_parameters(model)
        truth.update_parameters(exact)
    for average, right in zip(averaged.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(average, right.to(dtype), rtol=0, atol=0)
        assert average.dtype is dtype


def test_what_is_written_into_an_average_counts() -> None:
    """The float32 copy gives way where the module holds something else: element by element."""
    model = nn.Linear(2, 1, bias=False).bfloat16()
    averaged = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.75))
    values = torch.tensor([[1.0, 1.0]])
    for step in range(4):
        with torch.no_grad():
            model.weight.copy_(values + step / 128)
        averaged.update_parameters(model)
    kept = averaged.state_dict()["module.weight"][0, 0].item()
    with torch.no_grad():
        averaged.module.weight[0, 1] = 64.0
    averaged.update_parameters(model)
    expected = torch.tensor([0.75 * kept + 0.25 * model.weight[0, 0].item(), 48 + 0.25 * 1.0234375])
    torch.testing.assert_close(averaged.state_dict()["module.weight"][0], expected)


def test_a_model_of_another_precision() -> None:
    model = _model().double()
    averaged = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.9)).float()
    function = theirs.get_ema_multi_avg_fn(0.9)
    right = theirs.AveragedModel(deepcopy(model).float(), multi_avg_fn=function)
    for step in range(3):
        with torch.no_grad():
            for i, param in enumerate(model.parameters()):
                param.add_(numbers(param.shape, torch.float64, 10 * step + i))
        averaged.update_parameters(model)
        right.update_parameters(deepcopy(model).float())
    _assert_equal(averaged, right)


def test_tied_parameters_are_averaged_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    averaged = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.5))
    assert averaged.module[0].weight is averaged.module[1].weight
    expected = None
    for step in range(3):
        with torch.no_grad():
            model[0].weight.fill_(float(step))
        averaged.update_parameters(model)
        expected = float(step) if expected is None else (expected + step) / 2
    assert torch.equal(averaged.module[1].weight, torch.full((3, 3), expected))


@pytest.mark.parametrize("function", ["ema multi", "swa multi", "ema", "swa"])
def test_buffers_that_overlap_are_averaged_once(function: str) -> None:
    """Torch averages the shared elements twice."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = torch.zeros(8)
            self.register_buffer("whole", flat)
            self.register_buffer("part", flat[2:6].view(2, 2))

    model, plain = Views(), nn.ParameterList([nn.Parameter(torch.zeros(8))])
    averaged = ours.AveragedModel(model, use_buffers=True, **FUNCTIONS[function](ours))
    right = theirs.AveragedModel(plain, **FUNCTIONS[function](theirs))
    for step in range(4):
        with torch.no_grad():
            model.whole.copy_(numbers((8,), torch.float32, step))
            plain[0].copy_(model.whole)
        averaged.update_parameters(model)
        right.update_parameters(plain)
    assert torch.equal(averaged.module.whole, right.module[0])
    assert torch.equal(averaged.module.part.flatten(), right.module[0][2:6])


@pytest.mark.tiny
def test_another_model_is_refused_before_anything_changes() -> None:
    model = _model()
    averaged = ours.AveragedModel(model)
    before = deepcopy(averaged.state_dict())
    for other in (nn.Linear(4, 6), nn.Sequential(*list(model)[:-1], nn.Linear(6, 3))):
        with pytest.raises(ValueError, match=r"^AveragedModel: the model has \d parameters, and"):
            averaged.update_parameters(other)
    model[1] = nn.BatchNorm1d(6, track_running_stats=False)
    with pytest.raises(ValueError, match="the model has 0 buffers, and the copy of it 3"):
        averaged.update_parameters(model)
    for name, value in averaged.state_dict().items():
        assert torch.equal(value, before[name]), name


class Watched(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the looks at a number that would wait for a device."""

    looks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.looks += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_an_update_does_not_look_at_the_count() -> None:
    model = _model()
    averaged = ours.AveragedModel(model, multi_avg_fn=ours.get_ema_multi_avg_fn(0.9))
    right = theirs.AveragedModel(model, multi_avg_fn=theirs.get_ema_multi_avg_fn(0.9))
    for number, expected in enumerate((1, 0, 0)):
        with Watched() as watched:
            averaged.update_parameters(model)
        assert watched.looks == expected, number
    averaged.load_state_dict(right.state_dict())
    with Watched() as watched:
        averaged.update_parameters(model)
    assert watched.looks == 1
    assert averaged.n_averaged == 1


def test_a_copy_goes_on_alone() -> None:
    model = _model().bfloat16()
    averaged = ours.AveragedModel(model, multi_avg_fn=ours.get_swa_multi_avg_fn())
    for step in range(4):
        with torch.no_grad():
            model[0].weight.mul_(1.01)
        if step == 2:
            other = deepcopy(averaged)
        for one in (averaged,) if step < 2 else (averaged, other):
            one.update_parameters(model)
    _assert_equal(averaged, other)


# update_bn


class Fails:
    """A loader that breaks after a batch."""

    def __iter__(self) -> Iterator[Tensor]:
        yield numbers((8, 4), torch.float32, 1)
        raise OSError("the disk is gone")


LOADERS: dict[str, Callable[[], Any]] = {
    "tensors": lambda: [numbers((8, 4), torch.float32, i, scale=1 + i) for i in range(3)],
    "tuples": lambda: [(numbers((8, 4), torch.float32, i), torch.zeros(8)) for i in range(3)],
    "lists": lambda: iter([[numbers((5 + i, 4), torch.float32, i)] for i in range(3)]),
    "loader": lambda: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(numbers((20, 4), torch.float32, 3), torch.zeros(20)), 8
    ),
}


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("loader", LOADERS)
def test_statistics_are_torchs(loader: str, mode: bool, device: Any) -> None:
    models = [_model().train(mode) for _ in range(2)]
    for package, model in zip((ours, theirs), models, strict=True):
        model[1].running_mean.fill_(5.0)
        package.update_bn(LOADERS[loader](), model, device)
    _assert_equal(*models)
    for model in models:
        assert model.training is model[1].training is mode
        assert model[1].momentum == 0.1


@pytest.mark.parametrize("dtype", **named((torch.bfloat16, torch.float16)))
def test_statistics_in_half_precision_go_on_moving(dtype: torch.dtype) -> None:
    """The oracle: the same in float32, from the same numbers. Torch's stop after some batches."""
    exact = nn.Sequential(layer := nn.BatchNorm1d(4, affine=False), layer)
    exact.add_module("idle", nn.BatchNorm1d(4))
    model = deepcopy(exact).to(dtype)
    for each in (exact, model):
        each.forward = lambda x, each=each: each[0](x) + each[1](x + 1)  # type: ignore[assignment]
    batches = [
        numbers((8, 4), torch.float32, i, scale=0.5).to(dtype) + (3 if i < 100 else 4)
        for i in range(400)
    ]
    ours.update_bn(batches, model)
    ours.update_bn([batch.float() for batch in batches], exact)
    eps = torch.finfo(dtype).eps
    for name, right in exact.state_dict().items():
        found = model.state_dict()[name]
        assert found.dtype is (torch.int64 if "num" in name else dtype), name
        # each batch's are rounded once, and the average at the end
        torch.testing.assert_close(found.to(right.dtype), right, rtol=2 * eps, atol=0, msg=name)
    assert model[0].num_batches_tracked == 800


def test_statistics_of_an_averaged_model() -> None:
    averaged = [package.AveragedModel(_model()) for package in (ours, theirs)]
    for package, model in zip((ours, theirs), averaged, strict=True):
        package.update_bn(LOADERS["tensors"](), model)
    _assert_equal(*averaged)


def test_a_model_without_such_layers_sees_no_data() -> None:
    ours.update_bn(Fails(), nn.Linear(4, 2))


def _modes(model: nn.Module) -> list[tuple[bool, float | None]]:
    return [(module.training, getattr(module, "momentum", None)) for module in model.modules()]


@pytest.mark.parametrize("loader", [*LOADERS, "fails", "empty", "unfit"])
def test_modes_and_momenta_are_put_back(loader: str) -> None:
    """Torch puts all modules into the mode of the model, and nothing back after an error."""
    bad: dict[str, tuple[Any, Any]] = {
        "fails": (Fails(), pytest.raises(OSError, match="the disk is gone")),
        "empty": (iter(()), pytest.raises(ValueError, match=r"^update_bn: the loader gave no")),
        "unfit": ([torch.zeros(8, 3)], pytest.raises(RuntimeError, match="shapes")),
    }
    model = _model()
    model.train()
    model[1].eval()
    model[1].momentum = 0.3
    model.add_module("frozen", nn.Dropout().eval())
    before, statistics = _modes(model), deepcopy(model[1].state_dict())
    if loader in bad:
        batches, refused = bad[loader]
        with refused:
            ours.update_bn(batches, model)
        for name, value in model[1].state_dict().items():
            assert torch.equal(value, statistics[name]), name
    else:
        ours.update_bn(LOADERS[loader](), model)
        assert model[1].num_batches_tracked == 3
    assert _modes(model) == before
