"""What users do to an optimizer behind its back, and what must not happen then."""

from __future__ import annotations

import collections
import gc
import weakref

import pytest
import torch

import stepwell
from stepwell.backends import cpu
from stepwell.language import (
    ClipNorm,
    NonNegative,
    Real,
    exp,
    mean,
    norm,
    sqrt,
)
from stepwell.plan import Plan

from .cases import NATIVE, REQUESTS

# with TRITON_INTERPRET=1 these go through the kernels for GPUs
pytestmark = pytest.mark.interpret

each_backend = pytest.mark.parametrize("flags", REQUESTS.values(), ids=REQUESTS)


def ones(size=8, grad=1.0):
    param = torch.nn.Parameter(torch.ones(size))
    param.grad = torch.full((size,), grad)
    return param


def backends_of(optimizer):
    return {line.partition(":")[0] for line in optimizer._held[0].describe()}


# Gradients that come and go


@each_backend
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_gradients_come_and_go_without_a_new_plan(name, flags, monkeypatch):
    plans = []
    make = Plan.__init__

    def counted(self, *args, **kwargs):
        plans.append(self)
        make(self, *args, **kwargs)

    monkeypatch.setattr(Plan, "__init__", counted)
    settings = {"momentum": 0.9} if name == "SGD" else {}
    results = []
    for cls, extra in (
        (getattr(stepwell, name), flags),
        (getattr(torch.optim, name), {"foreach": False}),
    ):
        generator = torch.Generator().manual_seed(0)
        # an empty one has no address of its own, and must not be taken for one without gradient
        params = [
            torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (3, 0, 500, 40_000, 1)
        ]
        optimizer = cls(params, lr=0.1, **settings, **extra)
        for step in range(12):
            for param in params:
                grad = torch.randn(param.shape, generator=generator)
                keep = step < 2 or bool(torch.rand((), generator=generator) < 0.5)
                param.grad = grad if keep else None
            versions = [param._version for param in params]
            optimizer.step()
            moved = [p._version > v for p, v in zip(params, versions, strict=True)]
            assert moved == [p.grad is not None for p in params]
        results.append((params, [optimizer.state[p] for p in params]))
    (ours, our_state), (theirs, their_state) = results
    for a, b in zip(ours, theirs, strict=True):
        # twelve steps, each rounded once or twice more in torch's loop
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    if name == "AdamW":
        assert [s["step"] for s in our_state] == [s["step"] for s in their_state]
    # the momentum buffers make a second one
    assert len(plans) == (2 if name == "SGD" else 1)


def test_a_parameter_that_never_had_a_gradient_gets_no_state():
    params = [ones(), ones()]
    params[1].grad = None
    optimizer = stepwell.AdamW(params)
    optimizer.step()
    assert set(optimizer.state) == {params[0]}
    params[1].grad = torch.ones(8)
    optimizer.step()
    assert optimizer.state[params[1]]["step"] == 1


def test_a_total_leaves_out_parameters_without_gradient():
    clipped = stepwell.compose(stepwell.SGD, ClipNorm)
    params = [ones(3), ones(4, grad=2.0)]
    optimizer = clipped(params, lr=1.0, max_norm=1.0)
    optimizer.step()
    params[1].grad = None
    before = params[0].detach().clone()
    optimizer.step()
    moved = (before - params[0]).detach()
    torch.testing.assert_close(moved, torch.full((3,), 3**-0.5), rtol=1e-5, atol=0)


@each_backend
def test_gradients_do_not_outlive_zero_grad(flags):
    for turned in (False, True):
        param = torch.nn.Parameter(torch.ones(4, 3))
        param.grad = torch.ones(3, 4).t() if turned else torch.ones(4, 3)
        optimizer = stepwell.AdamW([param], **flags)
        optimizer.step()
        grad = weakref.ref(param.grad)
        optimizer.zero_grad()
        gc.collect()
        assert grad() is None


# Kernels


