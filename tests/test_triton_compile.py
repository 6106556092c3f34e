"""Every tile of the Triton kernels, compiled ahead of time for sm_80 and sm_90: no spill, the right instructions, wide loads.

What is compiled is what the backend launches: the kernels are replaced by recorders, the backend runs, and the recorded
arguments give types, alignments and constants. No GPU is needed; ptxas and cuobjdump come with Triton.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from memnet_fast.backends import triton as backend
from memnet_fast.config import MemNetConfig
from memnet_fast.plan import lower
from memnet_fast.reference import MemNet

triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled in this process", allow_module_level=True)

from memnet_fast.kernels import first_conv, gate, reconstruct, residual_block, tile_config  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = pytest.mark.skipif(
    not all((_TOOLS / name).is_file() for name in ("ptxas", "cuobjdump")), reason=f"no ptxas or cuobjdump in {_TOOLS}"
)

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
# The widest gates of a line that a real network has come from six and more recursions.
NETWORK = MemNetConfig(num_memory_blocks=1, num_recursions=6)
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
# Shared memory that one program may have: capability 8.0 has 163 KiB, but its lines also serve 8.6 and 8.9.
_SHARED = {80: 99 * 1024, 90: 227 * 1024}
_PRODUCT = {
    ("fp16", 80): r"HMMA\.16816\.F32 ",
    ("bf16", 80): r"HMMA\.16816\.F32\.BF16 ",
    ("tf32", 80): r"HMMA\.1688\.F32\.TF32 ",
    ("fp16", 90): r"HGMMA\.64x(64|128)x16\.F32 ",
    ("bf16", 90): r"HGMMA\.64x(64|128)x16\.F32\.BF16 ",
    ("tf32", 90): r"HGMMA\.64x(64|128)x8\.F32\.TF32 ",
}


# Triton 3.6 loses the ".ca" of a load when it makes an asynchronous copy of it.
_KEEPS_CACHE_MODIFIER = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 9)


@dataclasses.dataclass
class _Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    kernel: object
    launches: list[tuple[object, tuple, dict]]

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launches.append((self.kernel, args, constants))


def _launches(config: MemNetConfig, precision: str, architecture: int) -> list[tuple[object, tuple, dict]]:
    """What the backend launches for one forward pass on a device of this capability."""
    plan = lower(MemNet(config).eval())
    packed = dataclasses.replace(backend.pack(plan, torch.device("cpu"), precision, "direct"), architecture=architecture)
    found: list = []
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (first_conv, "first_conv"),
            (residual_block, "conv3x3"),
            (gate, "gate"),
            (reconstruct, "reconstruct"),
        ):
            patch.setattr(module, name, _Recorder(getattr(module, name), found))
        h, w = 16, 32
        raw = torch.empty(packed.workspace_bytes(1, h, w) + 64, dtype=torch.uint8)
        work = raw[-raw.data_ptr() % 64 :][: packed.workspace_bytes(1, h, w)]
        packed.run(torch.zeros(1, config.in_channels, h, w), torch.empty(1, config.out_channels, h, w), work)
    return found


@dataclasses.dataclass(frozen=True)
class Compiled:
    registers: int
    stack: int
    local: int
    shared: int
    sass: str

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.sass))

    def __str__(self) -> str:
        kinds = collections.Counter(re.findall(r"\b(?:LDGSTS|LDG|STG|UTMALDG)\.[A-Z0-9.]+|\bHG?MMA\.\S+", self.sass))
        return f"{self.registers} registers, {self.stack} stack, {self.shared} shared; {dict(kinds)}"


_done: dict[str, Compiled] = {}


def _compile(launch: tuple[object, tuple, dict], architecture: int, tmp_path: Path) -> Compiled:
    kernel, args, named = launch
    constants = {k: v for k, v in named.items() if k not in _OPTIONS}
    options = {k: v for k, v in named.items() if k in _OPTIONS}
    free = [name for name in kernel.arg_names if name not in constants]
    assert len(free) == len(args), "every argument is given once"
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    attributes = {}
    for name, value in zip(free, args, strict=True):
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            # What the launcher would find out; an address at a smaller multiple costs wide loads.
            if value.data_ptr() % 16 == 0:
                attributes[(kernel.arg_names.index(name),)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{value.block_shape}>"
        else:
            signature[name] = "i32"
    key = repr((kernel.fn.__name__, signature, constants, attributes, options, architecture))
    if key not in _done:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        code = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(code.asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found, usage
        registers, stack, local = map(int, found.groups())
        _done[key] = Compiled(registers, stack, local, code.metadata.shared, _cuobjdump("-sass", cubin))
    return _done[key]


def _cuobjdump(option: str, cubin: Path) -> str:
    done = subprocess.run([_TOOLS / "cuobjdump", option, cubin], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout + done.stderr


def _name(launch: tuple[object, tuple, dict]) -> str:
    name = launch[0].fn.__name__
    return name if name != "conv3x3" else "conv_a" if launch[2]["FIRST"] else "conv_b"


def _require_sound(code: Compiled, architecture: int) -> None:
    """What holds for every kernel."""
    assert code.stack == 0 and code.local == 0, f"local memory: {code}"
    assert code.count(r"\b(LDL|STL)\b") == 0, f"spills: {code}"
    assert code.count(r"\bLDG\.E\.[US](8|16)\b") == 0, f"loads of single 16-bit numbers: {code}"
    assert code.shared <= _SHARED[architecture], f"more shared memory than a program may have: {code}"
    assert code.count(r"\bSTG\.") > 0, "the code was read"


@cache
def _network_launches(precision: str, architecture: int) -> dict[str, tuple[object, tuple, dict]]:
    return {_name(launch): launch for launch in _launches(NETWORK, precision, architecture)}


@pytest.mark.parametrize("kernel", tile_config.KERNELS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", tile_config.ARCHITECTURES)
def test_every_tile(architecture, precision, kernel, tmp_path, record_property):
    code = _compile(_network_launches(precision, architecture)[kernel], architecture, tmp_path)
    print(f"{kernel} {precision} sm_{architecture}: {code}")
    record_property("registers", code.registers)
    _require_sound(code, architecture)
    if kernel in ("conv_a", "conv_b", "gate"):
        product = _PRODUCT.get((precision, architecture))
        if product is None:
            assert code.count(r"\bFFMA\b") >= 256 and code.count(r"\bHG?MMA") == 0, f"not plain float32: {code}"
        else:
            assert code.count(product) > 0, f"no tensor core instruction of the expected kind: {code}"
        # Copies that run ahead of the products, 16 bytes each.
        assert code.count(r"LDGSTS\.E(\.BYPASS)?\.128 ") > 0, f"loads are not issued ahead: {code}"
        if kernel != "gate" and _KEEPS_CACHE_MODIFIER:
            assert code.count(r"LDGSTS\S*BYPASS") == 0, f"the nine taps of a pixel do not meet in L1: {code}"
        tma = kernel == "gate" and architecture >= 90
        assert (code.count(r"\bUTMALDG\.3D") > 0) == tma, f"blocks come by descriptor on 9.0, in a gate: {code}"
    assert code.count(r"STG\.E\.128 ") > 0 or kernel == "reconstruct", f"narrow stores: {code}"


@pytest.mark.parametrize("architecture", tile_config.ARCHITECTURES)
@pytest.mark.parametrize("planes", [3, 31])
def test_several_planes(planes, architecture, tmp_path):
    """Reconstruction by products instead of sums."""
    config = MemNetConfig(in_channels=planes, out_channels=planes, num_memory_blocks=2, num_recursions=1)
    for precision in ("fp32", "fp16"):
        launch = next(x for x in _launches(config, precision, architecture) if _name(x) == "reconstruct")
        _require_sound(_compile(launch, architecture, tmp_path), architecture)


@pytest.mark.parametrize("channels", [5, 48, 128])
def test_other_widths(channels, tmp_path):
    """16 padded channels, channels in blocks of 16, and two blocks of 64."""
    config = MemNetConfig(channels=channels, num_memory_blocks=1, num_recursions=1)
    for launch in {_name(x): x for x in _launches(config, "fp16", 80)}.values():
        _require_sound(_compile(launch, 80, tmp_path), 80)
    for precision in ("fp16", "tf32"):
        launch = next(x for x in _launches(config, precision, 90) if _name(x) == "gate")
        code = _compile(launch, 90, tmp_path)
        _require_sound(code, 90)
        assert code.count(r"\bUTMALDG\.3D") > 0, f"no block comes by descriptor: {code}"


@pytest.mark.parametrize("tma", [False, True])
def test_a_table_of_sources_keeps_wide_loads(tma, tmp_path):
    """Gates whose sources do not follow each other; no lowered plan has one, and the operation allows it."""
    kernel, args, named = _network_launches("fp16", 90)["gate"]
    args = args if tma else (args[0].base, *args[1:])
    _require_sound(_compile((kernel, args, {**named, "TABLE": True, "TMA": tma}), 90, tmp_path), 90)


def _gate_launch(slots: torch.Tensor, architecture: int = 90) -> tuple[object, dict]:
    """The first argument and the constants with which a gate over two of the slots is launched."""
    found: list = []
    one = torch.zeros(1)
    tile = tile_config.tile("gate", "fp16", architecture, slots.shape[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "gate", _Recorder(gate.gate, found))
        gate.launch(slots, (0, 1), one, 2, (one, one, one, one), slots.shape[-1], False, tile)
    (_, args, named) = found[0]
    return args[0], named


def test_a_descriptor_only_where_one_can_stand_for_the_slots():
    """Decided before the launch: no multiple of 16 bytes, coordinates beyond 32 bits, strides of 2^40 bytes."""
    plain = torch.zeros(3, 2, 5, 7, 16, dtype=torch.float16)
    described, named = _gate_launch(plain)
    assert isinstance(described, TensorDescriptor) and named["TMA"]
    assert described.base is plain and described.shape == [3, 70, 16] and described.strides == [70 * 16, 16, 1]
    assert described.block_shape == [1, named["BLOCK_P"], named["BLOCK_IN"]]
    assert _gate_launch(plain, 80)[0] is plain, "capability 8.0 has no tensor memory accelerator"
    odd = torch.zeros(plain.numel() + 4, dtype=torch.float16)[4:].view(plain.shape)
    pixels = torch.empty(3, 1, 2**16, 2**15, 16, dtype=torch.float16, device="meta")
    nearly = torch.empty(3, 1, 2**16, 2**15 - 1, 16, dtype=torch.float16, device="meta")
    bytes_ = torch.empty(3, 1, 2**16, 2**14, 512, dtype=torch.float16, device="meta")
    for slots, expected in ((odd, False), (pixels, False), (nearly, True), (bytes_, False)):
        given, named = _gate_launch(slots)
        assert isinstance(given, TensorDescriptor) == named["TMA"] == expected, slots.shape


def test_checks_can_fail(tmp_path):
    """A tile that is known to spill (float32 products with weights on the left) is found out."""
    kernel, args, named = _network_launches("fp32", 90)["conv_a"]
    code = _compile((kernel, args, {**named, "SWAP": True, "BLOCK_IN": 64}), 90, tmp_path)
    with pytest.raises(AssertionError, match="local memory"):
        _require_sound(code, 90)


def test_the_table_has_a_line_for_every_kernel():
    for kernel in tile_config.KERNELS:
        for precision in PRECISIONS:
            for architecture in (80, 86, 89, 90, 100, 120):
                tile = tile_config.tile(kernel, precision, architecture)
                own = 90 if architecture >= 90 else 80
                assert tile == tile_config.tile(kernel, precision, own)
                pixels = tile.rows * tile.cols
                assert pixels >= 16 and pixels & (pixels - 1) == 0 and tile.depth >= 16
                # A block of a descriptor has 256 lines at most.
                assert tile.tma == (kernel == "gate" and own == 90) and (pixels <= 256 or not tile.tma)
    with pytest.raises(ValueError, match=r"7\.5"):
        tile_config.tile("gate", "fp16", 75)
