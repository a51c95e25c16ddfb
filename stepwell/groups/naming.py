"""Parameters with their names and the modules that own them: what every builder starts from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer as TorchOptimizer

from ..param_groups import UNORDERED, as_groups, check_param, params_of

__all__ = [
    "Collected",
    "Group",
    "Named",
    "Use",
    "collect",
    "is_inner",
    "plain_name",
    "unwrapped",
]

Group = dict[str, Any]

# the attributes under which torch.compile, FSDP, activation checkpointing and Lightning's Fabric
# keep a module
INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
PARALLEL = (DistributedDataParallel, nn.DataParallel)


class Use(NamedTuple):
    """One place where a parameter is used.

    Attributes:
        name: the dotted name, without what wrappers put into it
        modules: from the outermost module to the one that holds it; empty if only names are known
    """

    name: str
    modules: tuple[nn.Module, ...] = ()

    @property
    def attribute(self) -> str:
        """What its module calls it; `weight` for `parametrizations.weight.original` too."""
        return self.name.split(".")[-2 if self._is_parametrized else -1]

    @property
    def owner(self) -> nn.Module | None:
        """The module that computes with it, if modules are known."""
        if not self.modules:
            return None
        return self.modules[-3 if self._is_parametrized else -1]

    @property
    def owner_name(self) -> str:
        """The dotted name of that module."""
        return ".".join(self.name.split(".")[: -3 if self._is_parametrized else -1])

    @property
    def _is_parametrized(self) -> bool:
        if self.modules:
            return isinstance(self.modules[-1], ParametrizationList)
        return self.name.split(".")[-3:-2] == ["parametrizations"]


class Named(tuple[str, Tensor]):
    """A pair of name and parameter, as optimizers take it, that remembers where it is used.

    A tied parameter has several uses; its name is that of the first, as in `named_parameters()`.

    Attributes:
        uses: where it is used, at least once
        position: its place in the model
    """

    uses: tuple[Use, ...]
    position: int

    def __new__(cls, uses: Iterable[Use], param: Tensor, position: int) -> Named:
        uses = tuple(uses)
        pair = super().__new__(cls, (uses[0].name, param))
        pair.uses, pair.position = uses, position
        return pair

    def __getnewargs__(self) -> Any:
        return self.uses, self.param, self.position

    @property
    def name(self) -> str:
        """The name of its first use."""
        return self[0]

    @property
    def param(self) -> Tensor:
        """The parameter itself."""
        return self[1]

    @property
    def spoken(self) -> str:
        """Its name, and those it has elsewhere."""
        others = ", ".join(use.name for use in self.uses[1:])
        return f"{self.name} (also {others})" if others else self.name


class Collected(NamedTuple):
    """What a builder was given: groups of `Named` with something to train, and what is frozen."""

    groups: list[Group]
    frozen: list[Named]

    @property
    def members(self) -> list[Named]:
        """All that is to be trained, in the order of the model."""
        members = [named for group in self.groups for named in group["params"]]
        return sorted(members, key=lambda named: named.position)


def collect(
    params: Any, owner: str, *, frozen_too: bool = False, unnamed_too: bool = False
) -> Collected:
    """Every parameter once, with its names, in the groups in which it was given.

    Args:
        params: a model, named parameters, groups of them, or an optimizer that has names
        owner: whom messages name
        frozen_too: whether those that are frozen belong to the groups
        unnamed_too: whether those without names are taken, and numbered

    Raises:
        TypeError, ValueError: names are missing or ambiguous, a parameter is in two groups or has
            no shape yet, or there is none
    """
    groups: list[Group] = []
    count = 0
    for i, group in enumerate(_given(params, owner)):
        groups.append(_members(group, f"{owner}, group {i}", count, unnamed_too))
        count += len(groups[-1]["params"])
    _check_members(groups, owner)
    frozen = [named for g in groups for named in g["params"] if not named.param.requires_grad]
    if not frozen_too:
        for group in groups:
            group["params"] = [named for named in group["params"] if named.param.requires_grad]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(f"{owner}: no parameters to train ({_why_none(frozen)})")
    return Collected(groups, frozen)


def _why_none(frozen: list[Named]) -> str:
    """Say why there is nothing to train, and what to do about it."""
    if not frozen:
        return "none given"
    if not any(isinstance(named.param, nn.Parameter) for named in frozen):
        return "a state_dict holds tensors without gradients: pass the model"
    return f"all {len(frozen)} are frozen, stepwell.groups.unfreeze wakes them"


def _given(params: Any, owner: str) -> list[Group]:
    """What was given as a list of groups, whose "params" may be any iterable."""
    if isinstance(params, TorchOptimizer):
        return params.param_groups
    if isinstance(params, nn.Module):
        uses = enumerate(_walk(params))
        return as_groups((Named([use], param, i) for i, (use, param) in uses), owner)
    if isinstance(params, Mapping):
        params = [dict(params)] if "params" in params else params.items()
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(
            f"{owner}: params must be a model, named parameters or groups of them, got "
            f"{type(params).__name__}"
        )
    if isinstance(params, (set, frozenset)):
        raise TypeError(f"{UNORDERED} ({owner})")
    groups = as_groups(params, owner)
    for group in groups:
        if not isinstance(group, dict):
            raise TypeError(f"{owner}: groups must be dicts, got {type(group).__name__}")
    return groups


def _walk(
    module: nn.Module, prefix: str = "", above: tuple[nn.Module, ...] = ()
) -> Iterator[tuple[Use, Tensor]]:
    """All uses of all parameters, in the order of `named_parameters()`."""
    modules = (*above, module)
    for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
        yield Use(prefix + name, modules), param
    for name, child in module._modules.items():
        if child is None or child in modules:
            continue
        if is_inner(module, name):
            yield from _walk(child, prefix, above)
        else:
            yield from _walk(child, f"{prefix}{name}.", modules)


def is_inner(module: nn.Module, name: str) -> bool:
    """Whether this child of a module is what it is put around."""
    return name in INNER or (name == "module" and isinstance(module, PARALLEL))


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of what torch.compile and the like put around it."""
    for name, child in module._modules.items():
        if child is not None and is_inner(module, name):
            return unwrapped(child)
    return module


