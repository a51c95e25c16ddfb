"""Does a state dict carry everything over, to torch and back, and is a wrong one refused?"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor

import stepwell
from stepwell.language import NonNegative, amax, maximum, zeros
from stepwell.optimizer import LoadReport
from stepwell.state_dict import load_group

from .shell_cases import (
    SHAPES,
    SignDescent,
    assert_same,
    each_name,
    each_twin,
    fill_grads,
    named_weights,
    ours,
    refused,
    snapshot,
    train,
    weights,
)

pytestmark = pytest.mark.tiny

WHOLE = LoadReport()


def values(optimizer):
    """The numbers of an optimizer, in the order of its parameters."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    return [p.detach() for p in params], [optimizer.state.get(p, {}) for p in params]


@each_twin
def test_layout_is_torchs(twin):
    a, b = twin.ours(weights()), twin.theirs(weights())
    for optimizer in (a, b):
        train(optimizer)
    found, expected = a.state_dict(), b.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert type(found["param_groups"][0]) is dict
    torch.testing.assert_close(found["state"], expected["state"])
    kinds = {
        key: (type(v), v.dtype, v.device) for s in found["state"].values() for key, v in s.items()
    }
    assert kinds == {
        key: (type(v), v.dtype, v.device)
        for s in expected["state"].values()
        for key, v in s.items()
    }


def test_tensors_are_the_live_ones():
    params = weights()
    optimizer = stepwell.AdamW(params)
    train(optimizer)
    state = optimizer.state_dict()["state"]
    assert all(
        state[i][k] is v for i, p in enumerate(params) for k, v in optimizer.state[p].items()
    )


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_ids_are_torchs():
    a, b, c, d = weights([(1,)] * 4)
    groups = [{"params": [a, b, a]}, {"params": []}, {"params": [c, d]}]
    found, expected = (
        [g["params"] for g in make(copy.copy(groups)).state_dict()["param_groups"]]
        for make in (stepwell.SGD, torch.optim.SGD)
    )
    assert found == expected == [[2, 1, 2], [], [3, 4]]


def test_a_parameter_taken_out_has_no_entry():
    params = weights()
    optimizer = stepwell.AdamW([{"params": [p]} for p in params])
    train(optimizer)
    optimizer.param_groups.pop()
    optimizer.state["note"] = 1
    assert set(optimizer.state_dict()["state"]) == {0, 1, "note"}


@each_twin
@pytest.mark.parametrize("after", [0, 1, 4])
def test_resumed_to_the_bit(twin, after):
    params = weights()
    whole = twin.ours(params)
    train(whole, after)
    saved = copy.deepcopy(whole.state_dict())
    resumed = twin.ours([torch.nn.Parameter(p.detach().clone()) for p in params])
    assert resumed.load_state_dict(saved) == WHOLE
    for optimizer in (whole, resumed):
        train(optimizer, 3, seed=1)
    assert_same(values(resumed), values(whole))


@each_twin
@pytest.mark.parametrize("way", ["from torch", "to torch"])
def test_goes_to_and_from_torch(twin, way):
    params = weights(), weights()
    a, b = twin.ours(params[0]), twin.theirs(params[1])
    source, target = (b, a) if way == "from torch" else (a, b)
    source.param_groups[0]["lr"] = 0.25
    train(source)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(*params, strict=True):
        (p if source is b else q).data.copy_(q if source is b else p)
    for optimizer in (a, b):
        train(optimizer, 3, seed=1)
    torch.testing.assert_close(values(a)[0], values(b)[0])
    torch.testing.assert_close(values(a)[1], values(b)[1])


@each_twin
def test_nothing_is_shared_with_what_was_passed(twin):
    donor = twin.ours(weights(), lr=torch.tensor(0.1))
    train(donor)
    saved = donor.state_dict()
    saved["state"]["other"] = {"x": torch.ones(2), "list": [torch.ones(1)]}
    kept = copy.deepcopy(saved)
    optimizer = twin.ours(weights(seed=1))
    optimizer.load_state_dict(saved)
    train(optimizer, seed=1)
    optimizer.param_groups[0]["lr"].zero_()
    optimizer.state["other"]["x"].zero_()
    optimizer.state["other"]["list"][0].zero_()
    assert_same(saved, kept)


