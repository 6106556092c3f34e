"""The reference network: the published numbers, every port written out independently, training mode, growth, bad options."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from support import networks
from torch import Tensor

import memnet_fast as mf
from memnet_fast.config import PRESETS, MemNetConfig
from memnet_fast.reference import MemNet, count_macs
from memnet_fast.training.results import grow

OFFICIAL = {"memnet_m6r6": (6, 6), "memnet_m10r10": (10, 10)}
# first, recursions, gates, reconstruction; biases; gamma and beta; w_m; total
PARAMETERS = {
    "memnet_m6r6": (576, 442_368, 233_472, 576, 1_217, 17_282, 6, 695_497),
    "memnet_m10r10": (576, 737_280, 634_880, 576, 1_985, 46_722, 10, 1_422_029),
}


def _split(net: MemNet) -> tuple[int, ...]:
    groups: dict[str, int] = defaultdict(int)
    for name, p in net.named_parameters():
        if name == "head_weights":
            groups["w"] += p.numel()
        elif ".bn" in name or "recon_bn" in name:
            groups["bn"] += p.numel()
        elif name.endswith("bias"):
            groups["bias"] += p.numel()
        else:
            part = "gate" if ".gate." in name else name.split(".")[0]
            groups[part] += p.numel()
    parts = tuple(groups[k] for k in ("first", "blocks", "gate", "recon", "bias", "bn", "w"))
    return (*parts, sum(p.numel() for p in net.parameters()))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name):
    assert _split(mf.create_model(name, pretrained=False)) == PARAMETERS[name]


def test_conv_weights_of_the_literature():
    """ "677K parameters" and "2,662.4 G multi-adds for 1280x720"."""
    assert sum(PARAMETERS["memnet_m6r6"][:4]) == 676_992
    basic = count_macs(MemNetConfig(multi_supervised=False))
    assert basic == 2_888_832
    assert abs(basic * 921_600 / 1e9 - 2662.4) < 0.1


def test_port_a_has_2905474_parameters():
    net = mf.create_model("memnet_m6r6_vandermode", pretrained=False)
    assert sum(p.numel() for p in net.parameters()) == 2_905_474


@pytest.mark.parametrize(("name", "macs"), [("memnet_m6r6", 2_891_712), ("memnet_m10r10", 8_014_016)])
def test_macs(name, macs):
    assert count_macs(PRESETS[name]) == macs


@pytest.mark.parametrize(("name", "recursions", "gates"), [("memnet_m6r6", 0.918, 0.081), ("memnet_m10r10", 0.920, 0.079)])
def test_shares_of_the_work(name, recursions, gates):
    m, r = OFFICIAL[name]
    total = count_macs(PRESETS[name])
    assert round(m * r * 2 * 9 * 64 * 64 / total, 3) == recursions
    assert round(sum((r + i) * 64 * 64 for i in range(1, m + 1)) / total, 3) == gates


@pytest.mark.parametrize("name", networks.VARIANTS)
def test_macs_are_what_the_convolutions_do(name):
    """The formula against a count of every convolution that runs."""
    net = networks.build(networks.VARIANTS[name])
    count = [0]

    def hook(module, args, out):
        count[0] += module.weight[0].numel() * out.numel()

    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(hook)
    net(networks.image(1, net.config.in_channels, 4, 5))
    assert count[0] == count_macs(net.config) * 20


@pytest.mark.parametrize(("name", "radius"), [("memnet_m6r6", 74), ("memnet_m10r10", 202), ("memnet_m6r6_lornatang", 433)])
def test_receptive_radius(name, radius):
    assert PRESETS[name].receptive_radius == radius


@pytest.mark.parametrize("name", networks.VARIANTS)
def test_receptive_radius_is_exact(name):
    """One changed pixel moves results as far as the radius says, and no further."""
    net = networks.build(networks.VARIANTS[name]).double()
    radius = net.config.receptive_radius
    c = net.config.in_channels
    size = 2 * radius + 5
    x = networks.image(1, c, size, size).double() * 0.5 + 0.25
    moved = x.clone()
    moved[0, :, radius + 2, radius + 2] = float("nan")
    seen = torch.isnan(net(moved)).any(1)[0]
    expected = torch.zeros(size, size, dtype=torch.bool)
    expected[2:-2, 2:-2] = True
    assert torch.equal(seen, expected)


def test_state_shapes_of_the_official_network():
    state = MemNet().state_dict()
    expected = {
        "first.bn.running_mean": (1,),
        "first.conv.weight": (64, 1, 3, 3),
        "blocks.5.conv_a.0.weight": (64, 64, 3, 3),
        "blocks.5.conv_b.0.bias": (64,),
        "blocks.0.bn_a.5.weight": (64,),
        "blocks.0.gate.bn.running_var": (64 * 7,),
        "blocks.5.gate.conv.weight": (64, 64 * 12, 1, 1),
        "recon_bn.5.bias": (64,),
        "recon.weight": (1, 64, 3, 3),
        "head_weights": (6,),
    }
    for name, shape in expected.items():
        assert tuple(state[name].shape) == shape, name
    assert "blocks.0.conv_a.1.weight" not in state, "the convolutions of a block are shared"


# Ports, written out from their descriptions --------------------------------------------------------------------------


class _Port:
    """Functional forwards over a dictionary of weights with the port's own keys."""

    def __init__(self, state: dict[str, Tensor], m: int, r: int, training: bool) -> None:
        self.state, self.m, self.r, self.training = state, m, r, training

    def unit(self, x: Tensor, bn: str, conv: str, padding: int) -> Tensor:
        """Convolution of ReLU of batch normalisation."""
        s = self.state
        x = F.batch_norm(
            x, s[f"{bn}.running_mean"], s[f"{bn}.running_var"], s[f"{bn}.weight"], s[f"{bn}.bias"], self.training, 0.1, 1e-5
        )
        return F.conv2d(F.relu(x), s[f"{conv}.weight"], s.get(f"{conv}.bias"), padding=padding)


