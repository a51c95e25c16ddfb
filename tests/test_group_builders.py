"""Does each builder put every parameter where it says, once, and does freezing lose nothing?"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

import stepwell
from stepwell.groups import (
    Times,
    by_pattern,
    freeze,
    layerwise_decay,
    muon_split,
    no_decay,
    table,
    unfreeze,
)

from .shell_cases import assert_same, refused


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


class Convnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)


class RMSNorm2d(nn.Module):
    """A norm as others write it: no class of torch's, and no vector either."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))


class Transformer(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 6, 16))
        self.embed = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight


class LayerNormLinear(nn.Module):
    """What its last word says: a norm and a linear map in one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm_weight = nn.Parameter(torch.ones(3))
        self.weight = nn.Parameter(torch.ones(3, 3))


class LowRank(nn.Module):
    """The product of two thin matrices, in place of one."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left @ right

    def right_inverse(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, : self.rank] * sizes[: self.rank], right[: self.rank]


class MoELayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 3, 5))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(4, 16, 32))
        self.bias = nn.Parameter(torch.zeros(4, 32))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 16, 3)
        self.router = nn.Linear(16, 4)
        self.experts = Experts()
        self.head = nn.Linear(16, 2)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "convnet": Convnet,
    "transformer": Transformer,
    "tied": lambda: Transformer(tied=True),
    "mixture": Mixture,
}
BUILDERS: dict[str, Callable[[Any], list[dict[str, Any]]]] = {
    "no_decay": no_decay,
    "layerwise_decay": lambda params: layerwise_decay(params, 0.5),
    "by_pattern": lambda params: by_pattern(params, {"*weight": {"lr": 0.5}}),
    "muon_split": lambda params: [group for half in muon_split(params) for group in half],
    "all of them": lambda params: no_decay(
        layerwise_decay(by_pattern(params, {"*weight": {"lr": 0.5}}), 0.5)
    ),
}
each_model = pytest.mark.parametrize("model", [make() for make in MODELS.values()], ids=MODELS)
each_builder = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


def names(groups: list[dict[str, Any]]) -> list[list[str]]:
    return [[name for name, _ in group["params"]] for group in groups]


def flat(groups: list[dict[str, Any]]) -> dict[str, Tensor]:
    pairs = [pair for group in groups for pair in group["params"]]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


# What holds for every builder


@pytest.mark.tiny
@each_model
@each_builder
def test_every_parameter_is_there_once_under_its_name(build, model):
    expected = dict(model.named_parameters())
    for given in (model, model.named_parameters(), expected, list(expected.items())):
        found = flat(build(given))
        assert found.keys() == expected.keys()
        assert all(found[name] is param for name, param in expected.items())


@each_builder
def test_frozen_parameters_are_left_out(build):
    model = mlp()
    model[0].requires_grad_(False)
    assert flat(build(model)).keys() == {"2.weight", "2.bias", "4.weight", "4.bias"}


@each_builder
def test_groups_are_taken_by_both_libraries(build):
    model = mlp()
    groups = [{**group, "lr": 0.1} for group in build(model)]
    for library in (stepwell, torch.optim):
        optimizer = library.AdamW(copy.copy(groups))
        found = [name for group in optimizer.param_groups for name in group["param_names"]]
        assert sorted(found) == sorted(dict(model.named_parameters()))


def test_a_checkpoint_fits_other_groups_of_the_same_model():
    model = Transformer(tied=True)
    plain = stepwell.AdamW(model.named_parameters())
    plain.init_state()
    for i, state in enumerate(plain.state.values()):
        state["exp_avg"].fill_(i)
    grouped = stepwell.AdamW(no_decay(model))
    report = grouped.load_state_dict(
        {**plain.state_dict(), "param_groups": plain.state_dict()["param_groups"]}, strict=False
    )
    assert report.is_empty
    for param in model.parameters():
        assert torch.equal(grouped.state[param]["exp_avg"], plain.state[param]["exp_avg"])


@each_builder
def test_names_are_free_of_what_wrappers_put_in(build):
    plain = Convnet()
    expected = names(build(plain))
    compiled = partial(torch.compile, backend="eager")
    wrapped = copy.deepcopy(plain)
    wrapped.conv2 = checkpoint_wrapper(compiled(wrapped.conv2))
    for model in (compiled(plain), nn.DataParallel(plain), nn.DataParallel(wrapped)):
        assert names(build(model)) == expected
    assert names(build(compiled(plain).named_parameters())) == names(
        build(plain.named_parameters())
    )


def test_a_child_called_module_keeps_its_name():
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    assert names(no_decay(model)) == [["module.weight"], ["module.bias"]]


