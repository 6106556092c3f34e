"""Everything that can run the network: this package's backends, and the engines of others in their best configuration.

All get the same network and the same weights from one folder, which prepare.py fills, and the same number of threads.
`own_variants` and `peer_variants` say what can be asked for on a device, `missing` what is not installed; `make` builds one of
them inside its own process (worker.py). Modules of engines are imported there only.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from memnet_fast.bench.worker import Runner
    from memnet_fast.reference import MemNet

# glibc gives large blocks back to the system at every free, and the page faults that follow are half of the time of engines
# that allocate large activations. They run with pages kept, their best; the "default allocator" peer shows what a user gets
# without it. This package needs no such help: it keeps its workspace.
KEEP_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "67108864",
}
# What makes those who listen leave AVX-512 alone.
AVX2 = {
    "MEMNET_ISA": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "OV_CPU_MAX_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
}
INSTALL = "pip install memnet_fast[bench]"
_JAX = "pip install jax, or for an NVIDIA GPU jax[cuda13]"


@dataclass(frozen=True)
class Variant:
    """own: backend, precision and algorithm of this package; otherwise a peer. needs: modules that must be there. files: of
    prepare.py. environment: of its process. masks: it can be told to leave AVX-512 alone. extra: no part of a run of two
    minutes: its start or its runs take long, or another row is the same engine at its best. clamped: its result is one of
    [0, 1].
    """

    name: str
    precision: str
    own: tuple[str, str, str] | None = None
    needs: tuple[str, ...] = ()
    install: str = INSTALL
    files: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=lambda: KEEP_PAGES)
    masks: bool = True
    extra: bool = False
    clamped: bool = False
    note: str = ""

    def missing(self) -> list[str]:
        """The modules that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def own_variants(net: MemNet, device: str) -> list[Variant]:
    """This package's backends, precisions and algorithms that run on a device, the best first; "torch", the specification of
    the numerics, last and in float32 only.
    """
    import torch

    from memnet_fast import backends

    found = []
    for backend, module in backends.LADDER.items():
        for precision in module.PRECISIONS if backend != "torch" else ("fp32",):
            for algorithm in module.ALGORITHMS:
                if module.why_not(net.config, torch.device(device), precision, algorithm) is None:
                    words = ["memnet_fast", backend]
                    words += [precision] if precision != "fp32" else []
                    words += [algorithm] if algorithm != module.ALGORITHMS[0] else []
                    found.append(Variant(" ".join(words), precision, (backend, precision, algorithm), environment={}))
    return found


_OPENVINO: dict[str, Any] = {"needs": ("onnx", "onnxscript", "onnxruntime", "openvino"), "files": ("onnx",), "clamped": True}
_CPU_PEERS: tuple[Variant, ...] = (
    Variant("eager", "fp32", extra=True),
    Variant("eager channels_last", "fp32"),
    Variant("eager channels_last, default allocator", "fp32", environment={}, extra=True),
    Variant("torch.compile", "fp32", extra=True),
    Variant("torch.compile freezing", "fp32", extra=True),
    Variant("torch.compile max-autotune", "fp32", extra=True),
    Variant("ONNX Runtime", "fp32", needs=_OPENVINO["needs"][:3], files=("onnx",), masks=False, clamped=True),
    Variant("OpenVINO latency", "fp32", **_OPENVINO),
    Variant("OpenVINO throughput", "fp32", **_OPENVINO, extra=True, note="several images in flight; time for one"),
    Variant("ncnn", "fp32", needs=("ncnn",), files=("ncnn",), masks=False),
    Variant("JAX", "fp32", needs=("jax",), install=_JAX, extra=True),
    Variant("eager bf16 channels_last", "bf16"),
    Variant("autocast bf16 channels_last", "bf16", extra=True),
    Variant("torch.compile freezing bf16", "bf16", extra=True),
    Variant("OpenVINO latency bf16", "bf16", **_OPENVINO),
    Variant("OpenVINO throughput bf16", "bf16", **_OPENVINO, extra=True, note="several images in flight; time for one"),
    Variant("ncnn bf16", "bf16", needs=("ncnn",), files=("ncnn",), masks=False),
)