class _Official(_Port):
    def __call__(self, data: Tensor) -> Tensor:
        long = [self.unit(data, "bn_conv1", "conv1", 1)]
        y = 0
        for m in range(1, self.m + 1):
            h, short = long[-1], []
            for r in range(1, self.r + 1):
                t = self.unit(h, f"bn_conv{m}_{r}_a", f"conv{m}_a", 1)
                h = h + self.unit(t, f"bn_conv{m}_{r}_b", f"conv{m}_b", 1)
                short.append(h)
            long.append(self.unit(torch.cat(long + short, 1), f"bn_conv_transition_{m}", f"conv_transition_{m}", 0))
            y = y + self.state[f"weight_output_end_{m}"] * (data + self.unit(long[-1], f"bn_conv_end_{m}", "conv_end", 1))
        return y

    @staticmethod
    def keys(m: int, r: int) -> dict[str, str]:
        names = {"bn_conv1": "first.bn", "conv1": "first.conv", "conv_end": "recon"}
        for i in range(1, m + 1):
            block = f"blocks.{i - 1}"
            names |= {f"conv{i}_{x}": f"{block}.conv_{x}.0" for x in "ab"}
            names |= {f"bn_conv{i}_{j}_{x}": f"{block}.bn_{x}.{j - 1}" for j in range(1, r + 1) for x in "ab"}
            names |= {f"bn_conv_transition_{i}": f"{block}.gate.bn", f"conv_transition_{i}": f"{block}.gate.conv"}
            names |= {f"bn_conv_end_{i}": f"recon_bn.{i - 1}"}
        return names