def test_nothing_is_compiled_again_for_other_rates_shapes_or_numbers():
    for rule, settings in ((stepwell.AdamW, {}), (stepwell.SGD, {"momentum": 0.9})):
        optimizer = rule([ones()], **settings)
        optimizer.step()
        optimizer.step()
        before = cpu._compiled.cache_info().misses
        for size in (1, 7, 20_000):
            optimizer.add_param_group({"params": [ones(size), ones(size + 1)], "lr": 0.5})
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
                group["weight_decay"] = 0.1 if rule is stepwell.AdamW else 0
                if "betas" in group:
                    group["betas"] = (0.8, 0.95)
            optimizer.step()
            optimizer.step()
        assert cpu._compiled.cache_info().misses == before


# State that somebody has changed


class Wrapped(torch.Tensor):
    pass


def test_state_of_another_type_is_worked_with_where_types_are_understood():
    param = ones()
    optimizer = stepwell.AdamW([param])
    optimizer.step()
    optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].as_subclass(Wrapped)
    optimizer.step()
    assert backends_of(optimizer) == {"eager"}
    twin = ones()
    other = torch.optim.AdamW([twin])
    other.step()
    other.step()
    torch.testing.assert_close(param, twin)


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda s: collections.UserDict(s), TypeError, "must be a dict, got UserDict"),
        (
            lambda s: s | {"exp_avg": torch.ones(3)},
            ValueError,
            r"has shape \(3,\), expected \(8,\)",
        ),
        (lambda s: s | {"exp_avg": torch.ones(8).to_sparse()}, ValueError, "to_dense"),
        (lambda s: s | {"exp_avg": torch.ones(8, dtype=torch.int64)}, ValueError, "is torch.int64"),
        (lambda s: s | {"exp_avg": torch.ones(8) * 1j}, ValueError, "is torch.complex64"),
        (lambda s: s | {"exp_avg": "x"}, ValueError, "is str"),
    ],
)
def test_state_that_cannot_be_used_is_refused_before_the_step(spoil, error, words):
    params = [ones(), ones()]
    optimizer = stepwell.AdamW(params)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    optimizer.state[params[1]] = spoil(optimizer.state[params[1]])
    with pytest.raises(error, match=words):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert optimizer.state[params[0]]["step"] == 1


