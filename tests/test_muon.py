"""Does Muon do what torch's does, to all matrices of one shape at once, and more than matrices?

Tolerances. In bfloat16 one rounding is 2^-9 of a number, and the iteration multiplies the error of
a small singular value by up to a = 3.4 per step; what products round depends on the order of their
sums, which a batch may change. So two runs may differ by some percent of a step, taken over all
elements; most often, they are equal. In float32 the same argument gives 1e-5.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stepwell.optimizers import muon
from stepwell.optimizers.muon import Muon

from .processes import in_processes
from .shell_cases import assert_same, fill_grads, refused, snapshot, train, weights

IN_BFLOAT16, IN_FLOAT32 = 0.02, 1e-5

# square, wide, tall, with one row, with one column, and two that share a shape
SHAPES = ((8, 8), (6, 11), (11, 6), (1, 5), (5, 1), (6, 11))
EXACT = {"ns_dtype": "float32"}
AS_TORCH = {"ns_dtype": "bfloat16"}

FLAGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "without nesterov": {"nesterov": False},
    "without momentum": {"momentum": 0.0},
    "little momentum": {"momentum": 0.3},
    "much decay": {"weight_decay": 5.0},
    "without decay": {"weight_decay": 0.0},
    "original": {"adjust_lr_fn": "original"},
    "match_rms_adamw": {"adjust_lr_fn": "match_rms_adamw"},
    "2 iterations": {"ns_steps": 2},
    "no iteration": {"ns_steps": 0},
    "other coefficients": {"ns_coefficients": (2.0, -1.5, 0.5)},
    "large eps": {"eps": 20.0},
    "a tensor for a rate": {"lr": torch.tensor(0.02)},
}
each_flag = pytest.mark.parametrize("flags", FLAGS.values(), ids=[*FLAGS])


def changes(optimizer: Any, before: list[Tensor]) -> list[Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [(new.detach() - old).double() for new, old in zip(params, before, strict=True)]


def after(make: Any, params: list[Any], steps: int = 1) -> list[Tensor]:
    """How far so many steps take the parameters."""
    before = [param.detach().clone() for param in params]
    optimizer = make(params)
    train(optimizer, steps)
    return changes(optimizer, before)


def assert_near(found: list[Tensor], expected: list[Tensor], limit: float) -> None:
    """The same to this share of what was expected, over all elements of a tensor."""
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == other.shape
        size, error = float(other.norm()), float((one - other).norm())
        assert error <= limit * size, f"{index}: off by {error / size:.2g}, allowed {limit:g}"


def polar(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left @ right


def by_singular_values(
    matrix: Tensor,
    coefficients: tuple[float, ...] = (3.4445, -4.7750, 2.0315),
    steps: int = 5,
    eps: float = 1e-7,
) -> Tensor:
    """What the iteration gives, from its effect on each singular value; no product in it."""
    a, b, c = coefficients
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / max(float(matrix.double().norm()), eps)
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return left @ values.diag() @ right


def step_by_hand(params: list[Any], buffers: list[Tensor], flags: dict[str, Any]) -> None:
    """The paper's step, in float64."""
    settings = {k: p.default for k, p in inspect.signature(torch.optim.Muon).parameters.items()}
    settings |= {"lr": 0.02, **flags}
    lr, mu = float(settings["lr"]), settings["momentum"]
    for param, buffer in zip(params, buffers, strict=True):
        grad = param.grad.double()
        buffer.mul_(mu).add_(grad, alpha=1 - mu)
        direction = mu * buffer + (1 - mu) * grad if settings["nesterov"] else buffer
        if param.grad.norm() > 0:
            direction = by_singular_values(
                direction, settings["ns_coefficients"], settings["ns_steps"], settings["eps"]
            )
        rows, columns = param.shape
        scale = math.sqrt(max(1, rows / columns))
        if settings["adjust_lr_fn"] == "match_rms_adamw":
            scale = 0.2 * math.sqrt(max(rows, columns))
        with torch.no_grad():
            param.mul_(1 - lr * settings["weight_decay"]).sub_(lr * scale * direction)


# Numbers