@each_builder
def test_a_module_may_hold_itself(build):
    model = mlp()
    model[0].parent = model
    assert flat(build(model)).keys() == dict(model.named_parameters()).keys()


@each_builder
def test_groups_can_be_copied_and_pickled(build):
    groups = build(Transformer(tied=True))
    for made in (copy.deepcopy(groups), pickle.loads(pickle.dumps(groups))):
        assert names(made) == names(groups)
        assert names(no_decay(made)) == names(no_decay(groups))


NOTHING = {
    "no parameters": lambda: nn.ReLU(),
    "an empty list": list,
    "an exhausted generator": lambda: iter(()),
    "an empty group": lambda: [{"params": []}],
    "only frozen ones": lambda: nn.Linear(2, 2).requires_grad_(False),
}


@pytest.mark.parametrize("given", NOTHING.values(), ids=NOTHING)
@each_builder
def test_nothing_to_train_is_refused(build, given):
    error = refused(lambda: build(given()))
    assert type(error) is ValueError
    assert re.search("empty parameter list|no parameters to train", str(error))


def test_that_all_is_frozen_is_said():
    error = refused(lambda: no_decay(nn.Linear(2, 2).requires_grad_(False)))
    assert "all 2 are frozen, stepwell.groups.unfreeze" in str(error)
    error = refused(lambda: no_decay(nn.Linear(2, 2).state_dict()))
    assert "a state_dict holds tensors without gradients: pass the model" in str(error)


def shared_between_groups() -> Any:
    one = nn.Parameter(torch.ones(2))
    return [{"params": [("a", one)]}, {"params": [("b", one)]}]


BAD = {
    "no names": (mlp().parameters, TypeError, "must have names, got a bare Parameter: pass the"),
    "a list of models": (lambda: [mlp()], TypeError, "got a bare Sequential: pass the model"),
    "a tensor": (lambda: torch.ones(2), TypeError, "must be a model, named parameters or groups"),
    "None": (lambda: None, TypeError, "got NoneType"),
    "a set": (lambda: {("a", nn.Parameter(torch.ones(1)))}, TypeError, "ordered collections"),
    "a mixed list": (lambda: [{"params": []}, 3], TypeError, "groups must be dicts, got int"),
    "no params": (lambda: [{"lr": 1}], KeyError, "params"),
    "a number": (lambda: [("a", 3)], TypeError, "can only optimize Tensors"),
    "computed": (
        lambda: [("a", torch.ones(2, requires_grad=True) * 2)],
        ValueError,
        "can't optimize a non-leaf Tensor",
    ),
    "one name for two": (
        lambda: [*nn.Linear(2, 2).named_parameters(), *nn.Linear(2, 2).named_parameters()],
        ValueError,
        "weight names two parameters: put models side by side into an nn.ModuleDict",
    ),
    "in two groups": (shared_between_groups, ValueError, "appear in more than one parameter group"),
    "no shape yet": (lambda: nn.LazyLinear(2), ValueError, "no shape yet: pass data through"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(("given", "kind", "words"), BAD.values(), ids=BAD)
@each_builder
def test_what_cannot_be_grouped_is_refused_in_words(build, given, kind, words):
    error = refused(lambda: build(given()))
    assert isinstance(error, kind)
    assert words in str(error)


def test_parameters_without_their_shapes_are_refused():
    model = mlp()
    # the mark that FullyShardedDataParallel leaves
    model[0].weight._fsdp_flattened = True
    for build in (no_decay, muon_split):
        error = refused(lambda build=build: build(model))
        assert "0.weight was flattened by FullyShardedDataParallel" in str(error)
        assert "fully_shard, which keeps shapes" in str(error)
    assert len(by_pattern(model, {"0.*": {"lr": 0.1}})) == 2


# no_decay


def exempt(params: Any, **options: Any) -> set[str]:
    return {
        name
        for group in no_decay(params, **options)
        for name, _ in group["params"]
        if group.get("weight_decay") == 0
    }


@pytest.mark.tiny
def test_biases_norms_and_embeddings_do_not_decay():
    assert exempt(Convnet()) == {
        *("conv1.bias", "bn1.weight", "bn1.bias", "conv2.bias", "bn2.weight", "bn2.bias", "fc.bias")
    }
    found = exempt(Transformer())
    vectors = {name for name, param in Transformer().named_parameters() if param.ndim < 2}
    assert found == vectors | {"pos_embed", "embed.weight"}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(RMSNorm2d(3)), {"0.weight"}),
        (nn.Sequential(LayerNormLinear()), {"0.layer_norm_weight"}),
        (nn.Sequential(nn.EmbeddingBag(3, 2)), {"0.weight"}),
        (nn.Sequential(Experts()), {"0.bias"}),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), {"in_proj_bias", "out_proj.bias", "bias_k"}
         | {"bias_v"}),
        (nn.LSTM(2, 3), {"bias_ih_l0", "bias_hh_l0"}),
        (nn.Sequential(nn.Linear(4, 1)), {"0.bias"}),
        (parametrizations.orthogonal(nn.Linear(3, 3)), {"bias"}),
        (
            parametrizations.spectral_norm(nn.Embedding(3, 3)),
            {"parametrizations.weight.original"},
        ),
        (
            register_parametrization(nn.ParameterDict({"pos_embed": torch.ones(2, 2)}), "pos_embed",
                                     nn.Tanh()),
            {"parametrizations.pos_embed.original"},
        ),
        (
            parametrizations.weight_norm(nn.Conv2d(2, 3, 3)),
            {"bias", "parametrizations.weight.original0"},
        ),
        (
            parametrizations.weight_norm(nn.Linear(2, 3), dim=1),
            {"bias", "parametrizations.weight.original0"},
        ),
        # a parametrization of two matrices
        (
            register_parametrization(nn.Linear(3, 4, bias=False), "weight", LowRank(2)),
            set(),
        ),
        (nn.ParameterDict({"cls_token": nn.Parameter(torch.ones(1, 1, 4))}), {"cls_token"}),
    ],
)  # fmt: skip
def test_kinds_are_known_by_module_and_name(model, expected):
    assert exempt(model) == expected


