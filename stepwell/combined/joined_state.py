"""JoinedState: the states of several optimizers as one mapping."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer as TorchOptimizer

__all__ = ["JoinedState"]


class JoinedState(MutableMapping[Any, Any]):
    """The states of all optimizers as one mapping; a new parameter's is where its group is."""

    def __init__(self, members: Mapping[str, TorchOptimizer], outer: dict[Any, Any]) -> None:
        self._members = members
        self._outer = outer

    def _parts(self) -> list[dict[Any, Any]]:
        return [*(member.state for member in self._members.values()), self._outer]

    def _home(self, key: Any) -> dict[Any, Any]:
        """Return the dict that holds the key, or, if none does, the dict to which it belongs."""
        for part in self._parts():
            if key in part:
                return part
        if isinstance(key, Tensor):
            for member in self._members.values():
                if any(key is param for group in member.param_groups for param in group["params"]):
                    return member.state
        return self._outer

    def __getitem__(self, key: Any) -> Any:
        home = self._home(key)
        # as in any optimizer, asking for what is not there makes it
        return home.setdefault(key, {}) if home is self._outer else home[key]

    def get(self, key: Any, default: Any = None) -> Any:
        """Return what is there, or the default; unlike `state[key]`, this makes nothing."""
        return next((part[key] for part in self._parts() if key in part), default)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """Return what is there, or put the default there."""
        return self._home(key).setdefault(key, default)

    def pop(self, key: Any, *default: Any) -> Any:
        """Take an entry out; KeyError if it is not there and no default is given."""
        home = next((part for part in self._parts() if key in part), self._outer)
        return home.pop(key, *default)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._home(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._home(key)[key]

    def clear(self) -> None:
        """Forget everything."""
        for part in self._parts():
            part.clear()

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take over several entries; whose parameters are whose is found out once."""
        groups = [(m.state, group) for m in self._members.values() for group in m.param_groups]
        homes = {id(param): state for state, group in groups for param in group["params"]}
        for key, value in dict(*args, **kwargs).items():
            homes.get(id(key), self._outer)[key] = value

    def __contains__(self, key: object) -> bool:
        return any(key in part for part in self._parts())

    def __iter__(self) -> Iterator[Any]:
        return chain(*map(list, self._parts()))

    def __len__(self) -> int:
        return sum(map(len, self._parts()))

    def __repr__(self) -> str:
        return repr(defaultdict(dict, self))
