"""The Triton kernels in Triton's interpreter, through the layers of the parity suite.

Whether kernels are interpreted is decided when triton is imported, and other tests of a run need the compiler. So this file has
two faces: as a test module it starts itself as a script with TRITON_INTERPRET=1 and asks it for one check at a time.

What the interpreter shows is every index, mask, slot, rounding step and order of operations as the source has them. It shows
neither how a tensor core sums, nor races, and in two places it computes otherwise than a GPU (kernels/activation.py):
float32 becomes bfloat16 by a rounding of its own, and products of 16-bit numbers are widened first, which is exact.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from support import checks, integer, layers, networks
from support.candidates import CPU, Candidate, pmr, triton_candidate
from support.checks import ParityError, require
from support.interpreter import Interpreter

import memnet_fast as mf
from memnet_fast import packing
from memnet_fast.backends import triton as backend
from memnet_fast.config import MemNetConfig
from memnet_fast.plan import Gate, Reconstruct, ResidualBlock, lower

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
# Every kind of operation once: radius 1 + 2 + 1.
TINY = MemNetConfig(channels=16, num_memory_blocks=1, num_recursions=1)
SIZES = [(1, 1), (1, 7), (7, 1), (5, 4), (15, 16), (16, 17), (17, 15)]
_TIMEOUT = 240  # seconds for one check; the slowest takes about 4


def candidate(precision: str, architecture: int = 90, spoil: Callable[[tuple], tuple] | None = None) -> Candidate:
    return triton_candidate(precision, CPU, architecture, spoil)


# Checks, run in the child --------------------------------------------------------------------------------------------


def impulses() -> None:
    """L0 on every seventeenth plan: each tap and each kind of operation, though not each tap with each kind."""
    every = layers.impulse_plans
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "impulse_plans", lambda channels: every(channels)[::17])
        layers.l0_impulse(candidate("fp32"))


def integers(precision: str, config: MemNetConfig, size: tuple[int, int], images: int, seed: int) -> None:
    """L1: bit equality with float64."""
    net, x, truth = integer.case(config, images, *size, seed)
    checks.equal(candidate(precision).build(net).run(x)[0], truth)


def odd_sizes(precision: str) -> None:
    for size in SIZES if precision == "fp32" else SIZES[3::2]:
        integers(precision, TINY, size, 3 if size == (5, 4) else 1, seed=4)


def single_operations(precision: str, channels: int, architecture: int = 90, size: tuple[int, int] = (9, 19)) -> None:
    """L2"""
    layers.l2_kernels(candidate(precision, architecture), channels, size)


def network(precision: str, config: MemNetConfig = networks.SMALL, size: tuple[int, int] = (9, 11)) -> None:
    """L3"""
    layers.l3_network(candidate(precision), config, size, n=1)


def footprint(precision: str) -> None:
    """L4"""
    layers.l4_footprint(candidate(precision), TINY, (4, 18))


def invariance() -> None:
    """L5: batch size, place in the batch, what the memory held before, repeats, and where a tile begins."""
    net = networks.build(TINY)
    x = networks.image(3, 1, 3, 18)
    runner = candidate("fp32").build(net)
    whole = runner.run(x)[0]
    checks.equal(runner.run(x[2:])[0], whole[2:].double())
    runner.poison = 0x42
    checks.equal(runner.run(x.flip(0))[0], whole.flip(0).double())
    runner.poison = 0x00
    checks.equal(runner.run(x[:2])[0], whole[:2].double())
    halo = TINY.receptive_radius
    crop = runner.run(x[:1, :, :, 3:])[0]
    checks.equal(crop[..., halo:], whole[:1, ..., 3 + halo :].double())


def special_values(precision: str) -> None:
    """Infinities and NaN in single channels: the same pattern as the policy-matched reference, with 11 padding channels."""
    config = MemNetConfig(channels=5)
    g = networks.generator(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    weights = {"s": some(5) + 2, "t": some(5), "a": some(5, 5, 3, 3), "ba": some(5), "b": some(5, 5, 3, 3), "bb": some(5)}
    block = layers.plan_of(config, ResidualBlock(0, 1, "s", "t", "a", "ba", "b", "bb"), weights, 2)
    weights = {"s": some(2, 5) + 2, "t": some(2, 5), "w": some(5, 2, 5), "b": some(5)}
    gate = layers.plan_of(config, Gate((0, 1), 2, "s", "t", "w", "b"), weights, 3)
    slot = some(1, 5, 9, 18)
    for (row, col), value in {(0, 0): float("inf"), (4, 9): float("nan"), (8, 17): -float("inf"), (2, 14): 6e4}.items():
        slot[0, row % 5, row, col] = value
    for plan, target in ((block, 1), (gate, 2)):
        slots = {0: slot} if target == 1 else {0: slot, 1: some(1, 5, 9, 18)}
        image = torch.zeros(1, 1, 9, 18)
        got = candidate(precision).make(plan).run(image, dict(slots))[1][target]
        expected = pmr(precision).make(plan).run(image, dict(slots))[1][target]
        require(bool(expected.isinf().any()) and bool(expected.isnan().any()), "the case has both")
        checks.same_frame(got, expected)


def clamp_keeps_nan() -> None:
    config = dataclasses.replace(TINY, clamp=True)
    net = networks.build(config)
    x = networks.image(1, 1, 6, 20) * 4 - 1.5
    x[0, 0, 3, 2] = float("nan")
    got = candidate("fp32").build(net).run(x)[0]
    twin = mf.MemNet(TINY).eval().requires_grad_(False)
    twin.load_state_dict(net.state_dict())
    free = Interpreter(lower(twin))(x)
    checks.same_frame(got, free.clamp(0, 1))
    require(bool((free < 0).any()) and bool((free > 1).any()), "the case reaches beyond both ends")
    require(float((got - free.clamp(0, 1)).abs().nan_to_num(0).max()) <= 1e-5, "clamped values")


def scattered_sources(precision: str) -> None:
    """A gate and a reconstruction whose sources neither ascend nor follow each other, exact on small integers."""
    config = MemNetConfig(channels=16)
    g = networks.generator(1)

    def small(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=g).float()

    weights = {"s": small(3, 16), "t": small(3, 16), "w": small(16, 3, 16), "b": small(16)}
    gate = layers.plan_of(config, Gate((4, 0, 2), 1, "s", "t", "w", "b"), weights, 5)
    weights = {"s": small(2, 16), "t": small(2, 16), "w": small(1, 16, 3, 3), "b": small(1), "h": small(2), "k": small(1)}
    recon = layers.plan_of(config, Reconstruct((3, 1), "s", "t", "w", "b", "h", "k"), weights, 5)
    slots = {i: small(1, 16, 5, 19) for i in range(5)}
    image = small(1, 1, 5, 19)
    for plan in (gate, recon):
        twin = Interpreter(plan)
        twin.slots = {i: v.double() for i, v in slots.items()}
        result = twin.run_ops(plan.ops, image.double())
        out, after = candidate(precision).make(plan).run(image, dict(slots))
        exact = (after[1], twin.slots[1]) if plan is gate else (out, result)
        checks.equal(*exact)


def gate_by_address(precision: str) -> None:
    """A gate of capability 9.0 whose slots begin where no descriptor can: the same bits as by descriptor."""
    g = networks.generator(3)
    kernels, tile = backend._load()[0], _tile("gate")
    kind = torch.float16 if precision == "fp16" else torch.float32
    values = torch.randn(4, 1, 5, 19, 16, generator=g).to(kind)
    weights = (torch.randn(2, 16, 16, generator=g).to(kind), *(torch.randn(2, 16, generator=g) for _ in "st"), torch.randn(16))
    shift = 8 // kind.itemsize
    results = []
    for start in (0, shift):
        raw = torch.empty(values.numel() + 64, dtype=kind)
        first = -raw.data_ptr() % 64 // kind.itemsize + start
        slots = raw[first : first + values.numel()].view(values.shape).copy_(values)
        require((slots.data_ptr() % 16 == 0) == (start == 0), "addresses of both kinds")
        kernels["gate"].launch(slots, (1, 2), torch.tensor([1, 2]), 3, weights, 16, False, tile)
        results.append(slots[3].clone())
    checks.equal(results[1].float(), results[0].double())
    require(not torch.equal(results[0], values[3]), "something was computed")


def far_offsets() -> None:
    """Slots that begin beyond 2^31 elements: an offset of 32 bits would read elsewhere. Untouched pages cost no memory."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    far = 2**27 + 5  # slots of one pixel and 16 channels
    slots = torch.empty(far + 2, 1, 1, 1, 16, dtype=torch.float16)
    g = networks.generator(2)
    slots[far] = slots[far + 1] = 0
    for index in (far, far + 1):
        slots[index, 0, 0, 0] = torch.randint(-3, 4, (16,), generator=g)
    weight, scale, shift = torch.eye(16)[None].half(), torch.ones(1, 16), torch.zeros(1, 16)
    kernels, tile = backend._load()[0], _tile("gate")
    table = torch.tensor([far])
    kernels["gate"].launch(slots, (far,), table, far + 1, (weight, scale, shift, torch.zeros(16)), 16, False, tile)
    checks.equal(slots[far + 1].float(), slots[far].float().relu().double())
    out, one = torch.empty(1, 1, 1, 1), torch.ones(1)
    weights = (torch.ones(1, 1, 1, 16), scale, shift, torch.zeros(1), one, one)
    kernels["reconstruct"].launch(slots, table, torch.zeros(1, 1, 1, 1), out, weights, 1, False, _tile("reconstruct"))
    checks.equal(out, slots[far].double().relu().sum().view(1, 1, 1, 1))