def test_gains_of_the_older_weight_norm_do_not_decay():
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.utils.weight_norm(nn.Conv2d(2, 3, 3))
    assert exempt(model) == exempt(model.named_parameters()) == {"weight_g", "bias"}


def test_where_only_names_are_known_they_tell():
    named = list(
        nn.ModuleDict({"a": parametrizations.weight_norm(nn.Linear(3, 3))}).named_parameters()
    )
    assert exempt(named) == {"a.bias", "a.parametrizations.weight.original0"}
    matrix = nn.Parameter(torch.ones(3, 3))
    for name in ("tok_embeddings.weight", "wte.weight", "layers.0.norm.weight", "a.bias"):
        assert exempt([(name, nn.Parameter(matrix.clone()))]) == {name}
    for name in ("patch_embed.proj.weight", "layers.0.mlp.weight", "norm_mlp.fc.weight"):
        assert exempt([(name, nn.Parameter(matrix.clone()))]) == set()


def test_more_or_less_can_be_made_to_decay():
    model = Transformer()
    assert exempt(model, decay="*embed*") == exempt(model) - {"pos_embed", "embed.weight"}
    assert exempt(model, also=["head.weight"]) == exempt(model) | {"head.weight"}
    error = refused(lambda: no_decay(model, also="head.*", decay="*weight"))
    assert str(error).endswith("also and decay both match head.weight: make one of them narrower")
    assert "'hed.*' matches no parameter" in str(refused(lambda: no_decay(model, also="hed.*")))


def test_a_tied_weight_is_an_embedding_and_stands_under_its_first_name():
    assert "embed.weight" in exempt(Transformer(tied=True))
    both = nn.ModuleDict({"head": nn.Linear(4, 4, bias=False), "embed": nn.Embedding(4, 4)})
    both["embed"].weight = both["head"].weight
    assert exempt(both) == {"head.weight"}
    # a module that is used twice
    shared = nn.ModuleList([nn.Linear(2, 2)] * 3)
    assert names(no_decay(shared)) == [["0.weight"], ["0.bias"]]
    every = shared.named_parameters(remove_duplicate=False)
    assert names(no_decay(every)) == [["0.weight"], ["0.bias"]]


# by_pattern


@pytest.mark.tiny
def test_each_pattern_is_a_group_and_the_rest_comes_last():
    model = Transformer()
    patterns = {
        "head.*": {"lr": 0.1},
        re.compile(r"layers\.[01]\."): {"lr": 0.2, "weight_decay": 0},
        "embed.weight": {},
    }
    found = by_pattern(model, patterns)
    every = list(dict(model.named_parameters()))
    low = [name for name in every if "layers.0." in name or "layers.1." in name]
    assert names(found)[:3] == [["head.weight"], low, ["embed.weight"]]
    assert found[1] == {
        "name": r"layers\.[01]\.",
        "params": found[1]["params"],
        "lr": 0.2,
        "weight_decay": 0,
    }
    assert found[3].keys() == {"params"}


def test_a_tied_weight_is_matched_by_any_of_its_names_but_not_twice():
    model = Transformer(tied=True)
    assert names(by_pattern(model, {"head.*": {}}))[0] == ["embed.weight"]
    error = refused(lambda: by_pattern(model, {"embed.*": {}, "head.*": {}}))
    assert "both match embed.weight (also head.weight)" in str(error)