class _PortA(_Port):
    heads = False

    def __call__(self, x: Tensor) -> Tensor:
        out = self.unit(x, "feature_extractor.bn", "feature_extractor.conv", 1)
        long, outputs = [out], []
        for m in range(self.m):
            name = f"dense_memory.{m}"
            short = []
            for r in range(self.r):
                unit = f"{name}.recursive_unit.{r}"
                residual = out
                out = self.unit(out, f"{unit}.relu_conv1.bn", f"{unit}.relu_conv1.conv", 1)
                out = self.unit(out, f"{unit}.relu_conv2.bn", f"{unit}.relu_conv2.conv", 1) + residual
                short.append(out)
            out = self.unit(torch.cat(short + long, 1), f"{name}.gate_unit.bn", f"{name}.gate_unit.conv", 0)
            long.append(out)
            if self.heads:
                outputs.append(x + self.unit(out, "reconstructor.bn", "reconstructor.conv", 1))
        if self.heads:
            return sum(w * y for w, y in zip(self.state["weights"][0], outputs, strict=True))
        return self.unit(out, "reconstructor.bn", "reconstructor.conv", 1) + x

    @staticmethod
    def keys(m: int, r: int) -> dict[str, str]:
        names = {f"feature_extractor.{k}": f"first.{k}" for k in ("bn", "conv")}
        names |= {"reconstructor.bn": "recon_bn.0", "reconstructor.conv": "recon"}
        for i, j, (n, x) in itertools.product(range(m), range(r), ((1, "a"), (2, "b"))):
            unit = f"dense_memory.{i}.recursive_unit.{j}.relu_conv{n}"
            names |= {f"{unit}.bn": f"blocks.{i}.bn_{x}.{j}", f"{unit}.conv": f"blocks.{i}.conv_{x}.{j}"}
        for i, k in itertools.product(range(m), ("bn", "conv")):
            names[f"dense_memory.{i}.gate_unit.{k}"] = f"blocks.{i}.gate.{k}"
        return names


class _PortA2(_PortA):
    heads = True


class _PortB(_Port):
    def __call__(self, x: Tensor) -> Tensor:
        out = self.unit(x, "feature_extractor.0", "feature_extractor.2", 1)
        long = [out]
        for m in range(self.m):
            name = f"dense_memory_blocks.{m}"
            short = []
            for _ in range(self.r):
                for r in range(self.r):  # the whole chain, each time
                    unit = f"{name}.recursive_unit.{r}.residual_block"
                    t = self.unit(out, f"{unit}.0", f"{unit}.2", 1)
                    out = out + self.unit(t, f"{unit}.3", f"{unit}.5", 1)
                short.append(out)
            out = self.unit(torch.cat(short + long, 1), f"{name}.gate_unit.0", f"{name}.gate_unit.2", 0)
            long.append(out)
        return torch.clamp(self.unit(out, "reconstructor.0", "reconstructor.2", 0) + x, 0.0, 1.0)

    @staticmethod
    def keys(m: int, r: int) -> dict[str, str]:
        names = {"feature_extractor.0": "first.bn", "feature_extractor.2": "first.conv"}
        names |= {"reconstructor.0": "recon_bn.0", "reconstructor.2": "recon"}
        for i, j, (n, x) in itertools.product(range(m), range(r), ((0, "a"), (3, "b"))):
            unit = f"dense_memory_blocks.{i}.recursive_unit.{j}.residual_block"
            names |= {f"{unit}.{n}": f"blocks.{i}.bn_{x}.{j}", f"{unit}.{n + 2}": f"blocks.{i}.conv_{x}.{j}"}
        for i, (n, k) in itertools.product(range(m), ((0, "bn"), (2, "conv"))):
            names[f"dense_memory_blocks.{i}.gate_unit.{n}"] = f"blocks.{i}.gate.{k}"
        return names


_A = {"sharing": "none", "bias": False, "gate_order": "short_long", "multi_supervised": False}
PORTS = {
    "official": (_Official, {}),
    "A": (_PortA, _A),
    "A2": (_PortA2, {**_A, "bias": True, "multi_supervised": True, "share_recon_bn": True}),
    "B": (_PortB, {**_A, "sharing": "chain", "recon_kernel": 1, "clamp": True, "in_channels": 3, "out_channels": 3}),
}