def _tile(kernel: str):
    from memnet_fast.kernels.tile_config import tile

    return tile(kernel, "fp16", 90, 16)


def module_runs_it() -> None:
    """Through fuse(), as a user gets it; "auto" leaves it alone, also where it could run."""
    net = networks.build(TINY)
    x = networks.image(1, 1, 4, 8)
    require(backend.why_not(TINY, CPU, "fp32", "direct") is None, "it can run here")
    require(mf.fuse(net).backend != "triton", "auto chose a backend that must be asked for")
    for precision in PRECISIONS:
        fast = mf.fuse(net, backend="triton", precision=precision)
        require((fast.backend, fast.precision, fast.algorithm) == ("triton", precision, "direct"), "what was asked for")
        y = fast(x)
        checks.equal(y, candidate(precision).build(net).run(x)[0].double())
        checks.require_nsr(y, networks.oracle(net, x), x, layers.NSR_LIMIT[precision] * checks.UNIT[precision])
    require(mf.fuse(net, backend="triton").precision == "fp32", "float32 unless asked otherwise")
    net.recon.weight.data.mul_(2)
    require(not torch.equal(y, fast(x)), "changed weights are packed again")


def faults_are_found() -> None:
    """The layers see a fault of these kernels: flipped taps, a lost channel, sources in another order, a late bias."""

    def change(index: int, ndim: int, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[tuple], tuple]:
        def spoil(weights: tuple) -> tuple:
            return tuple(how(w) if i == index and w.ndim == ndim else w for i, w in enumerate(weights))

        return spoil

    spoiled = {
        "taps flipped": change(2, 5 - 1, lambda w: w.flip(1)),
        "last channel lost": change(4, 5 - 1, lambda w: torch.where(torch.arange(w.shape[-1]) == 15, torch.zeros_like(w), w)),
        "gate sources turned": change(0, 3, lambda w: w.flip(0)),
        "bias lost": change(5, 1, torch.zeros_like),
        "head lost": change(4, 1, torch.zeros_like),
    }
    for name, spoil in spoiled.items():
        try:
            single = candidate("fp32", spoil=spoil)
            layers.l2_kernels(single, 16, (5, 6))
        except ParityError:
            continue
        raise AssertionError(f"not found: {name}")