def test_hyperparameters_stay_on_their_device():
    saved = {"lr": torch.tensor(0.1, dtype=torch.float64), "betas": (torch.tensor(0.5), 0.75)}
    elsewhere = torch.tensor(0.2, device="meta")
    held = {"params": [], "lr": elsewhere, "betas": (elsewhere, elsewhere)}
    loaded = load_group(held, {**saved, "params": []})
    assert (loaded["lr"].device, loaded["lr"].dtype) == (elsewhere.device, torch.float64)
    assert (loaded["betas"][0].device, loaded["betas"][1]) == (elsewhere.device, 0.75)
    # what is no tensor yet has no device to stay on
    loaded = load_group({"params": [], "lr": 0.2, "betas": None}, {**saved, "params": []})
    assert loaded["lr"].device.type == "cpu"
    assert torch.equal(loaded["lr"], saved["lr"])
    assert torch.equal(loaded["betas"][0], saved["betas"][0])


def test_what_others_hold_on_to_stays_the_optimizers():
    optimizer = stepwell.AdamW(weights(), lr=0.1)
    group, groups, state = optimizer.param_groups[0], optimizer.param_groups, optimizer.state
    donor = stepwell.AdamW(weights(), lr=0.7)
    train(donor)
    optimizer.load_state_dict(donor.state_dict())
    assert group is optimizer.param_groups[0]
    assert group["lr"] == 0.7
    assert groups is optimizer.param_groups
    assert state is optimizer.state
    assert len(state) == 3


def test_loading_its_own_live_state_dict():
    optimizer = stepwell.AdamW(weights())
    train(optimizer)
    saved = optimizer.state_dict()
    before = snapshot(optimizer)
    optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), before)