UNMATCHED = {
    "encodr.*": "the nearest names are 'encoder.*'",
    "encoder.layer.*": "the nearest names are 'encoder.layers.*'",
    "haed.weight": "'head.weight'",
    "module.encoder.*": "'encoder.*'",
    "HEAD.*": "names begin with pos_embed, embed, encoder, norm, head",
    re.compile(r"^encoder\.layrs\.\d"): "'encoder.layers.*'",
}


@pytest.mark.parametrize("pattern", UNMATCHED)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names(pattern):
    error = refused(lambda: by_pattern(Transformer(), {"norm.*": {}, pattern: {}}))
    assert type(error) is ValueError
    written = pattern if isinstance(pattern, str) else pattern.pattern
    assert str(error).startswith(f"by_pattern: pattern {written!r} matches no parameter; ")
    assert UNMATCHED[pattern] in str(error)


def test_a_pattern_for_frozen_parameters_is_refused_as_such():
    model = Transformer()
    model.head.requires_grad_(False)
    error = refused(lambda: by_pattern(model, {"head.*": {}}))
    assert "pattern 'head.*' matches frozen parameters only, such as head.weight" in str(error)


def test_what_two_patterns_match_is_refused_and_named():
    error = refused(lambda: by_pattern(Transformer(), {"encoder.*": {}, "*norm*": {}}))
    assert str(error).startswith(
        "by_pattern: patterns 'encoder.*' and '*norm*' both match encoder.layers.0.norm1.weight, "
        "encoder.layers.0.norm1.bias, encoder.layers.0.norm2.weight and 9 more: make one of them"
    )
    assert "second by_pattern that takes the groups of the first" in str(error)


@pytest.mark.parametrize(
    ("patterns", "kind", "words"),
    [
        (["0.*"], TypeError, "patterns must be a dict"),
        ({"0.*": 1e-4}, TypeError, "'0.*' must stand for a dict of hyperparameters"),
        ({"0.*": {3: 1}}, TypeError, "'0.*' must stand for a dict of hyperparameters"),
        ({3: {}}, TypeError, "a pattern must be a str, such as 'backbone.*'"),
        ({re.compile(b"0"): {}}, TypeError, "a pattern must be a str"),
        ({"0.*": {"params": []}}, ValueError, "'0.*' chooses the params: leave out this key"),
    ],
)
def test_mistakes_in_patterns_are_refused_in_words(patterns, kind, words):
    error = refused(lambda: by_pattern(mlp(), patterns))
    assert type(error) is kind
    assert words in str(error)


def test_a_misspelt_hyperparameter_is_refused_by_the_optimizer():
    groups = by_pattern(mlp(), {"0.*": {"weight_decy": 0}})
    with pytest.raises(ValueError, match="did you mean 'weight_decay'"):
        stepwell.AdamW(groups)


# Builders within builders, and multiples


@pytest.mark.tiny
def test_a_later_builder_refines_and_overrides():
    model = Transformer()
    coarse = by_pattern(model, {"*": {"lr": 0.4, "eps": 1e-6}})
    fine = by_pattern(coarse, {"head.*": {"lr": 0.8}, "encoder.*": {"lr": Times(0.5)}})
    assert [(g["name"], g["lr"], g["eps"]) for g in fine] == [
        ("*, head.*", 0.8, 1e-6),
        ("*, encoder.*", 0.2, 1e-6),
        ("*", 0.4, 1e-6),
    ]
    found = no_decay(by_pattern(model, {"encoder.*": {"lr": 0.1}}))
    assert [(g["name"], g.get("lr"), g.get("weight_decay")) for g in found] == [
        ("encoder.*, decay", 0.1, None),
        ("encoder.*, no decay", 0.1, 0),
        ("decay", None, None),
        ("no decay", None, 0),
    ]
    # what the modules say is still known
    assert {name for name, p in flat(found[3:]).items() if p.ndim > 1} == {
        "embed.weight",
        "pos_embed",
    }


def test_a_multiple_is_one_of_the_optimizers_own():
    model = mlp()
    groups = by_pattern(model, {"0.*": {"lr": Times(0.5), "weight_decay": Times(0)}})
    optimizer = stepwell.AdamW(groups, lr=0.3, weight_decay=0.1)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.15, 0), (0.3, 0.1)]
    tensor = stepwell.AdamW(by_pattern(model, {"0.*": {"lr": Times(0.5)}}), lr=torch.tensor(0.5))
    assert torch.equal(tensor.param_groups[0]["lr"], torch.tensor(0.25))
    added = nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [("added", added)], "lr": Times(2)})
    assert optimizer.param_groups[-1]["lr"] == 0.6


