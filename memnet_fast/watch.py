"""Whether a network is still the one that was looked at, asked in every call: look-ups in its dictionaries instead of a walk.

`state_dict()`, `modules()` and a look at the hooks of each module take a millisecond for the official network; what is asked
here is the same, in a twentieth of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import Tensor, nn

from memnet_fast.errors import InputError
from memnet_fast.plan import batch_norm_eps, require_plain, require_structure
from memnet_fast.reference import MemNet

_hooks_and_mode = itemgetter("training", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_modules, _parameters, _buffers = itemgetter("_modules"), itemgetter("_parameters"), itemgetter("_buffers")
_eps = itemgetter("eps")


class Watch:
    """Looks at one network, which it holds.

    names: of the tensors of its state_dict that `state` returns. Raises InputError unless the network is the plain one of its
    configuration.
    """

    def __init__(self, net: MemNet, names: Sequence[str]) -> None:
        require_plain(net)
        require_structure(net)
        self.net = net
        self.eps = batch_norm_eps(net)
        self._names = tuple(names)
        modules = dict(net.named_modules(remove_duplicate=False))
        self._attributes: list[dict[str, Any]] = [m.__dict__ for m in modules.values()]
        # What a convolution or normalisation has below it takes no part, unless it takes the place of a tensor.
        self._inner = [own for own in self._attributes if own["_modules"]]
        self._tree = self._children()
        self._norms = [modules[name].__dict__ for name in self.eps]
        self._norm_eps = list(self.eps.values())
        paths = dict.fromkeys(name.rpartition(".")[0] for name in names)
        self._owners = {path: modules[path].__dict__ for path in paths}
        self._owners_of_buffers = {path: own for path, own in self._owners.items() if own["_buffers"]}
        self._known = self._look()

    def _children(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(map(dict.values, map(_modules, self._inner))))

    def _tensors(self) -> list[Tensor | None]:
        parameters, buffers = map(_parameters, self._owners.values()), map(_buffers, self._owners_of_buffers.values())
        return list(chain.from_iterable(map(dict.values, chain(parameters, buffers))))

    def _look(self) -> tuple[list[Tensor | None], tuple[Tensor, ...]]:
        """All tensors of the owners, and those of `names`."""
        found = {
            f"{path}.{key}".lstrip("."): tensor
            for kind, owners in (("_parameters", self._owners), ("_buffers", self._owners_of_buffers))
            for path, own in owners.items()
            for key, tensor in own[kind].items()
        }
        missing = [name for name in self._names if found.get(name) is None]
        if missing:
            raise InputError(f"the network has lost {', '.join(missing[:3])}{' and more' if missing[3:] else ''}")
        return list(found.values()), tuple(found[name] for name in self._names)

    def disturbed(self) -> bool:
        """Whether a module is in training mode or has hooks."""
        return any(map(any, map(_hooks_and_mode, self._attributes)))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """As they were when they were looked at last."""
        return self._known[1]

    def state(self) -> tuple[Tensor, ...] | None:
        """The tensors of `names` as they are registered now; None where a module or an eps is no longer the one that it was.

        Raises InputError where a tensor is missing.
        """
        if self._children() != self._tree or list(map(_eps, self._norms)) != self._norm_eps:
            return None
        held, state = self._known
        now = self._tensors()
        if len(now) != len(held) or not all(map(is_, now, held)):
            require_plain(self.net)
            self._known = held, state = self._look()
        return state