@each_backend
def test_state_that_was_expanded_gets_memory_of_its_own(flags):
    params = [torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    optimizer = stepwell.Adafactor(params, **{k: v for k, v in flags.items() if k != "capturable"})
    for param in params:
        param.grad = torch.arange(12.0).reshape(3, 4)
    optimizer.step()
    for param in params:
        optimizer.state[param]["row_var"] = torch.full((1, 1), 0.5).expand(3, 1)
    optimizer.step()
    assert torch.equal(*params)
    assert len(optimizer.state[params[1]]["row_var"].unique()) == 3


# Memory that is not what it seems


@each_backend
@pytest.mark.parametrize("imaginary", [False, True])
def test_a_lazy_conjugate_or_negative_parameter(imaginary, flags):
    found = []
    for library, extra in ((stepwell, flags), (torch.optim, {"foreach": False})):
        param = torch.ones(4, dtype=torch.complex64).mul(1 + 2j).conj()
        param = (param.imag if imaginary else param).requires_grad_()
        param.grad = torch.ones_like(param) * (0.5 if imaginary else 0.5 + 1j)
        optimizer = library.SGD([param], lr=0.1, momentum=0.9, **extra)
        optimizer.step()
        optimizer.step()
        found.append(param.detach().resolve_conj().resolve_neg())
    torch.testing.assert_close(*found)


@each_backend
def test_an_expanded_gradient_under_a_scaler(flags):
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.ones(1).expand(4)
    optimizer = stepwell.AdamW([param], lr=0.1, **flags)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    optimizer.step()
    assert param.grad.tolist() == [0.5] * 4
    assert optimizer.state[param]["step"] == 1


def test_an_uncoalesced_gradient_under_a_scaler():
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.sparse_coo_tensor([[1, 1]], [4.0, 4.0], (4,), check_invariants=True)
    optimizer = stepwell.SGD([param], lr=0.5, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    optimizer.step()
    assert param.tolist() == [1.0, 0.0, 1.0, 1.0]
    assert param.grad.to_dense().tolist() == [0.0, 2.0, 0.0, 0.0]


@each_backend
def test_an_expanded_parameter_is_refused_before_anything_is_written(flags):
    params = [ones(4), torch.nn.Parameter(torch.ones(1).expand(4)), ones(4)]
    params[1].grad = torch.ones(4)
    optimizer = stepwell.AdamW(params, lr=0.1, **flags)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        optimizer.step()
    assert all((param == 1).all() for param in params)
    assert not optimizer.state


@each_backend
def test_a_default_device_elsewhere(flags):
    param = ones()
    optimizer = stepwell.AdamW([param], **flags)
    with torch.device("meta"):
        optimizer.step()
        optimizer.step()
    assert param.device.type == "cpu"
    assert torch.isfinite(param).all()


def test_differentiable_steps_of_a_leaf_are_refused_before_the_state_advances():
    param = ones()
    optimizer = stepwell.AdamW([param], differentiable=True)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used"):
        optimizer.step()
    assert not optimizer.state


# Rules of the user's own


class Odd(stepwell.Optimizer):
    lr: NonNegative = 0.1
    k: Real = 0.0

    @staticmethod
    def update(param, grad, state, group):
        step = group.lr / group.k + exp(group.lr * 10_000) + (group.lr - 1) ** 0.5
        return param - step * grad + sqrt(group.k - 1) + group.k**-1.0


def test_numbers_that_are_not_finite_are_the_same_everywhere():
    found = []
    for flags in REQUESTS.values():
        params = [ones(), ones()]
        optimizer = Odd([{"params": params[:1]}, {"params": params[1:], "k": 2.0}], **flags)
        optimizer.step()
        found.append(torch.cat(params).detach())
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, equal_nan=True)


class Nested(stepwell.Optimizer):
    """Totals of totals, across all parameters and across groups, and a norm of each."""

    lr: NonNegative = 0.1

    @staticmethod
    def update(param, grad, state, group):
        scale = norm(grad, across="all")
        grad = grad / scale
        second = mean(abs(grad) * scale + param * param, across="group")
        third = norm(grad * second, across="all") + norm(grad)
        return param - group.lr * grad * third


def test_totals_of_totals():
    found = []
    for flags in ({}, {"foreach": False}):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n)) for n in (5, 20_000, 33_333)]
        for param in params:
            param.grad = torch.randn_like(param)
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.2}]
        optimizer = Nested(groups, **flags)
        optimizer.step()
        optimizer.step()
        found.append(torch.cat(params).detach())
        assert backends_of(optimizer) == ({"eager"} if flags else {NATIVE})
    # two steps of float32; the totals themselves are float64 in both
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def rule_with(update):
    return type("Mine", (stepwell.Optimizer,), {"update": staticmethod(update)})


@pytest.mark.parametrize(
    ("update", "error", "words"),
    [
        (
            lambda p, g, s, h: p - torch.sqrt(g),
            TypeError,
            "Mine.update calls torch.sqrt; .*language",
        ),
        (lambda p, g, s, h: p - g.norm(), AttributeError, "Mine.update: .* has no .norm; use"),
        (lambda p, g, s, h: p - s.exp_avg, AttributeError, "declared are: step"),
        (lambda p, g, s, h: None, TypeError, "must return the new parameter"),
        (lambda p, g, s, h: p if g > 0 else g, TypeError, "use where"),
    ],
)
def test_what_a_formula_cannot_say_is_said_in_its_own_words(update, error, words):
    param = ones()
    optimizer = rule_with(lambda param, grad, state, group: update(param, grad, state, group))(
        [param]
    )
    with pytest.raises(error, match=words):
        optimizer.step()
    assert (param == 1).all()