@pytest.mark.parametrize("key", ["betas", "amsgrad", "lr_scale"])
def test_a_multiple_of_what_is_no_number_is_refused(key):
    groups = by_pattern(mlp(), {"0.*": {key: Times(0.5)}})
    with pytest.raises(TypeError, match=f"group 0: {key} cannot be Times.0.5., since"):
        stepwell.AdamW(groups)


@pytest.mark.parametrize("factor", [-1, float("nan"), float("inf"), "2"])
def test_a_multiple_has_a_range(factor):
    error = refused(lambda: Times(factor))
    assert "Times: factor must be a number in [0, inf)" in str(error)


def test_a_multiple_that_leaves_the_range_is_refused():
    groups = by_pattern(mlp(), {"0.*": {"momentum": Times(1e308)}})
    with pytest.raises(ValueError, match="Invalid momentum value: inf"):
        stepwell.SGD(groups, momentum=100.0)


# layerwise_decay


def factors(groups: list[dict[str, Any]]) -> dict[str, float]:
    return {name: group["lr"].factor for group in groups for name, _ in group["params"]}


def depths(groups: list[dict[str, Any]], rate: float = 0.5) -> dict[str, int]:
    """How many layers lie above each parameter, from the closed form rate ^ depth."""
    powers = {rate**depth: depth for depth in range(50)}
    return {name: powers[factor] for name, factor in factors(groups).items()}


@pytest.mark.tiny
def test_rates_fall_from_the_last_layer_to_the_first():
    optimizer = stepwell.SGD(layerwise_decay(mlp(), 0.8), lr=0.3)
    assert [g["lr"] for g in optimizer.param_groups] == [0.3 * 0.8**2, 0.3 * 0.8, 0.3]
    assert [g["param_names"] for g in optimizer.param_groups] == [
        [f"{i}.weight", f"{i}.bias"] for i in (0, 2, 4)
    ]


def expected_depth(name: str) -> int:
    block = re.match(r"encoder\.layers\.(\d)", name)
    if block:
        return 3 - int(block.group(1))
    return 0 if name.startswith(("norm", "head")) else 4


def test_layers_of_a_transformer_are_embeddings_blocks_and_head():
    model = Transformer()
    expected = {name: expected_depth(name) for name, _ in model.named_parameters()}
    assert depths(layerwise_decay(model, 0.5)) == expected
    assert depths(layerwise_decay(model.named_parameters(), 0.5)) == expected
    inner = nn.Sequential(nn.Embedding(9, 16), model.encoder, nn.Linear(16, 9))
    found = depths(layerwise_decay(inner, 0.5))
    assert (found["0.weight"], found["1.layers.0.norm1.bias"], found["2.weight"]) == (4, 3, 0)


def test_without_a_head_the_last_block_learns_at_full_rate():
    found = depths(layerwise_decay(Transformer(tied=True), 0.5))
    assert found["encoder.layers.2.linear1.weight"] == found["norm.weight"] == 0
    assert found["embed.weight"] == 3


def test_norms_belong_to_the_convolution_before_them():
    found = depths(layerwise_decay(Convnet(), 0.5))
    assert [found[f"{name}.weight"] for name in ("conv1", "bn1", "conv2", "bn2", "fc")] == [
        *(2, 2, 1, 1, 0)
    ]


def test_a_module_with_several_matrices_is_one_layer():
    model = nn.ModuleDict({"rnn": nn.LSTM(2, 3, num_layers=2), "head": nn.Linear(3, 2)})
    assert len(layerwise_decay(model, 0.5)) == 2


def test_a_list_of_one_module_is_a_block():
    blocks = nn.ModuleList([nn.TransformerEncoderLayer(2, 1, 2)])
    model = nn.ModuleDict({"layers": blocks, "head": nn.Linear(2, 2)})
    assert len(layerwise_decay(model, 0.5)) == 2


def test_an_embedding_between_blocks_is_a_layer():
    parts = {
        "encoder": nn.ModuleList(nn.TransformerEncoderLayer(2, 1, 2) for _ in range(2)),
        "embed": nn.Embedding(3, 2),
        "decoder": nn.ModuleList(nn.TransformerDecoderLayer(2, 1, 2) for _ in range(2)),
    }
    assert len(layerwise_decay(nn.ModuleDict(parts), 0.5)) == 5


def test_a_block_may_be_compiled_by_itself():
    blocks = [nn.TransformerEncoderLayer(2, 1, 2) for _ in range(3)]
    blocks[1] = torch.compile(blocks[1], backend="eager")
    assert len(layerwise_decay(nn.Sequential(*blocks), 0.5)) == 3