def _pair(port: str, training: bool) -> tuple[MemNet, _Port]:
    kind, options = PORTS[port]
    config = MemNetConfig(channels=6, num_memory_blocks=3, num_recursions=2, **options)
    net = networks.build(config, seed=4).double().train(training)
    own = net.state_dict()
    state = {}
    for theirs, ours in kind.keys(3, 2).items():
        for key in ("weight", "bias", "running_mean", "running_var"):
            if f"{ours}.{key}" in own:
                state[f"{theirs}.{key}"] = own[f"{ours}.{key}"].clone()
    if port == "official":
        state |= {f"weight_output_end_{i + 1}": w.clone() for i, w in enumerate(own["head_weights"])}
    if port == "A2":
        state["weights"] = own["head_weights"].clone()[None]
    values = sum(v.numel() for v in state.values())
    assert values == sum(v.numel() for k, v in own.items() if not k.endswith("num_batches_tracked")), "a key is missing"
    return net, kind(state, 3, 2, training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("port", PORTS)
def test_every_port_by_configuration(port, training):
    net, forward = _pair(port, training)
    x = networks.image(2, net.config.in_channels, 11, 9).double()
    y, truth = net(x), forward(x)
    assert y.shape == truth.shape
    assert not torch.equal(truth, x)
    assert float((y - truth).abs().max()) <= 1e-12 * float(truth.abs().max())
    if training:  # the running statistics move alike, also where a chain passes several times
        own = net.state_dict()
        for theirs, ours in type(forward).keys(3, 2).items():
            for key in ("running_mean", "running_var"):
                if f"{ours}.{key}" in own:
                    assert torch.allclose(forward.state[f"{theirs}.{key}"], own[f"{ours}.{key}"], rtol=1e-12, atol=1e-14)


def test_presets_are_the_ports():
    a, b = PRESETS["memnet_m6r6_vandermode"], PRESETS["memnet_m6r6_lornatang"]
    assert a == MemNetConfig(**_A)
    assert b == MemNetConfig(**PORTS["B"][1])


@pytest.mark.parametrize("name", networks.VARIANTS)
def test_every_parameter_gets_a_gradient(name):
    net = networks.build(networks.VARIANTS[name]).train().requires_grad_(True)
    x = networks.image(2, net.config.in_channels, 9, 8) * 0.5 + 0.25
    (net(x) ** 2).mean().backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    # The biases of convolutions in front of a batch normalisation cancel in training.
    assert not [n for n in without if "conv_a" not in n and not n.endswith("bias")], without


def test_heads_and_their_weighted_sum():
    net = networks.build(networks.VARIANTS["short_long"]).double()
    x = networks.image(2, 1, 7, 8).double()
    heads = net.heads(x)
    assert len(heads) == 3
    total = sum(w * h for w, h in zip(net.head_weights, heads, strict=True))
    assert torch.allclose(net(x), total, rtol=1e-13, atol=1e-13)
    single = networks.build(networks.VARIANTS["last_output"])
    x = x.float()
    assert len(single.heads(x)) == 1 and torch.equal(single.heads(x)[0], single(x))


@pytest.mark.parametrize("order", ["long_short", "short_long"])
def test_growing_keeps_the_function(order):
    net = networks.build(MemNetConfig(channels=8, num_memory_blocks=3, num_recursions=2, gate_order=order), 3)
    x = networks.image(2, 1, 9, 10)
    grown = grow(net, 5).eval()
    y, expected = networks.oracle(grown, x), networks.oracle(net, x)
    assert grown.config.num_recursions == 5
    assert float((y - expected).abs().max()) <= 1e-12 * float(expected.abs().max())
    with pytest.raises(mf.InputError):
        grow(net, 1)
    with pytest.raises(mf.InputError):
        grow(networks.build(networks.VARIANTS["unshared"]), 5)


@pytest.mark.parametrize(
    "options",
    [
        {"channels": 0},
        {"channels": 2.5},
        {"channels": True},
        {"num_memory_blocks": 0},
        {"num_recursions": -1},
        {"in_channels": "1"},
        {"out_channels": 0},
        {"in_channels": 3},
        {"in_channels": 3, "out_channels": 4},
        {"sharing": "all"},
        {"gate_order": "short"},
        {"recon_kernel": 5},
        {"recon_kernel": True},
        {"bias": 1},
        {"clamp": "yes"},
        {"multi_supervised": None},
        {"multi_supervised": False, "share_recon_bn": True},
    ],
    ids=str,
)
def test_invalid_configurations(options):
    with pytest.raises(mf.InputError) as caught:
        MemNetConfig(**options)
    assert next(iter(options)) in str(caught.value) or "in_channels" in str(caught.value)


def test_unknown_configuration_fields_are_named():
    with pytest.raises(mf.InputError, match="depth"):
        MemNetConfig.from_dict({"depth": 3})
    with pytest.raises(mf.InputError, match="depth"):
        mf.create_model("memnet_m6r6", pretrained=False, depth=3)


def test_configuration_round_trip():
    for config in (*networks.VARIANTS.values(), *PRESETS.values()):
        assert MemNetConfig.from_dict(config.to_dict()) == config