def _members(group: Group, place: str, first: int, unnamed_too: bool) -> Group:
    """The group with one `Named` per parameter, the first of which has the position `first`."""
    items: Any = group.get("params")
    if isinstance(items, Iterable) and not isinstance(items, (set, frozenset)):
        items = [items] if isinstance(items, Tensor) else list(items)
        group = {**group, "params": items}
    given = params_of(group, place)
    names = given.get("param_names", group.get("param_names"))
    if names is None and unnamed_too:
        names = [f"parameter {first + i}" for i in range(len(given["params"]))]
    if names is None and given["params"]:
        raise TypeError(
            f"{place}: parameters must have names, got a bare {type(given['params'][0]).__name__}: "
            "pass the model, or model.named_parameters()"
        )
    found: dict[int, Named] = {}
    for i, (param, name) in enumerate(zip(given["params"], names or (), strict=True)):
        check_param(param, f"{place}, parameter {name}", differentiable=False)
        item = items[i]
        named = (
            item if isinstance(item, Named) else Named([Use(plain_name(name))], param, first + i)
        )
        found[id(param)] = _tied(found.get(id(param)), named)
    kept = {key: value for key, value in group.items() if key != "param_names"}
    return {**kept, "params": list(found.values())}


def _tied(known: Named | None, named: Named) -> Named:
    """One parameter with the uses of both."""
    if known is None:
        return named
    uses = dict.fromkeys([*known.uses, *named.uses])
    return Named(uses, known.param, known.position)


def plain_name(name: str) -> str:
    """The name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in INNER)


def _check_members(groups: list[Group], owner: str) -> None:
    """Refuse what would be trained twice or cannot be told apart."""
    homes: dict[int, int] = {}
    names: dict[str, int] = {}
    for index, group in enumerate(groups):
        for named in group["params"]:
            place = f"{owner}: {named.name}"
            if homes.setdefault(id(named.param), index) != index:
                raise ValueError(
                    "some parameters appear in more than one parameter group "
                    f"({place} is in group {homes[id(named.param)]} and in group {index})"
                )
            if names.setdefault(named.name, id(named.param)) != id(named.param):
                raise ValueError(
                    f"{place} names two parameters: put models side by side into an "
                    "nn.ModuleDict, which gives each a prefix"
                )
            if is_lazy(named.param):
                raise ValueError(f"{place} has no shape yet: pass data through the model first")