def test_blocks_can_be_named():
    stages = nn.ModuleList(
        nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(2, 2) for _ in range(2))})
        for _ in range(2)
    )
    model = nn.ModuleDict({"stages": stages, "head": nn.Linear(2, 2)})
    assert len(layerwise_decay(model, 0.5)) == 3
    for blocks in (r"stages\.\d\.blocks\.\d", re.compile(r"stages\.\d\.blocks\.\d")):
        assert len(layerwise_decay(model, 0.5, blocks=blocks)) == 5
    error = refused(lambda: layerwise_decay(model, 0.5, blocks=r"blok"))
    assert "blocks='blok' is found in no name; they are such as stages." in str(error)
    error = refused(lambda: layerwise_decay(model, 0.5, blocks="("))
    assert isinstance(error, ValueError)
    assert "blocks='(' is no regular expression: missing )" in str(error)


def test_blocks_of_two_kinds_may_alternate():
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(2))
    blocks.insert(1, nn.TransformerEncoderLayer(2, 1, 2))
    model = nn.ModuleDict({"layers": blocks, "head": nn.Linear(2, 2)})
    assert len(layerwise_decay(model, 0.5)) == 4


@pytest.mark.parametrize("rate", [0, -1, 1.01, float("nan"), "0.5", None])
def test_a_rate_has_a_range(rate):
    error = refused(lambda: layerwise_decay(mlp(), rate))
    assert "layerwise_decay: rate must be a number in (0, 1]" in str(error)


def test_groups_that_have_a_rate_keep_it_as_what_is_multiplied():
    found = layerwise_decay(by_pattern(mlp(), {"0.*": {"lr": 0.4}}), 0.5)
    assert [(g["name"], g["lr"]) for g in found] == [
        ("0.*, layer 0", 0.1),
        ("layer 1", Times(0.5)),
        ("layer 2", Times(1.0)),
    ]


def test_layers_are_in_the_order_of_the_model_whatever_the_groups():
    found = layerwise_decay(by_pattern(mlp(), {"4.*": {}, "2.*": {"lr": Times(0.5)}}), 0.5)
    assert [(names([g])[0][0], g["lr"].factor) for g in found] == [
        ("4.weight", 1.0),
        ("2.weight", 0.25),
        ("0.weight", 0.25),
    ]


# muon_split


@pytest.mark.tiny
def test_hidden_matrices_are_apart_from_embeddings_head_and_vectors():
    model = Transformer()
    hidden, others = muon_split(model)
    expected = [n for n, p in model.named_parameters() if "layers" in n and p.ndim == 2]
    assert names(hidden) == [expected]
    assert {"embed.weight", "pos_embed", "head.weight"} <= flat(others).keys()
    assert names(muon_split(model.named_parameters()).hidden) == [expected]


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        (mlp(), {}, ["0.weight", "2.weight"]),
        (mlp(), {"head": ()}, ["0.weight", "2.weight", "4.weight"]),
        (mlp(), {"head": "0.*"}, ["2.weight", "4.weight"]),
        (mlp(), {"others": "2.*"}, ["0.weight"]),
        (Convnet(), {}, ["conv1.weight", "conv2.weight"]),
        (Transformer().encoder.layers, {}, None),
        (Transformer(tied=True), {}, None),
    ],
)
def test_the_head_is_the_last_matrix_outside_of_blocks(model, options, expected):
    found = flat(muon_split(model, **options).hidden)
    inside = [
        n for n, p in model.named_parameters() if p.ndim == 2 and re.search(r"self_attn|linear", n)
    ]
    assert list(found) == (expected or inside)


def test_gains_of_weight_norm_are_no_matrices():
    model = nn.Sequential(*(parametrizations.weight_norm(nn.Linear(2, 2)) for _ in range(2)))
    hidden, others = muon_split(model)
    assert list(flat(hidden)) == ["0.parametrizations.weight.original1"]
    assert list(flat(others)) == [
        *("0.bias", "0.parametrizations.weight.original0"),
        *("1.bias", "1.parametrizations.weight.original0", "1.parametrizations.weight.original1"),
    ]


def test_a_head_that_is_tied_to_an_embedding_is_the_only_one():
    model = Transformer(tied=True)
    model.add_module("last", nn.Linear(16, 16))
    assert "last.weight" in flat(muon_split(model).hidden)


def test_experts_are_batches_of_matrices():
    hidden, others = muon_split(Mixture(), others="router.*")
    assert [(names([g])[0], g.get("batch_dims")) for g in hidden] == [
        (["conv.weight"], None),
        (["experts.w1"], 1),
    ]
    assert flat(others).keys() >= {"router.weight", "experts.bias", "head.weight"}


def test_experts_are_known_by_the_class_of_their_module_too():
    model = nn.ModuleDict({"mlp": MoELayer(), "head": nn.Linear(3, 2)})
    (group,) = muon_split(model).hidden
    assert (names([group]), group["batch_dims"]) == ([["mlp.up"]], 1)


