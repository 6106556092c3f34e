"""Lowering: exact in float64, slots that hold what the next operation wants, and refusal of what it cannot express."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import networks
from support.interpreter import Interpreter
from torch import nn

import memnet_fast as mf
from memnet_fast.backends import torch as torch_backend
from memnet_fast.config import PRESETS, MemNetConfig
from memnet_fast.plan import FirstConv, FusedPlan, Gate, Reconstruct, ResidualBlock, lower, reads, writes


def _run_fp64(plan: FusedPlan, x: torch.Tensor) -> torch.Tensor:
    packed = torch_backend.pack(plan, torch.device("cpu"), "fp64")
    out = torch.empty(x.shape[0], plan.config.out_channels, *x.shape[2:], dtype=torch.float64)
    workspace = torch.empty(packed.workspace_bytes(*(x.shape[i] for i in (0, 2, 3))), dtype=torch.uint8)
    packed.run(x.double(), out, workspace)
    return out


def _assert_exact(config: MemNetConfig, seed: int, n: int = 2, h: int = 9, w: int = 7) -> None:
    net = networks.build(config, seed, tiny_variance=True)
    x = networks.image(n, config.in_channels, h, w, seed)
    truth = networks.oracle(net, x)
    scale = float(truth.abs().max())
    plan = lower(net)
    for result in (_run_fp64(plan, x), Interpreter(plan)(x)):
        assert result.shape == truth.shape
        assert float((result - truth).abs().max()) <= 1e-12 * scale


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_exact(name):
    _assert_exact(PRESETS[name], 3, n=1)


@pytest.mark.parametrize("name", networks.VARIANTS)
def test_variants_are_exact(name):
    _assert_exact(networks.VARIANTS[name], 5)


@st.composite
def configs(draw: st.DrawFn) -> MemNetConfig:
    multi = draw(st.booleans())
    colour = draw(st.sampled_from([(1, 1), (3, 3), (1, 3)]))
    return MemNetConfig(
        in_channels=colour[0],
        out_channels=colour[1],
        channels=draw(st.sampled_from([5, 16])),
        num_memory_blocks=draw(st.integers(1, 3)),
        num_recursions=draw(st.integers(1, 3)),
        sharing=draw(st.sampled_from(["conv", "none", "chain"])),
        bias=draw(st.booleans()),
        gate_order=draw(st.sampled_from(["long_short", "short_long"])),
        recon_kernel=draw(st.sampled_from([1, 3])),
        multi_supervised=multi,
        share_recon_bn=multi and draw(st.booleans()),
        clamp=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(configs(), st.integers(0, 1000), st.integers(1, 9), st.integers(1, 9))
def test_random_configurations_are_exact(config, seed, h, w):
    _assert_exact(config, seed, n=1, h=h, w=w)


def test_weights_are_float64_and_nothing_is_rounded():
    net = networks.build(networks.SMALL)
    plan = lower(net)
    assert all(t.dtype == torch.float64 and t.device.type == "cpu" for t in plan.weights.values())
    bn = net.blocks[0].bn_a[0]
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    assert torch.equal(plan.weights["blocks.0.0.scale"], scale)
    assert not torch.equal(scale, scale.float().double()), "a rounded scale would pass for the exact one"


def test_the_plan_keeps_no_hold_of_the_parameters():
    net = networks.build(networks.SMALL)
    plan = lower(net)
    before = {k: v.clone() for k, v in plan.weights.items()}
    with torch.no_grad():
        for p in net.double().parameters():
            p.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in plan.weights.items())


def test_shared_convolutions_are_packed_once():
    plan = lower(networks.build(MemNetConfig(channels=5, num_memory_blocks=2, num_recursions=3)))
    blocks = [op for op in plan.ops if isinstance(op, ResidualBlock)]
    assert len({op.weight_b for op in blocks}) == 2
    assert len({op.weight_a for op in blocks}) == 6, "each recursion folds its own batch normalisation into weight_a"


def test_eps_of_each_normalisation_counts():
    net = networks.build(networks.SMALL, tiny_variance=True)
    net.blocks[1].bn_b[1].eps = 1e-2
    net.recon_bn[0].eps = 1e-3
    x = networks.image(1, 1, 6, 6)
    truth = networks.oracle(net, x)
    assert float((_run_fp64(lower(net), x) - truth).abs().max()) <= 1e-12 * float(truth.abs().max())


# Slots ---------------------------------------------------------------------------------------------------------------


def _expected(config: MemNetConfig) -> list[tuple[type, tuple[str, ...], str]]:
    """What the network computes: (operation, values it reads in any order, value it makes), from facts and not from code."""
    steps: list[tuple[type, tuple[str, ...], str]] = [(FirstConv, (), "B0")]
    m_count, r_count = config.num_memory_blocks, config.num_recursions
    for m in range(1, m_count + 1):
        source = f"B{m - 1}"
        for r in range(1, r_count + 1):
            for i in range(1, config.num_convs_in_chain + 1):
                target = f"H{m}.{r}" if i == config.num_convs_in_chain else f"T{m}.{r}.{i}"
                steps.append((ResidualBlock, (source,), target))
                source = target
        short = [f"H{m}.{r}" for r in range(1, r_count + 1)]
        steps.append((Gate, (*short, *(f"B{i}" for i in range(m))), f"B{m}"))
    heads = range(1, m_count + 1) if config.multi_supervised else [m_count]
    steps.append((Reconstruct, tuple(f"B{m}" for m in heads), "image"))
    return steps


SHAPES = [
    MemNetConfig(channels=2, num_memory_blocks=m, num_recursions=r, sharing=s, multi_supervised=multi)
    for m, r, s, multi in itertools.product((1, 2, 3), (1, 2, 3, 4), ("conv", "none", "chain"), (True, False))
]


@pytest.mark.parametrize("config", [*SHAPES, *PRESETS.values()], ids=lambda c: f"M{c.num_memory_blocks}R{c.num_recursions}")
def test_every_read_sees_the_value_it_means(config):
    with torch.no_grad():
        plan = lower(networks.MemNet(config).eval())
    steps = _expected(config)
    assert len(plan.ops) == len(steps)
    slots: dict[int, str] = {}
    for op, (kind, sources, target) in zip(plan.ops, steps, strict=True):
        assert type(op) is kind
        assert tuple(slots[s] for s in reads(op)) == sources
        dst = writes(op)
        assert dst not in reads(op)
        if isinstance(op, Gate):
            assert op.srcs == tuple(range(len(sources))), "gates read contiguous slots from 0 on"
        if dst is None:
            assert target == "image"
        else:
            assert 0 <= dst < plan.num_slots
            slots[dst] = target


@pytest.mark.parametrize("config", [*SHAPES, *PRESETS.values()], ids=lambda c: f"M{c.num_memory_blocks}R{c.num_recursions}")
def test_slots_are_as_many_as_values_live_at_once(config):
    with torch.no_grad():
        plan = lower(networks.MemNet(config).eval())
    steps = _expected(config)
    last = {value: i for i, (_, sources, _) in enumerate(steps) for value in sources}
    made = {target: i for i, (_, _, target) in enumerate(steps) if target != "image"}
    peak = max(sum(made[v] <= i <= last.get(v, made[v]) for v in made) for i in range(len(steps)))
    assert plan.num_slots == peak
    assert plan.num_slots == 1 + max(writes(op) for op in plan.ops if writes(op) is not None)


def test_workspace_of_the_official_network_is_known_beforehand():
    """13 maps of 64 channels for M6R6; its concatenations would be 12 more."""
    plan = lower(networks.MemNet(PRESETS["memnet_m6r6"]).eval())
    assert plan.num_slots == 13
    packed = torch_backend.pack(plan, torch.device("cpu"), "fp32")
    assert packed.workspace_bytes(1, 100, 90) == 13 * 64 * 100 * 90 * 4


# Refusal -------------------------------------------------------------------------------------------------------------


def _hooked(net):
    net.blocks[0].conv_a[0].register_forward_hook(lambda m, a, o: o * 2)


def _prehooked(net):
    net.first.register_forward_pre_hook(lambda m, a: None)


def _backward_hooked(net):
    net.recon.register_full_backward_hook(lambda m, i, o: None)


def _weight_norm(net):
    nn.utils.parametrizations.weight_norm(net.blocks[1].conv_b[0])


def _old_weight_norm(net):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(net.blocks[1].conv_b[0])


def _pruned(net):
    from torch.nn.utils import prune

    prune.l1_unstructured(net.blocks[0].gate.conv, "weight", 0.5)


def _spectral(net):
    nn.utils.parametrizations.spectral_norm(net.recon)


REFUSED = [_hooked, _prehooked, _backward_hooked, _weight_norm, _old_weight_norm, _pruned, _spectral]


@pytest.mark.parametrize("change", REFUSED, ids=lambda f: f.__name__.strip("_"))
def test_what_lowering_would_ignore_is_refused(change):
    """T64"""
    net = networks.build(networks.SMALL).requires_grad_(True)
    change(net)
    for attempt in (lower, mf.fuse):
        with pytest.raises(mf.InputError, match="hooks|parametrised"):
            attempt(net)


def _replace_bn(net):
    net.recon_bn[0] = nn.GroupNorm(1, net.config.channels)


def _replace_conv(net):
    net.first.conv = nn.Conv2d(1, net.config.channels, 3, padding=1, padding_mode="reflect")


def _dilate(net):
    net.blocks[0].conv_a[0].dilation = (2, 2)


def _no_statistics(net):
    net.blocks[0].bn_a[0] = nn.BatchNorm2d(net.config.channels, track_running_stats=False)


def _extra(net):
    net.extra = nn.Dropout()


def _missing_block(net):
    del net.blocks[1]


@pytest.mark.parametrize(
    "change", [_replace_bn, _replace_conv, _dilate, _no_statistics, _extra, _missing_block], ids=lambda f: f.__name__.strip("_")
)
def test_replaced_modules_are_refused(change):
    """T64"""
    net = networks.build(networks.SMALL)
    change(net)
    with pytest.raises(mf.InputError, match="not the module"):
        mf.fuse(net)


def test_subclasses_and_strangers_are_refused():
    class Other(mf.MemNet):
        def forward(self, x):
            return x

    with pytest.raises(mf.InputError, match="Other"):
        mf.fuse(Other(networks.SMALL))
    for stranger in (nn.Conv2d(1, 1, 3), None, "memnet_m6r6"):
        with pytest.raises(mf.InputError):
            mf.fuse(stranger)