VARIANTS = networks.VARIANTS
CHECKS: dict[str, Callable[[], None]] = {
    "impulses": impulses,
    **{f"odd sizes, {p}": partial(odd_sizes, p) for p in PRECISIONS},
    **{f"single operations, {p}, 64 channels": partial(single_operations, p, 64) for p in PRECISIONS},
    **{f"single operations, {p}, tiles of sm_80": partial(single_operations, p, 64, 80, (9, 17)) for p in ("tf32", "fp16")},
    "single operations, fp16, 128 channels": partial(single_operations, "fp16", 128, size=(4, 5)),
    "single operations, bf16, 40 channels": partial(single_operations, "bf16", 40, size=(5, 4)),
    "integers, fp32, five channels, three planes": partial(integers, "fp32", VARIANTS["colour"], (7, 9), 1, 1),
    "integers, tf32, own weights": partial(integers, "tf32", VARIANTS["unshared"], (7, 9), 1, 1),
    "integers, bf16, short before long": partial(integers, "bf16", VARIANTS["short_long"], (7, 9), 1, 1),
    "integers, fp16, chain": partial(integers, "fp16", VARIANTS["chain_of_two"], (7, 9), 1, 1),
    "integers, fp16, gray to colour": partial(integers, "fp16", VARIANTS["gray_to_colour"], (7, 9), 1, 1),
    "integers, bf16, last output": partial(integers, "bf16", VARIANTS["last_output"], (7, 9), 1, 1),
    **{f"network, {p}": partial(network, p) for p in PRECISIONS},
    "network, 31 planes": partial(network, "fp16", dataclasses.replace(TINY, in_channels=31, out_channels=31), (3, 7)),
    "network, clamped": partial(network, "fp32", dataclasses.replace(TINY, clamp=True), (9, 17)),
    "NaN footprint": partial(footprint, "fp32"),
    "batch, memory, repeats, crop": invariance,
    **{f"special values, {p}": partial(special_values, p) for p in PRECISIONS},
    "clamp keeps NaN": clamp_keeps_nan,
    **{f"scattered sources, {p}": partial(scattered_sources, p) for p in ("fp32", "fp16")},
    **{f"gate by address, {p}": partial(gate_by_address, p) for p in ("fp32", "fp16")},
    "offsets beyond 32 bits": far_offsets,
    "fuse": module_runs_it,
    "faults are found": faults_are_found,
}