@each_flag
def test_numbers_are_those_of_torch(flags: dict[str, Any]) -> None:
    flags = {"lr": 0.02, **flags}
    found = after(lambda p: Muon(p, **flags, **AS_TORCH), weights(SHAPES), 5)
    expected = after(lambda p: torch.optim.Muon(p, **flags), weights(SHAPES), 5)
    assert_near(found, expected, IN_BFLOAT16)


@each_flag
def test_numbers_in_float32_are_those_of_the_singular_values(flags: dict[str, Any]) -> None:
    params, exact = weights(SHAPES), [w.double() for w in weights(SHAPES)]
    before, buffers = [w.detach().clone() for w in exact], [torch.zeros_like(w) for w in exact]
    optimizer = Muon(params, **{"lr": 0.02, **flags, **EXACT})
    for step in range(5):
        fill_grads(params, step)
        twins = [nn.Parameter(w) for w in exact]
        for param, twin in zip(params, twins, strict=True):
            twin.grad = param.grad.double()
        optimizer.step()
        step_by_hand(twins, buffers, flags)
        exact = [twin.detach() for twin in twins]
    found = changes(optimizer, [w.float() for w in before])
    expected = [new - old for new, old in zip(exact, before, strict=True)]
    # 5 steps of 5 iterations
    assert_near(found, expected, 5 * IN_FLOAT32)
    kept = [optimizer.state[param]["momentum_buffer"].double() for param in params]
    assert_near(kept, buffers, IN_FLOAT32)


@pytest.mark.tiny
@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_orthogonal(shape: tuple[int, int], dtype: str) -> None:
    (param,) = params = weights((shape,))
    fill_grads(params, 1)
    left, _, right = torch.linalg.svd(param.grad, full_matrices=False)
    # over the norm of all, these begin at 0.02 or so
    param.grad = left @ torch.linspace(0.05, 1.0, min(shape)).diag() @ right
    before = param.detach().clone()
    Muon(params, lr=1.0, weight_decay=0.0, momentum=0.0, ns_dtype=dtype).step()
    moved = (before - param.detach()).double() / math.sqrt(max(1, shape[0] / shape[1]))
    values = torch.linalg.svdvals(moved)
    # the iteration takes all numbers from 0.01 to 1 to between 0.6818 and 1.1344
    slack = 1e-4 if dtype == "float32" else IN_BFLOAT16
    assert 0.6818 - slack < float(values.min()) < float(values.max()) < 1.1344 + slack
    # they are those of the gradient's polar factor, each times its own number
    along = polar(param.grad).mT @ moved
    crossing = (along - along.mT).norm() / along.norm()
    assert float(crossing) < (IN_FLOAT32 if dtype == "float32" else IN_BFLOAT16)