# Precision


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("saved", torch.float32),
        ("param", torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
def test_precision_of_loaded_state(dtype, expected):
    donor = stepwell.AdamW(weights())
    train(donor)
    optimizer = stepwell.AdamW(weights(dtype=torch.bfloat16))
    optimizer.load_state_dict(donor.state_dict(), dtype=dtype)
    for state, original in zip(values(optimizer)[1], values(donor)[1], strict=True):
        assert state["step"].dtype == torch.float32
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[key].dtype == expected
            torch.testing.assert_close(state[key], original[key].to(expected))


def test_torch_rounds_state_down_where_we_keep_it():
    donor = torch.optim.AdamW(weights())
    train(donor)
    found = {}
    for library in (stepwell, torch.optim):
        params = weights(dtype=torch.bfloat16)
        optimizer = library.AdamW(params)
        optimizer.load_state_dict(donor.state_dict())
        found[library] = optimizer.state[params[0]]["exp_avg"].dtype
    assert found == {stepwell: torch.float32, torch.optim: torch.bfloat16}


def test_complex_state_is_cast_to_complex():
    donor = stepwell.AdamW(weights(dtype=torch.complex64))
    train(donor)
    optimizer = stepwell.AdamW(weights(dtype=torch.complex64))
    optimizer.load_state_dict(donor.state_dict(), dtype=torch.float64)
    assert values(optimizer)[1][0]["exp_avg"].dtype == torch.complex128


@pytest.mark.parametrize("dtype", ["float32", torch.int8, None, "same"])
def test_a_precision_that_does_not_exist(dtype):
    optimizer = stepwell.AdamW(weights())
    error = refused(lambda: optimizer.load_state_dict(optimizer.state_dict(), dtype=dtype))
    assert str(error) == (
        f"AdamW: dtype must be 'saved', 'param' or a floating point torch.dtype, got {dtype!r}"
    )


def test_loaded_state_lies_as_its_parameter():
    donor = stepwell.AdamW(weights([(2, 3, 4, 5)]))
    train(donor)
    param = weights([(2, 3, 4, 5)])[0]
    param.data = param.data.to(memory_format=torch.channels_last)
    optimizer = stepwell.AdamW([param])
    optimizer.load_state_dict(donor.state_dict())
    assert optimizer.state[param]["exp_avg"].stride() == param.stride()
    assert not optimizer.state[param]["exp_avg"].requires_grad


@pytest.mark.parametrize("capturable", [False, True])
def test_loaded_state_goes_where_its_parameter_is(capturable):
    donor = stepwell.AdamW(weights())
    train(donor)
    optimizer = stepwell.AdamW([p.detach().to("meta") for p in weights()], capturable=capturable)
    optimizer.load_state_dict(donor.state_dict())
    for state in values(optimizer)[1]:
        assert state["exp_avg"].device.type == "meta"
        # as torch: the host counts steps, unless a graph has to
        assert state["step"].device.type == ("meta" if capturable else "cpu")


# Hyperparameters


@each_name
def test_hyperparameters_come_and_flags_stay(name):
    donor = ours(name)(weights(), lr=0.5, weight_decay=0.25, maximize=True, foreach=False)
    optimizer = ours(name)(weights(), fused=True)
    optimizer.load_state_dict(donor.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["maximize"]) == (0.5, 0.25, True)
    assert (group["fused"], group["foreach"], group["differentiable"]) == (True, None, False)
    assert optimizer.defaults["lr"] == 1e-3
    assert optimizer._step_supports_amp_scaling


def test_what_the_state_dict_lacks_stays_as_constructed():
    optimizer = stepwell.SGD(weights(), maximize=True, momentum=0.5)
    optimizer.param_groups[0]["initial_lr"] = 7.0
    optimizer.load_state_dict(
        {"state": {}, "param_groups": [{"lr": 0.5, "tag": "x", "params": [0, 1, 2]}]}
    )
    group = optimizer.param_groups[0]
    assert (group["lr"], group["maximize"], group["momentum"]) == (0.5, True, 0.5)
    assert (group["initial_lr"], group["tag"]) == (7.0, "x")


def test_adamw_stays_decoupled():
    donor = torch.optim.Adam(weights(), lr=0.5)
    train(donor)
    optimizer = stepwell.AdamW(weights())
    optimizer.load_state_dict(donor.state_dict())
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True


def test_hyperparameters_are_judged_together():
    saved = torch.optim.SGD(weights(), momentum=0.9, nesterov=True).state_dict()
    saved["param_groups"][0]["momentum"] = 0
    optimizer = stepwell.SGD(weights())
    before = snapshot(optimizer)
    assert "Nesterov" in str(refused(lambda: optimizer.load_state_dict(saved)))
    assert_same(snapshot(optimizer), before)


# By name


def states_by_name(optimizer):
    pairs = (
        (name, optimizer.state.get(param, {}))
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    )
    return {name: {k: v.clone() for k, v in state.items()} for name, state in pairs}


def two_groups(first, second, **options):
    groups = [
        {"params": named_weights(first), "lr": 0.1},
        {"params": named_weights(second), "lr": 0.2},
    ]
    return stepwell.AdamW(groups, **options)


def test_matched_by_name_after_reordering():
    donor = stepwell.AdamW(named_weights("a b c"))
    train(donor)
    optimizer = stepwell.AdamW(named_weights("c a b"))
    assert optimizer.load_state_dict(donor.state_dict()) == WHOLE
    assert_same(states_by_name(optimizer), {n: states_by_name(donor)[n] for n in "cab"})
    assert optimizer.param_groups[0]["param_names"] == ["c", "a", "b"]
    twin = torch.optim.AdamW(named_weights("c a b"))
    twin.load_state_dict(donor.state_dict())
    shapes = [tuple(s["exp_avg"].shape) for s in twin.state.values()]
    assert shapes == [(2, 1), (2, 2), (2, 3)], "torch matches by order: this is what we mend"


def test_a_group_whose_parameters_had_several_rates_is_refused():
    donor = two_groups("a b c", "d e", foreach=False)
    train(donor)
    donor.param_groups[1].update(betas=(torch.tensor(0.5), torch.tensor(0.75)), initial_lr=0.3)
    optimizer = two_groups("b a", "e c d")
    before = snapshot(optimizer)
    said = str(refused(lambda: optimizer.load_state_dict(donor.state_dict())))
    assert said.splitlines()[1] == (
        "  mismatched: group 1: its parameters were in groups 0, 1 of the state dict, which differ "
        "in lr (0.1, 0.2), betas ((0.9, 0.999), (0.5, 0.75)), initial_lr (None, 0.3) (if not "
        "strict, those of group 1 are taken)"
    )
    assert_same(snapshot(optimizer), before)
    report = optimizer.load_state_dict(donor.state_dict(), strict=False)
    assert (report.missing, report.unexpected) == ((), ())
    assert len(report.mismatched) == 1
    assert_same(states_by_name(optimizer)["c"], states_by_name(donor)["c"])
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2]
    assert "initial_lr" not in optimizer.param_groups[0]


def test_groups_that_were_split_or_put_together_are_loaded():
    """Each parameter goes on with the hyperparameters that it had."""
    donor = two_groups("a b c", "d e")
    train(donor)
    for split in (("a", "c b", "e", "d"), ("d", "a", "e", "b c"), ("b a c", "e d")):
        groups = [{"params": named_weights(names), "lr": 7.0} for names in split]
        optimizer = stepwell.AdamW(groups)
        assert optimizer.load_state_dict(donor.state_dict()) == WHOLE
        assert [g["lr"] for g in optimizer.param_groups] == [
            0.2 if "d" in names or "e" in names else 0.1 for names in split
        ]
        donors = states_by_name(donor)
        assert_same(states_by_name(optimizer), {n: donors[n] for n in "".join(split) if n != " "})
    # numbers that are equal, however they are written; how a machine runs a step does not count
    donor.param_groups[0].update(lr=0.2, weight_decay=0, foreach=True)
    donor.param_groups[1].update(lr=torch.tensor(0.2, dtype=torch.float64), weight_decay=0.0)
    optimizer = stepwell.AdamW(named_weights("e d c b a"))
    assert optimizer.load_state_dict(donor.state_dict()) == WHOLE
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_a_group_without_names_to_share_is_matched_by_order():
    def make():
        empty = {"params": [], "param_names": []}
        return stepwell.AdamW([{"params": named_weights("a"), "lr": 0.1}, empty])

    donor, optimizer = make(), make()
    donor.param_groups[1]["lr"] = 0.75
    optimizer.load_state_dict(donor.state_dict())
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.75]