def peer_variants(device: str) -> list[Variant]:
    """Engines of others that exist for a device, installed or not."""
    if device == "cpu":
        return list(_CPU_PEERS)
    from memnet_fast.bench.gpu_peers import GPU_PEERS

    found = [Variant(name, peer.precision, extra=peer.slow, environment={}) for name, peer in GPU_PEERS.items()]
    # It would take most of the memory of the GPU at once, which the subject shares.
    some = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return [*found, Variant("JAX fp16", "fp16", needs=("jax",), install=_JAX, environment=some, extra=True)]


def select(variants: list[Variant], text: str) -> list[Variant]:
    """Of these, all, fast (those that are no extra), none, or those that a list names: by their name, or by a part of
    it where no name is meant exactly. Raises InputError for a word that names nothing.
    """
    from memnet_fast.errors import InputError

    if text in ("all", "none"):
        return variants if text == "all" else []
    if text == "fast":
        return [v for v in variants if not v.extra]
    found: set[str] = set()
    for word in (part.strip().lower() for part in text.split(",")):
        names = [v.name for v in variants if v.name.lower() == word] or [
            v.name for v in variants if word and word in v.name.lower()
        ]
        if not names:
            raise InputError(f"no peer is called '{word}'; there are {'; '.join(v.name for v in variants)}")
        found.update(names)
    return [v for v in variants if v.name in found]


# In the process of a variant -----------------------------------------------------------------------------------------


def make(settings: dict[str, Any]) -> Runner:
    """The peer of worker.py's settings."""
    name, device = settings["peer"], settings["device"]
    words = name.replace(",", "").split()
    if words[0] == "OpenVINO":
        return _OpenVino(settings, throughput="throughput" in words, bf16="bf16" in words)
    if words[0] == "ONNX":
        return _OnnxRuntime(settings)
    if words[0] == "ncnn":
        return _Ncnn(settings, bf16="bf16" in words)
    if words[0] == "JAX":
        from memnet_fast.bench.jax_network import JaxRunner

        return JaxRunner(settings, "float16" if "fp16" in words else "float32")
    return _plain(settings, name, device)


def _plain(settings: dict[str, Any], name: str, device: str) -> Runner:
    """PyTorch's own ways."""
    import torch

    from memnet_fast.bench.gpu_peers import GPU_PEERS
    from memnet_fast.bench.worker import TorchRunner
    from memnet_fast.weights import load_weights

    torch.set_num_threads(settings["threads"])
    net = load_weights(Path(settings["folder"]) / "weights.safetensors").to(device)
    shape, channels = tuple(settings["shape"]), net.config.in_channels
    if device != "cpu":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # fp32 means float32
        n, h, w = shape
        image = torch.zeros((n, channels, h, w), device=device)
        with torch.inference_mode():
            return TorchRunner(GPU_PEERS[name].make(net, image), shape, channels, device)
    return TorchRunner(plain_on_cpu(net, name), shape, channels, device)