def test_coefficients_that_converge_end_at_the_polar_factor() -> None:
    (param,) = params = weights(((9, 13),))
    fill_grads(params, 1)
    before = param.detach().clone()
    settings = {"ns_coefficients": (1.875, -1.25, 0.375), "ns_steps": 25}
    Muon(params, lr=1.0, weight_decay=0.0, momentum=0.0, **settings, **EXACT).step()
    torch.testing.assert_close(
        before - param.detach(), polar(param.grad).float(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    ours, theirs = (weights(SHAPES, dtype=dtype) for _ in range(2))
    found = after(lambda p: Muon(p, lr=0.1, **AS_TORCH), ours, 3)
    expected = after(lambda p: torch.optim.Muon(p, lr=0.1), theirs, 3)
    # a parameter in half precision is rounded at every step
    assert_near(found, expected, 2 * IN_BFLOAT16)
    optimizer = Muon(weights(SHAPES, dtype=dtype))
    train(optimizer)
    for param, state in optimizer.state.items():
        assert state.keys() == {"momentum_buffer"}
        assert (state["momentum_buffer"].dtype, param.dtype) == (dtype, dtype)


def test_what_a_device_iterates_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_features(**features: bool) -> torch.dtype:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
        muon._fastest_dtype.cache_clear()
        return muon._fastest_dtype(torch.device("cpu"))

    assert with_features(avx512_bf16=True) is torch.bfloat16
    assert with_features(bf16=True) is torch.bfloat16
    assert with_features(avx2=True, avx512_bf16=False) is torch.float32
    assert muon._fastest_dtype(torch.device("cuda")) is torch.bfloat16
    assert with_features() is torch.float32
    found = after(Muon, weights(SHAPES))
    muon._fastest_dtype.cache_clear()
    assert_near(found, after(lambda p: Muon(p, **EXACT), weights(SHAPES)), 0.0)


# Batches


class Calls(TorchDispatchMode):
    """Counts the products, and the matrices in them."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.products.append(args[0].shape)
        assert func.overloadpacket not in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **kwargs or {})


def products(optimizer: Any) -> list[torch.Size]:
    fill_grads([param for group in optimizer.param_groups for param in group["params"]], 0)
    with Calls() as calls:
        optimizer.step()
    return calls.products


def test_matrices_of_one_shape_are_multiplied_at_once() -> None:
    params = weights(((4, 6),) * 20 + ((6, 4),) * 3)
    groups = [{"params": params[:9], "lr": 0.1}, {"params": params[9:], "momentum": 0.5}]
    found = Counter(shape[0] for shape in products(Muon(groups)))
    assert found == {20: 3 * 5, 3: 3 * 5}
    # but not with another iteration
    groups = [{"params": weights(((4, 6),) * 2)}, {"params": weights(((4, 6),)), "ns_steps": 1}]
    assert Counter(shape[0] for shape in products(Muon(groups))) == {2: 3 * 5, 1: 3}


@pytest.mark.parametrize("most", [1, 70, 1000])
def test_the_size_of_a_batch_is_bounded(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((5, 7),) * 6 + ((9, 8),)
    expected = after(lambda p: Muon(p, **EXACT), weights(shapes), 3)
    experts = after(lambda p: Muon(p, batch_dims=1, **EXACT), weights(((6, 5, 7),)), 3)
    monkeypatch.setattr(muon, "MOST_ON_CPU", most)
    assert_near(after(lambda p: Muon(p, **EXACT), weights(shapes), 3), expected, IN_FLOAT32)
    for optimizer in (Muon(weights(shapes)), Muon(weights(((6, 5, 7),)), batch_dims=1)):
        counts = [shape[0] for shape in products(optimizer)]
        fit = min(6, max(1, most // (5 * 7)))
        assert counts.count(fit) >= 3 * 5 * 6 // fit
        assert max(counts) == fit
    found = after(lambda p: Muon(p, batch_dims=1, **EXACT), weights(((6, 5, 7),)), 3)
    assert_near(found, experts, IN_FLOAT32)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", IN_FLOAT32), ("bfloat16", IN_BFLOAT16)])
def test_all_at_once_is_one_by_one(dtype: str, limit: float) -> None:
    shapes = ((32, 48),) * 7 + ((48, 32),) * 3 + ((17, 17),) * 2
    params = weights(shapes)
    fill_grads(params, 0)
    twins = copy.deepcopy(params)
    for param, twin in zip(params, twins, strict=True):
        twin.grad = param.grad.clone()
    before = [param.detach().clone() for param in params]
    together = Muon(params, ns_dtype=dtype)
    together.step()
    apart = [Muon([twin], ns_dtype=dtype) for twin in twins]
    for optimizer in apart:
        optimizer.step()
    expected = [changes(o, [old])[0] for o, old in zip(apart, before, strict=True)]
    assert_near(changes(together, before), expected, limit)


def test_groups_keep_their_own_hyperparameters_in_one_batch() -> None:
    own: list[dict[str, Any]] = [
        {"lr": 0.1},
        {"momentum": 0.2, "weight_decay": 3.0},
        {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
        {"lr": 0.3},
    ]

    def make(optimizer: Any, **more: Any) -> Any:
        def made(params: list[Any]) -> Any:
            pairs = zip(own, (params[i::4] for i in range(4)), strict=True)
            return optimizer([{"params": members, **flags} for flags, members in pairs], **more)

        return made

    # in the order of the groups
    ours, theirs = weights(((6, 9),) * 8), weights(((6, 9),) * 8)
    orders = [[params[i + j] for i in range(4) for j in (0, 4)] for params in (ours, theirs)]
    before = [param.detach().clone() for param in orders[0]]
    one, other = make(Muon, **AS_TORCH)(ours), make(torch.optim.Muon)(theirs)
    for optimizer in (one, other):
        train(optimizer, 3)
    assert_near(changes(one, before), changes(other, before), IN_BFLOAT16)


# More than matrices


def moved_as(shape: tuple[int, ...], seen: tuple[int, ...], **flags: Any) -> None:
    """A parameter of one shape moves as matrices of another one do."""
    (param,) = weights((shape,))
    twins = [nn.Parameter(part.clone()) for part in param.detach().reshape(seen)]
    before = param.detach().clone()
    ours, theirs = Muon([param], **flags, **EXACT), Muon(twins, **EXACT)
    for step in range(3):
        fill_grads([param], step)
        for twin, grad in zip(twins, param.grad.reshape(seen), strict=True):
            twin.grad = grad.clone()
        ours.step()
        theirs.step()
    expected = torch.stack([twin.detach() for twin in twins]).reshape(shape)
    assert_near([(param.detach() - before).double()], [(expected - before).double()], IN_FLOAT32)
    assert ours.state[param]["momentum_buffer"].shape == shape


@pytest.mark.tiny
def test_convolutions_are_matrices_of_out_channels_and_the_rest() -> None:
    moved_as((6, 3, 2, 2), (1, 6, 12))
    moved_as((14, 3, 2, 2), (1, 14, 12))
    moved_as((6, 3, 2), (1, 6, 6))
    moved_as((4, 2, 3, 1, 2), (1, 4, 12))


@pytest.mark.tiny
def test_leading_dimensions_may_number_matrices() -> None:
    moved_as((5, 4, 7), (5, 4, 7), batch_dims=1)
    moved_as((5, 7, 4), (5, 7, 4), batch_dims=1)
    moved_as((2, 3, 4, 7), (6, 4, 7), batch_dims=2)
    moved_as((3, 4, 2, 3, 3), (3, 4, 18), batch_dims=1)


def test_groups_of_convolutions_and_experts() -> None:
    first, second = weights(((4, 3, 5), (4, 3, 5)))
    optimizer = Muon([{"params": [first]}, {"params": [second], "batch_dims": 1}])
    shapes = {tuple(shape) for shape in products(optimizer)}
    assert {(1, 4, 15), (4, 3, 5)} <= shapes
    assert [group["batch_dims"] for group in optimizer.param_groups] == [0, 1]


@pytest.mark.parametrize("which", ["transposed", "channels last", "with gaps"])
def test_parameters_that_are_not_contiguous(which: str) -> None:
    (plain,) = weights(((6, 4, 2, 2),) if which == "channels last" else ((6, 4),))
    base = plain.detach().clone()
    if which == "transposed":
        odd = base.mT.contiguous().mT
    elif which == "channels last":
        odd = base.to(memory_format=torch.channels_last)
    else:
        odd = torch.zeros(6, 8)[:, ::2].copy_(base)
    assert not odd.is_contiguous()
    odd = odd.requires_grad_()
    one, other = Muon([odd], **EXACT), Muon([plain], **EXACT)
    for step in range(3):
        fill_grads([plain], step)
        # one gradient in the parameter's layout, one in the usual one, one expanded
        odd.grad = torch.empty_like(odd).copy_(plain.grad) if step else plain.grad.clone()
        if step == 2:
            odd.grad = plain.grad[:1].clone().expand(odd.shape)
            plain.grad = odd.grad.clone()
        one.step()
        other.step()
    torch.testing.assert_close(odd.detach(), plain.detach(), atol=1e-6, rtol=1e-5)


# State dicts and copies


def test_state_goes_to_torch_and_back() -> None:
    ours, theirs = weights(SHAPES), weights(SHAPES)
    one, other = Muon(ours, lr=0.1, **AS_TORCH), torch.optim.Muon(theirs, lr=0.1, momentum=0.5)
    train(one, 2)
    train(other, 3, seed=5)

    for source, params, target in ((one, ours, torch.optim.Muon), (other, theirs, Muon)):
        copies = [nn.Parameter(param.detach().clone()) for param in params]
        more = AS_TORCH if target is Muon else {}
        loaded = target(copies, lr=1.0, **more)
        loaded.load_state_dict(copy.deepcopy(source.state_dict()))
        group, saved = loaded.param_groups[0], source.param_groups[0]
        assert all(group[key] == saved[key] for key in other.param_groups[0] if key != "params")
        before = [param.detach().clone() for param in params]
        train(loaded, 3, seed=9)
        train(source, 3, seed=9)
        assert_near(changes(loaded, before), changes(source, before), IN_BFLOAT16)


def test_state_dict_is_that_of_torch() -> None:
    one, other = Muon(weights(SHAPES)), torch.optim.Muon(weights(SHAPES))
    for optimizer in (one, other):
        train(optimizer)
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        found = ours["state"][key]
        assert found.keys() == state.keys()
        # the same two roundings per step
        torch.testing.assert_close(found["momentum_buffer"], state["momentum_buffer"])
    extra = ours["param_groups"][0].keys() - theirs["param_groups"][0].keys()
    # torch.distributed.checkpoint would look for them in what torch has saved
    assert not extra


def pickled(optimizer: Any) -> Any:
    stream = io.BytesIO(pickle.dumps(optimizer))
    return pickle.load(stream)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_go_on_alike(copied: Any) -> None:
    optimizer = Muon(weights(SHAPES), lr=0.1, batch_dims=0)
    train(optimizer, 2)
    twin = copied(optimizer)
    train(optimizer, 2, seed=3)
    train(twin, 2, seed=3)
    assert_same(twin.state_dict(), optimizer.state_dict())
    pairs = zip(twin.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True)
    for one, other in pairs:
        assert torch.equal(one, other)


def test_signature_begins_with_that_of_torch() -> None:
    ours = [*inspect.signature(Muon).parameters.values()]
    theirs = [*inspect.signature(torch.optim.Muon).parameters.values()]
    count = len(theirs)
    assert [(p.name, p.kind, p.default) for p in ours[:count]] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    assert [(p.name, p.kind) for p in ours[count:]] == [
        ("batch_dims", inspect.Parameter.KEYWORD_ONLY),
        ("ns_dtype", inspect.Parameter.KEYWORD_ONLY),
    ]


# Refusals


def matrix(*shape: int, **kind: Any) -> Any:
    return nn.Parameter(torch.ones(shape or (2, 3), **kind))


BAD_VALUES = {
    "lr": -1.0,
    "momentum": -0.5,
    "weight_decay": -2.0,
    "adjust_lr_fn": "foo",
}
MORE_BAD_VALUES = [
    ("lr", math.nan),
    ("momentum", math.inf),
    ("weight_decay", "1"),
    ("nesterov", 2),
    ("ns_coefficients", (1.0, 2.0)),
    ("ns_coefficients", (1.0, math.nan, 2.0)),
    ("eps", -1e-7),
    ("ns_steps", -1),
    ("ns_steps", 2.5),
    ("batch_dims", -1),
    ("batch_dims", 0.5),
    ("ns_dtype", "float16"),
    ("ns_dtype", torch.float32),
]


@pytest.mark.parametrize("name", BAD_VALUES)
def test_words_of_torch(name: str) -> None:
    value = BAD_VALUES[name]
    expected = refused(lambda: torch.optim.Muon([matrix()], **{name: value}))
    found = refused(lambda: Muon([matrix()], **{name: value}))
    assert type(found) is type(expected)
    # the shell puts quotes around strings
    assert str(found).replace("'foo'", "foo").startswith(f"{expected} (Muon: {name} must be ")


def test_words_of_torch_for_too_many_iterations() -> None:
    theirs = torch.optim.Muon(weights(((2, 3),)), ns_steps=100)
    expected = refused(lambda: train(theirs))
    found = refused(lambda: Muon([matrix()], ns_steps=100))
    assert type(found) is type(expected)
    assert str(found).startswith(f"{expected}, got 100 (Muon: ns_steps must be a whole number in ")


@pytest.mark.parametrize(("name", "value"), MORE_BAD_VALUES)
def test_values_that_are_refused(name: str, value: Any) -> None:
    assert f"{name} must be" in str(refused(lambda: Muon([matrix()], **{name: value})))
    optimizer = Muon([matrix()])
    before = snapshot(optimizer)
    group = {"params": [matrix()], name: value}
    assert "group 1" in str(refused(lambda: optimizer.add_param_group(group)))
    assert "group 0" in str(refused(lambda: optimizer.param_groups[0].update({name: value})))
    assert_same(snapshot(optimizer), before)


@pytest.mark.tiny
@pytest.mark.parametrize("shape", [(), (3,), (0,)])
def test_what_is_no_matrix_is_refused_at_the_door(shape: tuple[int, ...]) -> None:
    param = nn.Parameter(torch.ones(shape))
    expected = refused(lambda: torch.optim.Muon([matrix(), param]))
    found = refused(lambda: Muon([matrix(), param]))
    assert type(found) is type(expected) is ValueError
    assert str(found).startswith(f"{expected}; parameter 1 must have at least 2 dimensions")
    assert "stepwell.groups.muon_split(model)" in str(found)
    optimizer = Muon([("a", matrix())])
    before = snapshot(optimizer)
    found = refused(lambda: optimizer.add_param_group({"params": [("b", param)]}))
    assert str(found).startswith(f"{expected}; parameter 'b' must have")
    assert str(found).endswith("(Muon, group 1)")
    assert_same(snapshot(optimizer), before)


def test_batches_need_more_dimensions() -> None:
    found = refused(lambda: Muon([{"params": [matrix(2, 3)], "batch_dims": 1}]))
    assert "size: torch.Size([2, 3]); parameter 0 must have at least 3 dimensions" in str(found)
    # also where a state dict asks for it
    optimizer = Muon([matrix(2, 3)])
    before = snapshot(optimizer)
    saved = Muon([matrix(2, 3, 4)], batch_dims=1).state_dict()
    assert "at least 3 dimensions" in str(refused(lambda: optimizer.load_state_dict(saved)))
    assert_same(snapshot(optimizer), before)


def test_complex_parameters_are_refused_in_the_words_of_torch() -> None:
    param = matrix(dtype=torch.complex64)
    theirs = torch.optim.Muon([param])
    param.grad = torch.ones_like(param)
    expected = refused(theirs.step)
    optimizer = Muon([matrix()])
    doors = (lambda: Muon([param]), lambda: optimizer.add_param_group({"params": [param]}))
    for door in doors:
        found = refused(door)
        assert type(found) is type(expected)
        assert str(found).startswith(f"{expected} (Muon, parameter 0 is torch.complex64")
    assert len(optimizer.param_groups) == 1


def _spoil(param: Any, optimizer: Any, what: str) -> None:
    state, param.grad = optimizer.state[param], torch.ones_like(param)
    if what == "a sparse gradient":
        param.grad = param.grad.to_sparse()
    elif what == "a gradient of another shape":
        param.data = state["momentum_buffer"] = torch.ones(3, 3)
    elif what == "no matrix":
        optimizer.param_groups[0]["params"].append(matrix(3))
    elif what == "batches of no matrix":
        optimizer.param_groups[0]["batch_dims"] = 1
    elif what == "a buffer of another shape":
        state["momentum_buffer"] = torch.zeros(3)
    elif what == "a buffer of whole numbers":
        state["momentum_buffer"] = torch.zeros(2, 3, dtype=torch.int64)
    elif what == "no state":
        optimizer.state[param] = 7
    elif what == "an expanded parameter":
        param.data = torch.ones(1, 3).expand(2, 3)


SPOILT = {
    "a sparse gradient": "Muon does not support sparse gradients",
    "a gradient of another shape": "has shape (2, 3), its parameter (3, 3)",
    "no matrix": "Muon only supports 2D parameters whereas we found a parameter with size: ",
    "batches of no matrix": "must have at least 3 dimensions with batch_dims=1",
    "a buffer of another shape": "has shape (3,), expected (2, 3)",
    "a buffer of whole numbers": "is torch.int64; it must be a tensor of such numbers",
    "no state": "must be a dict, got int",
    "an expanded parameter": "is expanded",
}


@pytest.mark.parametrize("what", SPOILT)
def test_nothing_is_half_done(what: str) -> None:
    params = [matrix(4, 4), matrix(2, 3), matrix(2, 3)]
    optimizer = Muon(params)
    train(optimizer, 2)
    fill_grads(params, 7)
    _spoil(params[2], optimizer, what)
    before = snapshot(optimizer)
    assert SPOILT[what] in str(refused(optimizer.step))
    assert_same(snapshot(optimizer), before)


def test_nothing_is_half_done_in_a_first_step() -> None:
    params = [matrix(4, 4), matrix(2, 3)]
    optimizer = Muon(params)
    fill_grads(params[:1], 7)
    params[1].grad = torch.ones(2, 3).to_sparse()
    assert "sparse" in str(refused(optimizer.step))
    assert torch.equal(params[0].detach(), torch.ones(4, 4))
    assert not any(optimizer.state.values())


# Hostile input


@pytest.mark.parametrize("eps", [1e-7, 0.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_gradients_change_nothing_but_decay(eps: float, dtype: str) -> None:
    params = weights(((4, 6), (4, 6), (6, 4)))
    fill_grads(params, 0)
    params[0].grad.zero_()
    params[2].grad.zero_()
    before = [param.detach().clone() for param in params]
    Muon(params, lr=0.1, weight_decay=0.5, eps=eps, ns_dtype=dtype).step()
    for param, old, zero in zip(params, before, (True, False, True), strict=True):
        assert torch.equal(param.detach(), old * 0.95) is zero
        assert bool(param.isfinite().all())
    zeros = [nn.Parameter(torch.zeros(3, 5))]
    zeros[0].grad = torch.zeros(3, 5)
    Muon(zeros, eps=eps, ns_dtype=dtype).step()
    assert not zeros[0].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_finite_stays_in_its_matrix(bad: float, dtype: str) -> None:
    params, clean = weights(((4, 6),) * 3), weights(((4, 6),) * 3)
    experts = weights(((3, 4, 6),))
    one = Muon([{"params": params}, {"params": experts, "batch_dims": 1}], ns_dtype=dtype)
    other = Muon(clean, ns_dtype=dtype)
    for step in range(2):
        fill_grads([*params, *experts], step)
        fill_grads(clean, step)
        params[1].grad[2, 3] = bad
        experts[0].grad[1, 0, 0] = bad
        one.step()
        other.step()
    for index in (0, 2):
        difference = (params[index] - clean[index]).detach()
        assert float(difference.abs().max()) < 1e-4
        assert bool(experts[0][index].isfinite().all())
    assert bool(params[1].isnan().all())
    assert bool(experts[0][1].isnan().all())


def test_empty_matrices_are_left_alone() -> None:
    shapes = ((0, 4), (4, 0), (0, 0), (3, 4))
    params = weights(shapes)
    expected = after(lambda p: Muon(p, **EXACT), weights(shapes)[3:])
    before = params[3].detach().clone()
    optimizer = Muon(
        [{"params": params}, {"params": weights(((0, 3, 4),)), "batch_dims": 1}], **EXACT
    )
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    fill_grads(params[3:], 0)
    optimizer.step()
    assert_near([(params[3].detach() - before).double()], expected, IN_FLOAT32)
    assert [tuple(param.shape) for param in params] == list(shapes)
    Muon(weights(((0, 4),))).step()


def test_missing_gradients_are_skipped() -> None:
    params = weights(((4, 4),) * 3)
    fill_grads(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer = Muon(params, weight_decay=1.0)
    optimizer.step()
    assert torch.equal(params[1].detach(), before)
    assert params[1] not in optimizer.state
    assert set(optimizer.state) == {params[0], params[2]}
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(params[1].detach(), before)


def test_huge_and_tiny_gradients_are_those_of_torch() -> None:
    for size in (1e-40, 1e-30, 1e-8, 1e15, 1e37):
        pairs = []
        for make in (lambda p: Muon(p, **AS_TORCH), torch.optim.Muon):
            params = weights(((5, 8),))
            fill_grads(params, 0)
            params[0].grad.mul_(size)
            before = params[0].detach().clone()
            make(params).step()
            pairs.append((params[0].detach() - before).double())
        assert bool(pairs[0].isfinite().all())
        assert_near(pairs[:1], pairs[1:], IN_BFLOAT16)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_listed_twice_is_updated_twice() -> None:
    results = []
    rule: Any
    for rule, more in ((Muon, AS_TORCH), (torch.optim.Muon, {})):
        params = weights(((4, 5), (4, 5)))
        before = [param.detach().clone() for param in params]
        optimizer = rule([*params, params[0]], lr=0.1, momentum=0.5, **more)
        train(optimizer, 3)
        results.append(changes(optimizer, [*before, before[0]]))
    assert_near(*results, IN_BFLOAT16)


def test_gradients_are_left_as_they_are_and_may_have_a_history() -> None:
    params = weights(((4, 5), (5, 4)))
    loss = sum((param**3).sum() for param in params)
    grads = torch.autograd.grad(loss, params, create_graph=True)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    kept = [grad.detach().clone() for grad in grads]
    optimizer = Muon(params)
    optimizer.step()
    for grad, old in zip(grads, kept, strict=True):
        assert torch.equal(grad.detach(), old)
    assert not any(s["momentum_buffer"].requires_grad for s in optimizer.state.values())
    assert all(param.is_leaf and param.requires_grad for param in params)


def test_a_step_in_inference_mode_can_be_followed_by_one_outside() -> None:
    params = weights(((4, 5),))
    optimizer = Muon(params)
    fill_grads(params, 0)
    with torch.inference_mode():
        optimizer.step()
    train(optimizer)
    assert not optimizer.state[params[0]]["momentum_buffer"].is_inference()


def test_rates_may_be_tensors_and_change() -> None:
    rate = torch.tensor(0.1)
    one, other = Muon(weights(SHAPES), lr=rate), Muon(weights(SHAPES), lr=0.1)
    train(one, 1)
    train(other, 1)
    rate.fill_(0.5)
    other.param_groups[0]["lr"] = 0.5
    train(one, 1, seed=1)
    train(other, 1, seed=1)
    for param, twin in zip(*(o.param_groups[0]["params"] for o in (one, other)), strict=True):
        torch.testing.assert_close(param, twin)


@pytest.mark.parametrize("wide", [True, False])
def test_a_buffer_may_have_another_precision_than_its_parameter(wide: bool) -> None:
    dtypes = (torch.bfloat16, torch.float32) if wide else (torch.float32, torch.bfloat16)
    saved = Muon(weights(SHAPES, dtype=dtypes[1]), **EXACT)
    train(saved)
    optimizer = Muon(weights(SHAPES, dtype=dtypes[0]), **EXACT)
    optimizer.load_state_dict(saved.state_dict())
    before = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    train(optimizer, 1)
    for state, old in zip(optimizer.state.values(), before, strict=True):
        assert state["momentum_buffer"].dtype is old.dtype is dtypes[1]
        assert not torch.equal(state["momentum_buffer"], old)


def test_a_closure_is_called_once() -> None:
    (param,) = weights(((3, 4),))
    optimizer = Muon([param])
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) > 0
    assert len(calls) == 1


# Shards


def _shards(mesh: Any, _: Path) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for cut in ([Shard(0)], [Shard(1)], [Replicate()]):
        wholes = weights(((5, 6), (5, 6), (3, 4, 2)))
        shards = [nn.Parameter(distribute_tensor(w.detach(), mesh, cut)) for w in wholes]
        one, other = Muon(wholes, lr=0.1, **EXACT), Muon(shards, lr=0.1, **EXACT)
        for step in range(3):
            fill_grads(wholes, step)
            for whole, shard in zip(wholes, shards, strict=True):
                shard.grad = distribute_tensor(whole.grad, mesh, cut)
            one.step()
            other.step()
        for whole, shard in zip(wholes, shards, strict=True):
            assert list(shard.placements) == cut
            torch.testing.assert_close(shard.full_tensor(), whole.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_shards_are_updated_as_the_whole(tmp_path: Path) -> None:
    in_processes(_shards, tmp_path)