def test_groups_that_changed_places_keep_their_rates():
    donor = two_groups("a b c", "d e")
    optimizer = two_groups("d e", "a b c")
    optimizer.load_state_dict(donor.state_dict())
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.1]


def test_a_report_of_all_that_does_not_fit():
    donor = stepwell.AdamW([(f"net.{n}", p) for n, p in named_weights("a b c d")])
    train(donor)
    saved = donor.state_dict()
    saved["state"][1]["exp_avg"] = torch.ones(7)
    del saved["state"][2]["exp_avg_sq"]
    optimizer = stepwell.AdamW(
        [(f"module.net.{n}" if n == "a" else f"net.{n}", p) for n, p in named_weights("a b c e")]
    )
    train(optimizer)
    before = snapshot(optimizer)
    said = str(refused(lambda: optimizer.load_state_dict(saved)))
    assert_same(snapshot(optimizer), before)
    assert said.splitlines() == [
        "AdamW: the loaded state dict does not fit this optimizer:",
        "  missing: module.net.a (the state dict has net.a)",
        "  missing: net.e (the state dict has net.d)",
        "  missing: net.c: exp_avg_sq",
        "  unexpected: net.a (the optimizer has module.net.a)",
        "  unexpected: net.d (the optimizer has net.e)",
        "  mismatched: net.b: exp_avg must have shape (2, 2), got (7,)",
        "  (nothing was loaded; strict=False loads what fits; without param_names in it, "
        "parameters are matched by order)",
    ]


def test_a_long_report_is_cut():
    donor = stepwell.SGD([(f"a{i}", p) for i, p in enumerate(weights([(1,)] * 30))])
    optimizer = stepwell.SGD([(f"b{i}", p) for i, p in enumerate(weights([(1,)] * 30))])
    said = str(refused(lambda: optimizer.load_state_dict(donor.state_dict())))
    assert said.count("\n  missing: ") == 11
    assert "  missing: ... and 20 more" in said
    few = stepwell.SGD([(f"b{i}", p) for i, p in enumerate(weights([(1,)] * 10))])
    said = str(refused(lambda: few.load_state_dict(donor.state_dict())))
    assert said.count("\n  missing: ") == 10
    assert said.count("\n  unexpected: ") == 11


def test_what_fits_is_loaded_when_not_strict():
    donor = stepwell.AdamW(named_weights("a b c d"), lr=0.5)
    train(donor)
    saved = donor.state_dict()
    del saved["state"][1]["exp_avg_sq"]
    del saved["state"][2]
    optimizer = stepwell.AdamW(named_weights("e c b a"))
    train(optimizer, seed=1)
    had = states_by_name(optimizer)
    report = optimizer.load_state_dict(saved, strict=False)
    assert report.missing == ("e", "b: exp_avg_sq")
    assert [entry[0] for entry in report.unexpected] == ["d"]
    assert report.mismatched == ()
    assert not report.is_empty
    expected = {"e": had["e"], "c": {}, "b": had["b"], "a": states_by_name(donor)["a"]}
    assert_same(states_by_name(optimizer), expected)
    assert optimizer.param_groups[0]["lr"] == 0.5
    train(optimizer)


def test_groups_may_differ_in_number_when_not_strict():
    donor = two_groups("a b", "c d")
    train(donor)
    groups = [{"params": named_weights(n), "lr": 1.0} for n in ("d c", "e", "a")]
    optimizer = stepwell.AdamW(groups)
    before = snapshot(optimizer)
    error = refused(lambda: optimizer.load_state_dict(donor.state_dict()))
    assert str(error).startswith("loaded state dict has a different number of parameter groups (")
    assert_same(snapshot(optimizer), before)
    assert "missing: e" in str(error)
    report = optimizer.load_state_dict(donor.state_dict(), strict=False)
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 1.0, 0.1]
    assert [entry[0] for entry in report.missing] == ["e"]
    assert [entry[0] for entry in report.unexpected] == ["b"]
    donors = states_by_name(donor)
    expected = {"d": donors["d"], "c": donors["c"], "e": {}, "a": donors["a"]}
    assert_same(states_by_name(optimizer), expected)


