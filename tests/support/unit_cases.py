"""Units of a training step (csrc/cpu/training.h): their inputs, what float64 makes of them, and the raw binding between guard
bands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memnet_fast import native
from memnet_fast.training import units

EPS = 1e-5
_BAND = 67  # floats on either side of every array: odd, so that no array but scratch is aligned to more than 4 bytes
_MARK = 0x7FC0BEEF  # a NaN that no arithmetic makes


@dataclass(frozen=True)
class Case:
    """A unit and the size of its maps [n, channels, h, w]. outputs: 0 for another map, else those of a reconstruction."""

    channels: int
    n: int
    h: int
    w: int
    kernel: int = 3
    outputs: int = 0
    sources: int = 1
    skip: bool = False
    bias: bool = True

    @property
    def kind(self) -> str:
        return "reconstruction" if self.outputs else f"{self.kernel}x{self.kernel}"

    @property
    def out(self) -> int:
        return self.outputs or self.channels


Values = dict[str, Tensor]  # float32 in PyTorch's order of axes; all maps of `x` behind one another: [N, sources * C, H, W]


def values(case: Case, seed: int = 0) -> Values:
    """Batch normalisations as different from 1 and 0 as after training. In no pixel is the input of the ReLU, with the batch's
    statistics or with the running ones, so near zero that rounding decides on which side it is."""
    g = torch.Generator().manual_seed(seed)
    total, shape = case.channels * case.sources, (case.n, case.channels, case.h, case.w)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    given = {
        "x": normal(case.n, total, case.h, case.w) * (0.5 + torch.rand(1, total, 1, 1, generator=g)) + normal(1, total, 1, 1),
        "gamma": 0.5 + torch.rand(total, generator=g),
        "beta": 0.3 * normal(total),
        "running_mean": normal(total),
        "running_var": 0.5 + torch.rand(total, generator=g),
        "weight": normal(case.out, total, case.kernel, case.kernel) / (total * case.kernel**2) ** 0.5,
        "grad": normal(case.n, case.out, case.h, case.w),
    }
    if case.bias:
        given["bias"] = normal(case.out)
    if case.skip:
        given["skip"] = normal(*shape)
    for _ in range(100):
        x = given["x"].double()
        near = torch.zeros_like(x, dtype=torch.bool)
        for train in (False, True):
            near |= _normalised(given, x, train).abs() < 1e-4
        if not near.any():
            return given
        given["x"] = torch.where(near, given["x"] + 1e-3, given["x"])
    raise AssertionError("some input of the ReLU stays near zero")


def _normalised(given: Values, x: Tensor, train: bool) -> Tensor:
    gamma, beta = given["gamma"].to(x), given["beta"].to(x)
    if train:
        return F.batch_norm(x, None, None, gamma, beta, True, 0.0, EPS)
    return F.batch_norm(x, given["running_mean"].to(x), given["running_var"].to(x), gamma, beta, False, 0.0, EPS)


_LEAVES = ("x", "gamma", "beta", "weight", "bias", "skip")


def exact(given: Values, train: bool) -> Values:
    """`out` and the gradient of each input by its name, by autograd in float64."""
    own = {name: t.double() for name, t in given.items()}
    for name in _LEAVES:
        if name in own:
            own[name].requires_grad_()
    a = _normalised(own, own["x"], train).relu()
    out = F.conv2d(a, own["weight"], own.get("bias"), padding=own["weight"].shape[-1] // 2)
    if "skip" in own:
        out = out + own["skip"]
    out.backward(own["grad"])
    return {"out": out.detach()} | {name: own[name].grad for name in _LEAVES if name in own}  # type: ignore[misc]


Layout = Callable[[Tensor], Tensor]  # the same values, wherever in memory


def _modules(given: Values, train: bool, layout: Layout) -> tuple[nn.BatchNorm2d, nn.Conv2d]:
    out, total, kernel = given["weight"].shape[:3]
    bn = nn.BatchNorm2d(total, eps=EPS).train(train)
    conv = nn.Conv2d(total, out, kernel, padding=kernel // 2, bias="bias" in given)
    own = {"gamma": bn.weight, "beta": bn.bias, "running_mean": bn.running_mean, "running_var": bn.running_var}
    for name, t in (own | {"weight": conv.weight, "bias": conv.bias}).items():
        if t is not None:
            t.data = layout(given[name])
    return bn, conv


def by_units(case: Case, given: Values, train: bool, layout: Layout = torch.clone) -> Values:
    """As `exact`, by training.units."""
    bn, conv = _modules(given, train, layout)
    maps = [layout(x.contiguous()).requires_grad_() for x in given["x"].split(case.channels, 1)]
    skip = layout(given["skip"]).requires_grad_() if case.skip else None
    scratch = units.Scratch()
    mean, var = bn.running_mean, bn.running_var
    if train:
        mean, var = (torch.cat(s) for s in zip(*(units.statistics(x.detach(), scratch) for x in maps), strict=True))
    out = units.unit(bn, conv, maps, mean, var, skip, scratch)  # type: ignore[arg-type]
    out.backward(layout(given["grad"]))
    grads = {"x": torch.cat([x.grad for x in maps], 1), "gamma": bn.weight.grad, "beta": bn.bias.grad}  # type: ignore[misc]
    grads |= {"weight": conv.weight.grad, "bias": None if conv.bias is None else conv.bias.grad}
    grads["skip"] = None if skip is None else skip.grad
    return {"out": out.detach()} | {name: t for name, t in grads.items() if t is not None}


def error(found: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of what is expected."""
    difference = found.double() - expected.double()
    return float(difference.square().mean().sqrt() / expected.double().square().mean().sqrt())