def test_what_a_tensor_of_three_dimensions_is_has_to_be_said():
    model = nn.ParameterDict({"heads": torch.zeros(2, 3, 4), "out": torch.zeros(4, 2)})
    error = refused(lambda: muon_split(model))
    assert str(error).startswith(
        "muon_split: heads has 3 dimensions and belongs to no convolution: say "
        "batch_dims={'heads': 1}"
    )
    assert muon_split(model, batch_dims={"heads": 1}).hidden[0]["batch_dims"] == 1
    assert "batch_dims" not in muon_split(model, batch_dims={"heads": 0}).hidden[0]
    assert muon_split(model, others="heads").hidden == []
    for bad in (-1, 1.5, None):
        error = refused(lambda bad=bad: muon_split(model, batch_dims={"heads": bad}))
        assert "muon_split: batch_dims must be" in str(error)


@each_model
def test_both_halves_train(model):
    hidden, others = muon_split(copy.deepcopy(model))
    optimizers = [stepwell.Muon(hidden, lr=0.02), stepwell.AdamW(no_decay(others), lr=3e-4)]
    for optimizer in optimizers:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        before = [param.detach().clone() for param in params]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert not any(torch.equal(a, b) for a, b in zip(params, before, strict=True))


# freeze and unfreeze

RULES: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "weight_decay": 0.1, "lr": 0.1},
    "AdamW": {"weight_decay": 0.5, "lr": 0.1},
    "Adam": {"weight_decay": 0.5, "amsgrad": True},
    "RMSprop": {"momentum": 0.9, "weight_decay": 0.1},
    "Adagrad": {},
    "NAdam": {},
    "Muon": {},
}


def step(model: nn.Module, optimizer: Any, resting: tuple[str, ...] = ()) -> None:
    """One step of a loss; `resting` get no gradient, which is how torch skips a parameter."""
    optimizer.zero_grad()
    model(torch.ones(3, 4)).square().sum().backward()
    for name, param in model.named_parameters():
        if name in resting:
            param.grad = None
    optimizer.step()


@pytest.mark.parametrize("name", RULES)
def test_frozen_parameters_rest_and_go_on_where_they_were(name):
    torch.manual_seed(0)
    # matrices alone, which every rule takes
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    twin = copy.deepcopy(model)
    ours = getattr(stepwell, name)(model.named_parameters(), **RULES[name])
    theirs = getattr(stepwell, name)(twin.named_parameters(), **RULES[name])
    for _ in range(3):
        step(model, ours)
        step(twin, theirs)
    held = model[0].weight.detach().clone()
    state = copy.deepcopy(ours.state[model[0].weight])
    frozen = freeze(model, "0.*")
    assert frozen == ["0.weight"]
    for _ in range(3):
        step(model, ours)
        step(twin, theirs, ("0.weight",))
    assert torch.equal(model[0].weight, held)
    assert_same(dict(ours.state[model[0].weight]), dict(state))
    assert unfreeze(ours, frozen) == frozen
    for _ in range(3):
        step(model, ours)
        step(twin, theirs)
    assert not torch.equal(model[0].weight, held)
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same(param.detach(), other.detach())
        assert_same(dict(ours.state[param]), dict(theirs.state[other]))


@pytest.mark.parametrize("library", [stepwell, torch.optim])
def test_a_gradient_that_is_there_is_dropped(library):
    model = nn.Linear(4, 1)
    optimizer = library.SGD(model.named_parameters(), lr=0.1, weight_decay=0.1)
    model(torch.ones(1, 4)).sum().backward()
    before = model.weight.detach().clone()
    freeze(optimizer, "weight")
    optimizer.step()
    assert torch.equal(model.weight, before)
    assert not torch.equal(model.bias.grad, torch.zeros(1))


def test_freeze_says_what_it_changed_and_unfreeze_undoes_that_alone():
    model = mlp()
    model[0].bias.requires_grad_(False)
    frozen = freeze(model, ["0.*", "*.bias"])
    assert frozen == ["0.weight", "2.bias", "4.bias"]
    assert freeze(model, ["0.*", "*.bias"]) == []
    assert unfreeze(model, []) == []
    assert unfreeze(model, frozen) == frozen
    assert not model[0].bias.requires_grad
    assert unfreeze(model) == ["0.bias"]
    assert len(freeze(model.parameters())) == 6


def test_whatever_cannot_learn_stays_as_it_is():
    quantized = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    model = nn.ParameterDict({"q": quantized, "scale": nn.Parameter(torch.ones(1))})
    freeze(model)
    assert unfreeze(model) == ["scale"]
    assert "matches no parameter" in str(refused(lambda: unfreeze(model, "q")))