@pytest.mark.parametrize("named", ["the optimizer", "the state dict"])
def test_names_on_one_side_match_by_order(named):
    donor = stepwell.AdamW(
        named_weights() if named == "the state dict" else weights([(2, 1), (2, 2), (2, 3)])
    )
    train(donor)
    optimizer = stepwell.AdamW(
        named_weights() if named == "the optimizer" else weights([(2, 1), (2, 2), (2, 3)])
    )
    assert optimizer.load_state_dict(donor.state_dict()) == WHOLE
    assert_same(values(optimizer)[1], values(donor)[1])
    # as torch: names that come are taken over, names that are there stay
    assert optimizer.param_groups[0]["param_names"] == ["a", "b", "c"]


def test_repeated_names_match_by_order():
    donor, optimizer = (stepwell.AdamW([("w", p) for p in weights([(2,), (2,)])]) for _ in range(2))
    train(donor)
    assert optimizer.load_state_dict(donor.state_dict()) == WHOLE
    assert_same(values(optimizer)[1], values(donor)[1])


# By order


@pytest.mark.parametrize(
    ("sizes", "saved_sizes"), [((3,), (2,)), ((1, 2), (2, 1)), ((3,), (1, 2)), ((1, 2), (3,))]
)
def test_groups_that_do_not_correspond(sizes, saved_sizes):
    def make(library, sizes):
        params = iter(weights())
        groups = [{"params": [next(params) for _ in range(size)]} for size in sizes]
        return library.AdamW(groups)

    donor = make(stepwell, saved_sizes)
    train(donor)
    optimizer, twin = make(stepwell, sizes), make(torch.optim, sizes)
    before = snapshot(optimizer)
    error = refused(lambda: optimizer.load_state_dict(donor.state_dict()))
    theirs = refused(lambda: twin.load_state_dict(donor.state_dict()))
    assert type(error) is type(theirs) is ValueError
    assert str(error).startswith(str(theirs))
    assert "AdamW" in str(error)
    assert_same(snapshot(optimizer), before)
    report = optimizer.load_state_dict(donor.state_dict(), strict=False)
    kept = sum(min(a, b) for a, b in zip(sizes, saved_sizes, strict=False))
    assert len(report.missing) == sum(sizes) - kept
    assert len(report.unexpected) == sum(saved_sizes) - kept
    unfit = {entry.partition(":")[0] for entry in report.mismatched}
    assert sum(bool(state) for state in values(optimizer)[1]) == kept - len(unfit)


def test_shapes_that_torch_lets_through():
    donor = stepwell.AdamW(weights())
    train(donor)
    optimizer = stepwell.AdamW(weights([(3, 4), (6,), ()]))
    torch.optim.AdamW(weights([(3, 4), (6,), ()])).load_state_dict(donor.state_dict())
    before = snapshot(optimizer)
    said = str(refused(lambda: optimizer.load_state_dict(donor.state_dict())))
    assert "mismatched: parameter 1 (group 0): exp_avg must have shape (6,), got (5,)" in said
    assert "mismatched: parameter 1 (group 0): exp_avg_sq must" in said
    assert_same(snapshot(optimizer), before)


def test_parameters_without_names_are_counted_over_groups():
    def make(last):
        return stepwell.AdamW(
            [{"params": weights([(1,), (2,)])}, {"params": weights([(1,), last])}]
        )

    donor, optimizer = make((3,)), make((4,))
    train(donor)
    said = str(refused(lambda: optimizer.load_state_dict(donor.state_dict())))
    assert "parameter 3 (group 1): exp_avg must have shape (4,), got (3,)" in said


def test_replaced_parameters_do_not_answer_to_the_old_names():
    donor, optimizer = (stepwell.AdamW(named_weights("a b c")) for _ in range(2))
    optimizer.param_groups[0]["params"] = weights([(2, 1), (2, 2)])
    said = str(refused(lambda: optimizer.load_state_dict(donor.state_dict())))
    assert "unexpected: parameter id 2 (group 0)" in said


def broken(change):
    donor = stepwell.AdamW(weights())
    train(donor)
    saved = donor.state_dict()
    saved["state"] = {key: dict(entry) for key, entry in saved["state"].items()}
    change(saved["state"])
    return saved