class Guarded:
    """float32 memory between two bands, all of it NaN of a kind that no arithmetic makes. aligned: to 64 bytes."""

    def __init__(self, floats: int, aligned: bool = False) -> None:
        self._raw = torch.full((floats + 2 * _BAND + 16,), _MARK, dtype=torch.int32)
        self._start = _BAND
        if aligned:
            self._start += -(self._raw.data_ptr() // 4 + _BAND) % 16
        self.data = self._raw[self._start : self._start + floats].view(torch.float32)

    @property
    def address(self) -> int:
        return self.data.data_ptr()

    def check_bands(self, name: str) -> None:
        behind = self._start + self.data.numel()
        assert (self._raw[: self._start] == _MARK).all(), f"something wrote before {name}"
        assert (self._raw[behind:] == _MARK).all(), f"something wrote behind {name}"

    @property
    def untouched(self) -> bool:
        return bool((self.data.view(torch.int32) == _MARK).all())

    @property
    def written(self) -> bool:
        return not bool((self.data.view(torch.int32) == _MARK).any())


def _rows(x: Tensor) -> Tensor:
    """As the kernels lay out maps: [N, C, H, W] -> N, H, W, C."""
    return x.permute(0, 2, 3, 1).flatten()


class Raw:
    """One unit at the raw binding: `fields` as it takes them, every array a `Guarded`.

    In training mode the statistics are those of float64. spare: floats of scratch beyond what is needed."""

    def __init__(self, case: Case, given: Values, train: bool, threads: int = 1, isa: str = "auto", spare: int = 0) -> None:
        self.case, self.isa, self.spare, self.module = case, isa, spare, native.module()
        self.arrays: dict[str, Guarded] = {}
        self.inputs: dict[str, Tensor] = {}
        x = given["x"].double()
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        if not train:
            mean, var = given["running_mean"].double(), given["running_var"].double()
        c, shape = case.channels, (case.n, case.channels, case.h, case.w)
        arrays = {f"x{j}": _rows(part) for j, part in enumerate(x.split(c, 1))}
        arrays |= {"mean": mean, "invstd": (var + EPS).rsqrt()}
        arrays |= {name: given[name].flatten() for name in ("gamma", "beta", "weight")}
        arrays["bias"] = given["bias"] if case.bias else torch.zeros(case.out)
        arrays["grad"] = given["grad"].flatten() if case.outputs else _rows(given["grad"])
        if case.skip:
            arrays["skip"] = _rows(given["skip"])
        for name, t in arrays.items():
            self.inputs[name] = t.float()
            self.arrays[name] = Guarded(t.numel())
            self.arrays[name].data.copy_(t)
        pixels = case.n * case.h * case.w
        results = {f"grad_x{j}": pixels * c for j in range(case.sources)}
        results |= {"out": pixels * case.out, "grad_weight": arrays["weight"].numel(), "grad_bias": case.out}
        results |= {"grad_gamma": mean.numel(), "grad_beta": mean.numel()}
        self.results = list(results)
        for name, floats in results.items():
            self.arrays[name] = Guarded(floats)
        self.shape = shape
        self.fields: dict[str, Any] = {"n": case.n, "h": case.h, "w": case.w, "c": c, "kernel": case.kernel}
        self.fields |= {"outputs": case.outputs, "threads": threads, "batch_statistics": int(train)}
        for stem in ("x", "grad_x"):
            self.fields[stem] = [self.arrays[f"{stem}{j}"].address for j in range(case.sources)]
        self.fields |= {name: a.address for name, a in self.arrays.items() if not name[-1].isdigit()}

    def scratch(self, backward: bool) -> Guarded:
        return Guarded(self.module.unit_scratch(self.fields, backward, self.isa) + self.spare, aligned=True)

    def call(self, backward: bool, scratch: Guarded | None = None) -> None:
        function = self.module.unit_backward if backward else self.module.unit_forward
        scratch = self.scratch(backward) if scratch is None else scratch
        function(self.fields, scratch.address, scratch.data.numel(), self.isa)
        scratch.check_bands("scratch")
        for name, array in self.arrays.items():
            array.check_bands(name)
        for name, t in self.inputs.items():
            assert torch.equal(self.arrays[name].data.view(torch.int32), t.view(torch.int32)), f"{name} was changed"

    def run(self) -> Values:
        """Both directions. Names and axes as those of `exact`, without `skip`, of which the gradient is that of `out`."""
        self.call(False)
        self.call(True)
        return self.found()

    def _map(self, name: str) -> Tensor:
        n, c, h, w = self.shape
        return self.arrays[name].data.clone().view(n, h, w, c).permute(0, 3, 1, 2)

    def found(self) -> Values:
        case = self.case
        out = self.arrays["out"].data.clone().view(case.n, case.outputs, case.h, case.w) if case.outputs else self._map("out")
        found = {"out": out, "x": torch.cat([self._map(f"grad_x{j}") for j in range(case.sources)], 1)}
        found |= {name: self.arrays[f"grad_{name}"].data.clone() for name in ("gamma", "beta", "weight", "bias")}
        found["weight"] = found["weight"].view(case.out, case.sources * case.channels, case.kernel, case.kernel)
        return found