def test_a_refused_freeze_changes_nothing():
    model = mlp()
    error = refused(lambda: freeze(model, ["0.*", "5.*"]))
    assert str(error).startswith("freeze: pattern '5.*' matches no parameter; the nearest names")
    assert all(param.requires_grad for param in model.parameters())


def test_an_optimizer_that_lacks_what_is_to_be_unfrozen_says_so():
    model = mlp()
    freeze(model, "0.*")
    optimizer = stepwell.SGD(no_decay(model), lr=0.1)
    error = refused(lambda: unfreeze(optimizer, "0.*"))
    assert "pattern '0.*' matches no parameter" in str(error)


# The table


@pytest.mark.tiny
def test_a_table_says_what_went_where():
    model = Transformer(tied=True)
    optimizer = stepwell.AdamW(
        no_decay(by_pattern(model, {"encoder.*": {"lr": 0.5}})), lr=0.25, weight_decay=0.125
    )
    shown = str(table(optimizer))
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert lines[0] == "parameter shape elements"
    assert "group 1: encoder.*, no decay (lr=0.5, weight_decay=0) 528" in lines
    assert "encoder.layers.{0..2}.linear1.weight (32, 16) 3 × 512" in lines
    assert "encoder.layers.{0..2}.norm{1,2}.bias (16,) 6 × 16" in lines
    assert "embed.weight (50, 16) 800" in lines
    unique = {id(p): p.numel() for p in model.parameters()}
    assert lines[-1] == f"total: {len(unique)} parameters {sum(unique.values()):,}"
    assert "betas=(0.9, 0.999)" in shown
    assert shown.count("betas") == 1


def test_a_tied_parameter_has_one_row_with_all_its_names():
    shown = str(table(Transformer(tied=True)))
    assert shown.count("embed.weight") == 1
    assert "embed.weight = head.weight" in shown


@each_model
def test_the_sizes_in_a_table_add_up(model):
    expected = sum(param.numel() for param in model.parameters())
    for shown in (str(table(no_decay(model))), str(table(*muon_split(model), whole=True))):
        sizes = re.findall(r"^group.* ([\d,]+)$|^total.* ([\d,]+)$", shown, flags=re.MULTILINE)
        *groups, total = [int((a or b).replace(",", "")) for a, b in sizes]
        assert sum(groups) == total == expected
        rows = re.findall(r"^  .*?(?:(\d+) × )?([\d,]+)$", shown, flags=re.MULTILINE)
        assert sum(int(n or 1) * int(size.replace(",", "")) for n, size in rows) == expected


def test_a_table_marks_what_is_frozen_and_what_is_not_float32():
    model = mlp()
    freeze(model, "0.*")
    model[2].to(torch.bfloat16)
    shown = str(table(stepwell.SGD(model.parameters(), lr=0.1)))
    assert re.search(r"parameter 0 +\(8, 4\) frozen +32", shown)
    assert re.search(r"parameter 2 +\(8, 8\) bfloat16 +64", shown)
    shown += str(table([{"params": nn.Parameter(torch.tensor(1.0))}]))
    assert re.search(r"parameter 0 +\(\) +1", shown)
    assert "of which frozen: 2 (40 elements)" in " ".join(shown.split())


def test_a_table_shows_multiples_and_tensors():
    groups = by_pattern(mlp(), {"0.*": {"lr": Times(0.5), "eps": torch.tensor(0.25)}})
    assert "group 0: 0.* (lr×0.5, eps=0.25)" in str(table(groups))


def test_rows_are_joined_only_if_that_says_all():
    sizes = {f"a{i}": torch.zeros(2) for i in (0, 1, 2, 4)}
    assert "a{0,1,2,4} " in str(table(nn.ParameterDict(sizes)))
    pairs = nn.ParameterDict({name: torch.zeros(2) for name in ("a0b0", "a0b1", "a1b0")})
    shown = str(table(pairs))
    assert all(name in shown for name in pairs)
    assert "a{" not in str(table(nn.ParameterDict(sizes), whole=True))


def test_a_table_fits_a_narrow_terminal(monkeypatch):
    made = table(stepwell.AdamW(no_decay(Transformer())))
    plain = str(made)
    assert "\x1b" not in plain
    assert "\n".join(line.rstrip() for line in repr(made).splitlines()) == plain
    console = Console(width=50, color_system=None)
    with console.capture() as capture:
        console.print(made)
    narrow = capture.get()
    assert max(map(len, narrow.splitlines())) <= 50
    assert "…" not in narrow


@pytest.mark.parametrize("given", [(), (nn.ReLU(),), (3,)])
def test_a_table_of_nothing_is_refused(given):
    assert "table" in str(refused(lambda: table(*given)))