BROKEN = {
    "a missing entry": (lambda s: s[1].pop("exp_avg"), "missing: parameter 1 (group 0): exp_avg"),
    "no step": (lambda s: s[0].pop("step"), "missing: parameter 0 (group 0): step"),
    "a misspelt entry": (
        lambda s: s[0].update(exp_avgs=s[0].pop("exp_avg")),
        "missing: parameter 0 (group 0): exp_avg (the state dict has exp_avgs)",
    ),
    "None": (lambda s: s[0].update(exp_avg=None), "missing: parameter 0 (group 0): exp_avg"),
    "a number for a tensor": (
        lambda s: s[0].update(exp_avg=1.0),
        "mismatched: parameter 0 (group 0): exp_avg must have shape (3, 4), got float",
    ),
    "a tensor for a number": (
        lambda s: s[0].update(step=torch.ones(2)),
        "mismatched: parameter 0 (group 0): step must be one number, got (2,)",
    ),
    "words for a number": (
        lambda s: s[0].update(step="3"),
        "mismatched: parameter 0 (group 0): step must be one number, got str",
    ),
    "whole numbers": (
        lambda s: s[0].update(exp_avg=torch.ones(3, 4, dtype=torch.int8)),
        "mismatched: parameter 0 (group 0): exp_avg is torch.int8, the parameter is torch.float32",
    ),
    "complex numbers": (
        lambda s: s[0].update(exp_avg=torch.ones(3, 4, dtype=torch.complex64)),
        "exp_avg is torch.complex64, the parameter is torch.float32",
    ),
    "no dict": (
        lambda s: s.update({0: [1]}),
        "mismatched: parameter 0 (group 0): state must be a dict, got [1]",
    ),
    "an unknown id": (
        lambda s: s.update({9: {}}),
        "unexpected: state of id 9, which no group lists",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_state_is_refused_before_any_change(what):
    change, said = BROKEN[what]
    optimizer = stepwell.AdamW(weights(seed=1))
    train(optimizer, seed=1)
    before = snapshot(optimizer)
    error = refused(lambda: optimizer.load_state_dict(broken(change)))
    assert type(error) is ValueError
    assert said in str(error)
    assert_same(snapshot(optimizer), before)
    report = optimizer.load_state_dict(broken(change), strict=False)
    assert said in report.listing
    train(optimizer)


FORMS = {
    "no dict": (3, TypeError),
    "nothing": ({}, KeyError),
    "no state": ({"param_groups": []}, KeyError),
    "no groups": ({"state": {}}, KeyError),
    "groups that are none": ({"state": {}, "param_groups": 3}, ValueError),
    "a group that is none": ({"state": {}, "param_groups": [3]}, ValueError),
    "a group without params": ({"state": {}, "param_groups": [{"lr": 0.1}]}, ValueError),
    "params that are no ids": ({"state": {}, "param_groups": [{"params": [{}, 1, 2]}]}, ValueError),
    "state that is none": ({"state": [], "param_groups": [{"params": [0, 1, 2]}]}, ValueError),
}


@pytest.mark.parametrize("what", FORMS)
def test_what_is_no_state_dict(what):
    given, kind = FORMS[what]
    optimizer = stepwell.AdamW(weights())
    before = snapshot(optimizer)
    error = refused(lambda: optimizer.load_state_dict(given))
    assert isinstance(error, kind)
    assert "AdamW" in str(error)
    assert_same(snapshot(optimizer), before)


# Other rules, other times


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=str)
def test_state_of_another_rule_is_refused(options):
    adam = stepwell.Adam(weights())
    sgd = stepwell.SGD(weights(), **options)
    for optimizer in (adam, sgd):
        train(optimizer)
    said = str(refused(lambda: sgd.load_state_dict(adam.state_dict())))
    assert "unexpected: parameter 0 (group 0): exp_avg\n" in said
    if options:
        said = str(refused(lambda: adam.load_state_dict(sgd.state_dict())))
        assert "missing: parameter 0 (group 0): exp_avg\n" in said
        assert "unexpected: parameter 0 (group 0): momentum_buffer\n" in said


def test_entries_that_somebody_added_are_kept():
    donor = stepwell.SGD(weights(), momentum=0.9)
    train(donor)
    param = donor.param_groups[0]["params"][0]
    donor.state[param]["note"] = "x"
    donor.state[param]["extra"] = torch.ones(2)
    donor.state["all"] = {"k": 1}
    optimizer = stepwell.SGD(weights())
    assert optimizer.load_state_dict(donor.state_dict()) == WHOLE
    loaded = values(optimizer)[1][0]
    assert loaded["note"] == "x"
    assert torch.equal(loaded["extra"], torch.ones(2))
    assert optimizer.state["all"] == {"k": 1}
    train(optimizer)


def test_added_entries_of_an_older_version_are_kept():
    donor = stepwell.SGD(weights(), momentum=0.9)
    train(donor)
    saved = donor.state_dict()
    saved["state"][0]["note"] = "x"
    for flag in ("maximize", "foreach", "differentiable", "fused"):
        del saved["param_groups"][0][flag]
    optimizer = stepwell.SGD(weights())
    assert optimizer.load_state_dict(saved) == WHOLE
    assert values(optimizer)[1][0]["note"] == "x"


def test_state_of_a_flag_that_was_turned_off():
    donor = stepwell.AdamW(weights(), amsgrad=True)
    train(donor)
    saved = donor.state_dict()
    saved["param_groups"][0]["amsgrad"] = False
    optimizer = stepwell.AdamW(weights())
    assert optimizer.load_state_dict(saved) == WHOLE
    train(optimizer)


def test_state_of_a_flag_that_was_turned_on():
    donor = stepwell.AdamW(weights())
    train(donor)
    saved = donor.state_dict()
    saved["param_groups"][0]["amsgrad"] = True
    optimizer = stepwell.AdamW(weights())
    assert "exp_avg_sq" in str(refused(lambda: optimizer.load_state_dict(saved)))
    # the state dict decides, not the constructor
    saved["param_groups"][0]["amsgrad"] = False
    assert stepwell.AdamW(weights(), amsgrad=True).load_state_dict(saved) == WHOLE


STEPS = {
    "int": 3,
    "float": 3.0,
    "int64": torch.tensor(3),
    "bfloat16": torch.tensor(3.0, dtype=torch.bfloat16),
    "one element": torch.tensor([3.0]),
    "float64": torch.tensor(3.0, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", STEPS)
def test_steps_of_all_times(kind):
    donor = stepwell.AdamW(weights())
    train(donor)
    saved = copy.deepcopy(donor.state_dict())
    for entry in saved["state"].values():
        entry["step"] = STEPS[kind]
    optimizer = stepwell.AdamW([torch.nn.Parameter(p.detach().clone()) for p in values(donor)[0]])
    optimizer.load_state_dict(saved)
    for state in values(optimizer)[1]:
        assert isinstance(state["step"], Tensor)
        assert state["step"].shape == ()
        wide = torch.float64 if kind == "float64" else torch.float32
        assert state["step"].dtype == wide
    for trained in (donor, optimizer):
        train(trained, seed=1)
    torch.testing.assert_close(values(optimizer)[0], values(donor)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_a_momentum_buffer_of_none(momentum):
    saved = {
        "state": {i: {"momentum_buffer": None} for i in range(3)},
        "param_groups": [
            {**stepwell.SGD(weights(), momentum=momentum).state_dict()["param_groups"][0]}
        ],
    }
    loaded, fresh = stepwell.SGD(weights()), stepwell.SGD(weights(), momentum=momentum)
    loaded.load_state_dict(saved)
    assert all("momentum_buffer" not in state for state in loaded.state.values())
    for optimizer in (loaded, fresh):
        train(optimizer)
    assert_same(values(loaded)[0], values(fresh)[0])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_sparse_momentum_buffer_of_torch():
    def grad():
        return torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 2), (5, 2)).coalesce()

    donor = torch.optim.SGD(weights([(5, 2)]), momentum=0.9)
    donor.param_groups[0]["params"][0].grad = grad()
    donor.step()
    saved = donor.state_dict()
    assert saved["state"][0]["momentum_buffer"].is_sparse
    optimizer = stepwell.SGD(weights([(5, 2)]), momentum=0.9)
    optimizer.load_state_dict(saved)
    buffer = values(optimizer)[1][0]["momentum_buffer"]
    assert torch.equal(buffer, grad().to_dense())


def test_loading_in_the_middle_of_training():
    optimizer = stepwell.AdamW(weights())
    train(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = [p.detach().clone() for p in values(optimizer)[0]]
    train(optimizer, 2, seed=1)
    expected = copy.deepcopy(values(optimizer))
    for param, old in zip(optimizer.param_groups[0]["params"], kept, strict=True):
        param.data.copy_(old)
    optimizer.load_state_dict(saved)
    train(optimizer, 2, seed=1)
    assert_same(values(optimizer), expected)


def test_a_rule_of_the_users_own():
    donor = SignDescent(weights(), lr=0.5)
    train(donor)
    optimizer = SignDescent(weights())
    optimizer.load_state_dict(donor.state_dict())
    assert_same(values(optimizer)[1], values(donor)[1])
    # no formula of it asks for the step
    assert set(values(optimizer)[1][0]) == {"exp_avg"}


class Columns(stepwell.Optimizer):
    """A rule whose state is smaller than the parameter."""

    lr: NonNegative = 0.1

    largest = zeros(over=0)

    @staticmethod
    def update(param, grad, state, group):
        state.largest = maximum(state.largest, amax(abs(grad), dim=0))
        return param - group.lr * grad / (state.largest + 1e-8)


def test_state_smaller_than_its_parameter():
    donor, optimizer = (Columns(weights([(3, 4), (2, 2)])) for _ in range(2))
    train(donor)
    assert values(donor)[1][0]["largest"].shape == (1, 4)
    optimizer.load_state_dict(donor.state_dict())
    assert_same(values(optimizer)[1], values(donor)[1])
    loaded, original = (values(o)[1][0]["largest"] for o in (optimizer, donor))
    assert loaded.data_ptr() != original.data_ptr()
    narrow = Columns(weights([(3, 5), (2, 2)]))
    said = str(refused(lambda: narrow.load_state_dict(donor.state_dict())))
    assert "largest must have shape (1, 5), got (1, 4)" in said


# Subclasses


class OldSchool(stepwell.Optimizer):
    """In torch's manner, with state of any kind."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] = {
                    "step": 3,
                    "history": [param.detach().clone()],
                    "best": {"value": torch.ones(2, dtype=torch.float64)},
                    "name": "x",
                    "none": None,
                    "count": torch.tensor([3]),
                }


def test_state_that_nobody_declared():
    donor, optimizer = OldSchool(weights(), lr=0.7), OldSchool(weights(seed=1))
    donor.step()
    assert optimizer.load_state_dict(donor.state_dict()) == WHOLE
    assert_same(values(optimizer)[1], values(donor)[1])
    history = values(optimizer)[1][0]["history"][0]
    assert history.data_ptr() != values(donor)[1][0]["history"][0].data_ptr()
    optimizer.load_state_dict(donor.state_dict(), dtype="param")
    assert values(optimizer)[1][0]["best"]["value"].dtype == torch.float32
    assert values(optimizer)[1][0]["count"].dtype == torch.int64


VALUES = {"maximize": True, "ns_dtype": "float32", "batch_dims": 1}
WAYS = [
    *((key, how) for key in VALUES for how in ("state dict", "file")),
    *((key, "combined") for key in ("ns_dtype", "batch_dims")),
]


@pytest.mark.parametrize(("key", "how"), WAYS)
def test_what_groups_do_not_list_at_its_default_is_loaded(key, how, tmp_path):
    rule = stepwell.LBFGS if key == "maximize" else stepwell.Muon

    def made(**own):
        optimizer = rule([("w", torch.nn.Parameter(torch.ones(2, 3, 4)))], **own)
        return stepwell.Combined({"one": optimizer}) if how == "combined" else optimizer

    donor, optimizer = made(), made(**{key: VALUES[key]})
    if how == "file":
        stepwell.checkpoint.save(tmp_path / "file", optimizer=donor)
        stepwell.checkpoint.load(tmp_path / "file", optimizer=optimizer)
    else:
        optimizer.load_state_dict(donor.state_dict())
    assert key not in optimizer.param_groups[0]
    donor.load_state_dict(made(**{key: VALUES[key]}).state_dict())
    assert donor.param_groups[0][key] == VALUES[key]


def test_unlisted_flags_stay_as_constructed():
    optimizer = stepwell.RMSprop(weights(), fused=True)
    optimizer.load_state_dict(stepwell.RMSprop(weights()).state_dict())
    assert optimizer.param_groups[0]["fused"] is True


class Stubborn(stepwell.SGD):
    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("seen", True)
            group.pop("unwanted", None)
        if len(self.state) > 2:
            raise RuntimeError("not me")


def test_a_subclass_may_complete_or_refuse_what_is_loaded():
    optimizer = Stubborn([{"params": weights(), "unwanted": 1}], momentum=0.9)
    saved = stepwell.SGD(weights(), lr=0.5, momentum=0.9).state_dict()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["seen"]
    assert "unwanted" not in optimizer.param_groups[0]
    donor = stepwell.SGD(weights(), lr=0.7, momentum=0.9)
    train(donor)
    before = snapshot(optimizer)
    assert str(refused(lambda: optimizer.load_state_dict(donor.state_dict()))) == "not me"
    assert_same(snapshot(optimizer), before)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_any_split_into_groups():
    params = weights(SHAPES * 2)
    donor = stepwell.AdamW([(str(i), p) for i, p in enumerate(params)])
    for step in range(3):
        fill_grads(params, step)
        donor.step()
    for cut in range(1, 5):
        twins = [(str(i), torch.nn.Parameter(p.detach().clone())) for i, p in enumerate(params)]
        optimizer = stepwell.AdamW([{"params": twins[:cut]}, {"params": twins[cut:]}])
        report = optimizer.load_state_dict(donor.state_dict(), strict=False)
        assert report == WHOLE
        assert_same(values(optimizer)[1], values(donor)[1])
