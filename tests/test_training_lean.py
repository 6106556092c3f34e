"""The memory-lean training path against autograd through the reference."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.recipes import network
from torch import nn

from memnet_fast.config import MemNetConfig
from memnet_fast.errors import InputError
from memnet_fast.reference import MemNet
from memnet_fast.training import lean

OFFICIAL = MemNetConfig(channels=8, num_memory_blocks=3, num_recursions=2)
CONFIGS = {
    "official": OFFICIAL,
    "paper order": dataclasses.replace(OFFICIAL, gate_order="short_long"),
    "own convolutions, no bias, one output": dataclasses.replace(OFFICIAL, sharing="none", bias=False, multi_supervised=False),
    "chain, 1x1 reconstruction, colour": MemNetConfig(
        channels=4, num_memory_blocks=2, num_recursions=2, sharing="chain", recon_kernel=1, in_channels=3, out_channels=3
    ),
    "shared reconstruction BN": dataclasses.replace(OFFICIAL, share_recon_bn=True),
}
SIZES = [(1, 1, 2), (2, 5, 7), (3, 1, 1), (2, 16, 9)]


def _net(config: MemNetConfig, dtype: torch.dtype) -> MemNet:
    return network(config).to(dtype)


def _loss(heads: list[torch.Tensor]) -> torch.Tensor:
    """Weighs every output differently, so that no two of them can be confused."""
    return sum(((k + 1) * h.double().sin()).sum() for k, h in enumerate(heads))  # type: ignore[return-value]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_gradients_and_statistics_are_those_of_autograd(name: str, size: tuple[int, int, int], train: bool) -> None:
    config = CONFIGS[name]
    plain = _net(config, torch.float64).train(train)
    thrifty = copy.deepcopy(plain)
    x = torch.rand(size[0], config.in_channels, *size[1:], dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = plain.heads(theirs), lean.heads(thrifty, ours)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    _loss(expected).backward()
    _loss(found).backward()
    grads = dict(plain.named_parameters()) | {"x": theirs}
    # A bias before a batch normalisation has gradient 0 but for rounding: errors are measured by the network's largest.
    largest = max(float(p.grad.abs().max()) for key, p in grads.items() if key != "head_weights")
    for key, p in (*thrifty.named_parameters(), ("x", ours)):
        if key != "head_weights":
            error = float((p.grad - grads[key].grad).abs().max())
            assert error <= 1e-9 * largest, (key, error / largest)
    for (key, a), b in zip(thrifty.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")
    assert thrifty.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_worse_than_that_of_autograd(dtype: torch.dtype) -> None:
    """RMS error of every gradient tensor against float64, as a ratio to the error of plain autograd in the same dtype."""
    config = MemNetConfig(channels=16, num_memory_blocks=3, num_recursions=3)
    exact = _net(config, torch.float64).train()
    x = torch.rand(4, 1, 21, 24)
    _loss(exact.heads(x.double())).backward()
    errors = {}
    for kind, function in (("plain", MemNet.heads), ("lean", lean.heads)):
        net = _net(config, torch.float32).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            outputs = function(net, x)
        _loss(outputs).backward()
        errors[kind] = torch.stack(
            [
                (p.grad.double() - q.grad).square().mean().sqrt() / q.grad.square().mean().sqrt()
                for (name, p), q in zip(net.named_parameters(), exact.parameters(), strict=True)
                if name != "head_weights" and "conv_a" not in name and q.grad.abs().max() > 1e-6
            ]
        )
    ratio = float(errors["lean"].square().mean().sqrt() / errors["plain"].square().mean().sqrt())
    assert ratio <= 1.25, errors


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, g++")


@needs_compiler
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiled_kernels_compute_the_same(train: bool, layout: torch.memory_format) -> None:
    config = dataclasses.replace(OFFICIAL, num_memory_blocks=2)
    eager = _net(config, torch.float64).train(train).to(memory_format=layout)  # type: ignore[call-overload]
    compiled = copy.deepcopy(eager)
    x = torch.rand(2, 1, 5, 7, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = lean.heads(eager, theirs), lean.heads(compiled, ours, compiled=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    _loss(expected).backward()
    _loss(found).backward()
    gradients = dict(eager.named_parameters()) | {"x": theirs}
    largest = max(float(p.grad.abs().max()) for key, p in gradients.items() if key != "head_weights")
    for key, p in (*compiled.named_parameters(), ("x", ours)):
        if key != "head_weights":
            assert float((p.grad - gradients[key].grad).abs().max()) <= 1e-9 * largest, key
    for a, b in zip(compiled.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@needs_compiler
def test_compiled_kernels_round_no_worse_under_autocast() -> None:
    """Error of all gradients against float64, as a ratio to that of the eager path."""
    config = dataclasses.replace(OFFICIAL, num_memory_blocks=2)
    exact, x = _net(config, torch.float64).train(), torch.rand(2, 1, 16, 9)
    _loss(exact.heads(x.double())).backward()
    errors = []
    for compiled in (False, True):
        net = _net(config, torch.float32).train()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = lean.heads(net, x, compiled)
        assert outputs[0].dtype == torch.float32 or outputs[0].dtype == torch.bfloat16
        _loss(outputs).backward()
        pairs = [
            (p.grad.double(), q.grad)
            for (name, p), q in zip(net.named_parameters(), exact.parameters(), strict=True)
            if name != "head_weights" and "conv_a" not in name and q.grad.abs().max() > 1e-6
        ]
        errors.append(torch.stack([(p - q).square().mean() / q.square().mean() for p, q in pairs]).mean().sqrt())
    assert errors[1] <= 1.25 * errors[0] and errors[0] > 0


def test_a_machine_without_a_compiler_is_named(tmp_path: Path) -> None:
    """In a process of its own: what torch.compile found out about compilers, it keeps."""
    program = "from memnet_fast.training import lean; lean.check_compiler('cpu')"
    environment = {
        **os.environ,
        "CXX": "no-such-compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=environment)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "InputError: torch.compile does not work here" in last, done.stderr
    assert "no-such-compiler" in last and "compile = false" in last


def test_nothing_is_concatenated_and_little_is_kept() -> None:
    """Bytes that autograd holds between forward and backward, counted once for each storage."""

    def kept(function: object) -> int:
        net = MemNet(MemNetConfig(channels=8)).train()
        own = {p.untyped_storage().data_ptr() for p in net.parameters()}
        storages: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            if t.untyped_storage().data_ptr() not in own:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = function(net, torch.rand(2, 1, 32, 32))  # type: ignore[operator]
        largest = max(storages.values())
        assert outputs[0].shape == (2, 1, 32, 32)
        if function is lean.heads:
            assert largest == 4 * 8 * 2 * 32 * 32  # one feature map
        return sum(storages.values())

    assert kept(lean.heads) < 0.36 * kept(MemNet.heads)


def test_frozen_parameters_get_no_gradient() -> None:
    net = _net(OFFICIAL, torch.float32).train()
    for name, p in net.named_parameters():
        p.requires_grad_("blocks.1" in name and "conv" in name)
    _loss(lean.heads(net, torch.rand(2, 1, 8, 8))).backward()
    for name, p in net.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name


def test_what_it_cannot_do_is_refused() -> None:
    net = _net(OFFICIAL, torch.float32).train()
    with pytest.raises(InputError, match="channels"):
        lean.heads(net, torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="more than 1 value"):
        lean.heads(net, torch.rand(1, 1, 1, 1))
    net.blocks[0].bn_a[0].eval()
    with pytest.raises(InputError, match="bn_a.0 differs"):
        lean.heads(net, torch.rand(1, 1, 8, 8))
    with pytest.raises(InputError, match="SyncBatchNorm"):
        lean.heads(nn.SyncBatchNorm.convert_sync_batchnorm(_net(OFFICIAL, torch.float32)), torch.rand(1, 1, 8, 8))