def plain_on_cpu(net: MemNet, name: str) -> Callable[[Any], Any]:
    """A peer of PyTorch by name: [N, C, H, W] float32 -> [N, C, H, W]."""
    import torch

    bf16 = "bf16" in name.split()
    if bf16 and not name.startswith("autocast"):
        net = net.to(torch.bfloat16)
    last = torch.channels_last if name != "eager" else torch.contiguous_format
    net = net.to(memory_format=last)  # type: ignore[call-overload]
    run: Callable[[Any], Any] = net
    if name.startswith("torch.compile"):
        import torch._inductor.config as inductor

        inductor.freezing = "freezing" in name or "max-autotune" in name  # inductor's GEMM templates need frozen weights
        if os.environ.get("MEMNET_ISA") == "avx2":
            inductor.cpp.simdlen = 256
        # On a CPU there are no CUDA graphs to leave out; the mode's name says so.
        run = torch.compile(net, dynamic=False, mode="max-autotune-no-cudagraphs" if "max-autotune" in name else None)
    dtype = torch.bfloat16 if bf16 and not name.startswith("autocast") else torch.float32

    def forward(x: Any) -> Any:
        return run(x.to(dtype).contiguous(memory_format=last))

    if not name.startswith("autocast"):
        return forward

    def cast(x: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(x)

    return cast


class _OnCpu:
    in_flight, device = 1, "cpu"

    def device_peak_mib(self) -> None:
        return None


class _OnnxRuntime(_OnCpu):
    def __init__(self, settings: dict[str, Any]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = settings["threads"], 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        for name, size in zip("NHW", settings["shape"], strict=True):
            options.add_free_dimension_override_by_name(name, size)
        path = str(Path(settings["folder"]) / "model.onnx")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._image = self._result = np.empty(0, np.float32)

    def load(self, image: np.ndarray) -> None:
        self._image = _into(self._image, image)

    def run(self) -> None:
        (self._result,) = self._session.run(["restored"], {"image": self._image})

    def result(self) -> np.ndarray:
        return self._result


class _OpenVino(_OnCpu):
    """latency: one image at a time on all threads. throughput: as many images in flight as OpenVINO finds best; images of a
    batch one by one, a single image several times.
    """

    def __init__(self, settings: dict[str, Any], throughput: bool, bf16: bool) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(Path(settings["folder"]) / "model.onnx")
        n, h, w = settings["shape"]
        channels = model.input(0).get_partial_shape()[1].get_length()
        model.reshape([1 if throughput else n, channels, h, w])
        config = {
            "PERFORMANCE_HINT": "THROUGHPUT" if throughput else "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            "INFERENCE_NUM_THREADS": settings["threads"],
        }
        compiled = core.compile_model(model, "CPU", config)
        jobs = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS") if throughput else 1
        self.in_flight = jobs if throughput and n == 1 else 1
        self._queue = openvino.AsyncInferQueue(compiled, jobs)
        self._queue.set_callback(self._take)
        self._image = np.empty(0, np.float32)
        self._pieces = n * self.in_flight if throughput else 1
        self._split = throughput
        self._result = np.empty((n, channels, h, w), np.float32)

    def _take(self, request: Any, place: int) -> None:
        found = request.get_output_tensor(0).data
        if self._split:
            self._result[place] = found[0]
        else:
            self._result[...] = found

    def load(self, image: np.ndarray) -> None:
        self._image = _into(self._image, image)

    def run(self) -> None:
        n = len(self._image)
        for i in range(self._pieces):
            self._queue.start_async({0: self._image[i % n : i % n + 1] if self._split else self._image}, i % n)
        self._queue.wait_all()

    def result(self) -> np.ndarray:
        return self._result


class _Ncnn(_OnCpu):
    """It takes one image at a time."""

    def __init__(self, settings: dict[str, Any], bf16: bool) -> None:
        import ncnn

        self._ncnn, self._net = ncnn, ncnn.Net()
        options = self._net.opt
        options.num_threads = settings["threads"]
        options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = False
        options.use_bf16_storage = bf16
        options.use_winograd_convolution = options.use_sgemm_convolution = options.use_packing_layout = True
        folder = Path(settings["folder"])
        if self._net.load_param(str(folder / "model.param")) or self._net.load_model(str(folder / "model.bin")):
            raise RuntimeError("ncnn cannot read its model")
        self._image = self._result = np.empty(0, np.float32)

    def load(self, image: np.ndarray) -> None:
        self._image = _into(self._image, image)
        self._result = np.empty_like(image)

    def run(self) -> None:
        for i, image in enumerate(self._image):
            extractor = self._net.create_extractor()
            # A copy: with lightmode it releases its inputs, and memory of NumPy is not its own.
            extractor.input("image", self._ncnn.Mat(image).clone())
            code, found = extractor.extract("restored")
            if code:
                raise RuntimeError(f"ncnn failed with {code}")
            self._result[i] = np.array(found)

    def result(self) -> np.ndarray:
        return self._result


def _into(place: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The image in the same memory as before, so that a cache by address would show."""
    if place.shape != image.shape:
        return np.array(image, order="C")
    place[...] = image
    return place