def _check_overflow(wanted: bool) -> None:
    """The interpreter looks for overflow in every integer operation, which takes a third of the time."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=wanted)


def _serve() -> None:
    """Reads names of checks, one a line, and answers each with a line of JSON: null, or a traceback."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed must not look like an answer
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("ignore")  # NumPy reports each infinity and NaN
    for line in sys.stdin:
        torch.manual_seed(0)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            # Every kernel comes by in the check of single operations.
            _check_overflow(line.startswith("single operations, fp32"))
            CHECKS[line.strip()]()
            error = None
        except BaseException:
            error = traceback.format_exc()
        answers.write(json.dumps(error) + "\n")
        answers.flush()


# Tests, run by pytest ------------------------------------------------------------------------------------------------


class _Child:
    def __init__(self, process: subprocess.Popen, log: Path) -> None:
        self.process, self.log = process, log

    def ask(self, name: str) -> None:
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], _TIMEOUT)
        answer = self.process.stdout.readline() if ready else ""
        if not answer:
            self.process.kill()
            pytest.fail(f"no answer within {_TIMEOUT} s, or the process ended:\n{self.log.read_text()[-4000:]}")
        error = json.loads(answer)
        if error is not None:
            pytest.fail(f"in the interpreter:\n{error}", pytrace=False)


@pytest.fixture(scope="module")
def child():
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "stderr"
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, __file__], stdin=-1, stdout=-1, stderr=stderr, text=True, env=environment
            )
            yield _Child(process, log)
            process.stdin.close()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(child, name):
    child.ask(name)


def test_workspace_has_one_more_slot():
    plan = lower(networks.build(MemNetConfig(channels=5, num_memory_blocks=2, num_recursions=2)))
    for precision, size in (("fp32", 4), ("tf32", 4), ("fp16", 2), ("bf16", 2)):
        packed = backend.pack(plan, CPU, precision, "direct")
        assert packing.padded_channels(5) == 16
        assert packed.workspace_bytes(3, 7, 9) == (plan.num_slots + 1) * 3 * 7 * 9 * 16 * size


if __name__ == "__main__":
    _serve()