@pytest.mark.parametrize(
    "parts",
    [
        (ClipNorm, stepwell.AdamW),
        (stepwell.AdamW, stepwell.AdamW),
        (stepwell.AdamW, "x"),
        (torch.optim.AdamW, ClipNorm),
        (stepwell.Optimizer, ClipNorm),
    ],
)
def test_compose_says_what_it_takes(parts):
    with pytest.raises(TypeError, match=r"compose: (rule|transforms) must be"):
        stepwell.compose(*parts)


# Checkpoints


@pytest.mark.parametrize("step", [float("nan"), -1.0, float("inf")])
def test_an_impossible_count_is_not_loaded(step):
    optimizer = stepwell.AdamW([ones()])
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0] = {**saved["state"][0], "step": torch.tensor(step)}
    with pytest.raises(ValueError, match="step must be"):
        stepwell.AdamW([ones()]).load_state_dict(saved)


def test_a_checkpoint_of_another_rule_without_state_is_not_loaded():
    saved = torch.optim.SGD([ones()], lr=0.5).state_dict()
    optimizer = stepwell.Adam([ones()])
    with pytest.raises(ValueError, match=r"betas, eps .*another optimizer"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_a_subclass_may_annotate_what_it_likes():
    class Logged(stepwell.AdamW):
        history: list = []  # noqa: RUF012
        extra: float

    assert Logged([ones()]).history == []


# Values across parameters


@each_backend
def test_a_step_without_any_gradient_asks_for_no_total(flags):
    params = [ones(), ones(3)]
    optimizer = stepwell.compose(stepwell.AdamW, ClipNorm)(params, max_norm=1.0, **flags)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@each_backend
def test_a_norm_of_a_tensor_without_dimensions(flags):
    param = torch.nn.Parameter(torch.tensor(2.0))
    optimizer = stepwell.compose(stepwell.AdamW, ClipNorm)([param], max_norm=1.0, **flags)
    for _ in range(2):
        param.grad = torch.tensor(3.0)
        optimizer.step()
    assert param.dtype is torch.float32
    assert 1.99 < param.item() < 2.0


@each_backend
def test_a_total_of_a_group_does_not_depend_on_other_groups(flags):
    def trained(more):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(5, dtype=torch.float64)) for _ in range(7)]
        for param in params:
            param.grad = torch.randn_like(param)
        others = [ones(4).double() for _ in range(more)]
        others = [torch.nn.Parameter(other.detach()) for other in others]
        for i, other in enumerate(others):
            other.grad = torch.full_like(other, 10.0**i)
        groups = [{"params": params}, *({"params": [other]} for other in others)]

        def update(param, grad, state, group):
            return param - norm(grad, across="group") * grad

        rule_with(update)(groups, **flags).step()
        return torch.cat(params).detach()

    alone = trained(0)
    assert torch.equal(alone, trained(1))
    assert torch.equal(alone, trained(9))


# Devices


def test_a_device_without_native_code_is_refused_where_fused_was_asked_for():
    param = torch.nn.Parameter(torch.ones(3, device="meta"))
    param.grad = torch.ones(3, device="meta")
    made = stepwell.AdamW([param], fused=True)
    words = (
        r"`fused=True` requires all the params to be floating point Tensors of supported devices: "
        r"\['mps', .*'cpu', .*\] but torch.float32 and meta \(AdamW, group 0, parameter 0: leave "
    )
    with pytest.raises(RuntimeError, match=words):
        made.step()
    assert not made.state
    stepwell.AdamW([param]).step()


class Moved(torch.nn.Parameter):
    """A parameter that was left behind by its gradient, as `p.data = p.data.cuda()` does."""

    grad = property(lambda self: torch.ones(self.shape, device="meta"))


def test_a_gradient_on_another_device_is_refused_before_anything_changes():
    near = ones()
    made = stepwell.AdamW([near, Moved(torch.ones(8))])
    words = (
        "Expected all tensors to be on the same device, but found at least two devices, cpu and "
        r"meta! \(AdamW: the second is that of the gradient of group 0, parameter 1; was the "
    )
    with pytest.raises(RuntimeError, match=words):
        made.step()
    assert not made.state
    assert near.tolist() == [1.0] * 8
