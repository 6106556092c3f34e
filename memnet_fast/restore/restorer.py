"""`Restorer`: images of any common kind in, the same kind out, through a fused network and exact tiles."""

from __future__ import annotations

import copy
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from memnet_fast.errors import BackendUnavailable, InputError
from memnet_fast.fused import FusedMemNet, fuse
from memnet_fast.models import create_model, list_models
from memnet_fast.reference import MemNet
from memnet_fast.restore import color as colors
from memnet_fast.restore import images
from memnet_fast.restore.tiling import Progress, Tiled, Tiler, Window
from memnet_fast.weights import load_weights

DEFAULT_MODELS = {"denoise": "memnet_m6r6.denoise"}
_FLOAT_ARRAYS = ("f2", "f4", "f8")
_FLOAT_TENSORS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Noise takes values of a [0, 1] image somewhat beyond 1; above this, it is an image in 0..255 passed by mistake.
_SUSPICIOUS = 1.5


@dataclass(frozen=True)
class Restored:
    """An image of the same kind as the one given, and how it was computed."""

    image: Any
    tiled: Tiled


class Restorer:
    """Restores images.

    task: "denoise" (Gaussian noise of unknown strength). model: a name of `list_models()`, a weight file, a MemNet or a
    FusedMemNet, with one channel in and out; None is the bundled model of the task.
    backend, precision, algorithm: as for `fuse`. device: "cpu", "cuda", "cuda:1", or "auto": CUDA where there is one, but a
    network that is passed in stays where it is.
    tile: "auto" (the whole image if its workspace fits into 40 % of the free memory and 2 GiB, else the largest tile that
    does), 0 (whole image), or the side of the square windows in pixels. A tile that turns out too large is halved.
    overlap: "exact" (the receptive radius: tiled and whole results are equal; bit by bit with algorithm "direct", to rounding
    with "winograd"), or the number of pixels that windows lose at inner edges (16: the official scripts; an approximation).
    batch: "auto", or how many windows are computed at once. tta: average over the 8 flips and rotations.
    color: "y" restores luma and keeps chroma, "rgb" restores each channel, "gray" gives one channel. Gray images stay gray.

    Calling it, restorer(image), gives the same kind, size, dtype and mode back:
      PIL image in a mode of the table in `memnet_fast.restore.images` (EXIF, ICC profile and resolution stay in `info`);
      numpy array [H, W] or [H, W, C], uint8, uint16, float16, float32, float64, any strides and byte order;
      float tensor [H, W], [C, H, W] or [N, C, H, W] on any device; images of a batch do not influence each other.
    C is 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGBA); alpha is kept as it is. With color "gray" the number of axes stays,
    and C becomes 1, or 2 with alpha. Floats are images in [0, 1]; values outside are legal (noise), and float results are
    neither clipped nor rounded. A maximum above 1.5 gives a UserWarning. The network computes in float32 at most.

    Raises InputError (a kind of input or option that is not restored, NaN or infinity in it), BackendUnavailable,
    ImageUnsupported (mode of a PIL image), DeviceOOM, NumericError, and the errors of `load_weights`.
    May be called from several threads.
    """

    def __init__(
        self,
        task: str = "denoise",
        *,
        model: str | os.PathLike[str] | MemNet | FusedMemNet | None = None,
        backend: str = "auto",
        precision: str = "auto",
        device: str = "auto",
        algorithm: str = "auto",
        tile: int | str = "auto",
        overlap: int | str = "exact",
        batch: int | str = "auto",
        tta: bool = False,
        color: str = "y",
    ) -> None:
        if task not in DEFAULT_MODELS:
            raise InputError(f"unknown task '{task}'; choose from {', '.join(DEFAULT_MODELS)}")
        if color not in colors.COLOR_MODES:
            raise InputError(f"unknown color '{color}'; choose from {', '.join(colors.COLOR_MODES)}")
        limits = (("tile", tile, "auto", 0), ("overlap", overlap, "exact", 0), ("batch", batch, "auto", 1))
        for name, value, word, least in limits:
            if value != word and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise InputError(f"{name} must be '{word}' or a whole number of at least {least}, got {value!r}")
        self.task = task
        self.color = color
        self.model_name, net = _network(task, model)
        config = net.config
        if (config.in_channels, config.out_channels) != (1, 1):
            raise InputError(
                f"{self.model_name} has {config.in_channels} channels in and {config.out_channels} out; only networks with one "
                f"channel in and out restore images here"
            )
        self.net = _placed(net, backend, precision, algorithm, device, own=not isinstance(model, nn.Module))
        self._tiler = Tiler(self.net, tile, overlap, batch, tta)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def backend(self) -> str:
        return self.net.backend

    @property
    def precision(self) -> str:
        return self.net.precision

    @property
    def algorithm(self) -> str:
        return self.net.algorithm

    def __call__(self, image: Any, progress: Progress | None = None) -> Any:
        """The restored image. progress(done, total): told after each call of the network how many windows are done."""
        return self.restore(image, progress).image

    def restore(self, image: Any, progress: Progress | None = None) -> Restored:
        """As a call, with the tile size and the number of windows."""
        if isinstance(image, Image.Image):
            return self._restore_pil(image, progress)
        if isinstance(image, np.ndarray):
            return self._restore_array(image, progress)
        if isinstance(image, Tensor):
            return self._restore_tensor(image, progress)
        raise InputError(f"expected a PIL image, a numpy array or a torch tensor, got {type(image).__name__}")

    def _restore_pil(self, image: Image.Image, progress: Progress | None) -> Restored:
        if image.width < 1 or image.height < 1:
            raise InputError(f"the image has no pixels: {image.width} x {image.height}")
        plain = images.plain_mode(image)
        pixels, tiled = self._run(images.to_array(plain)[None], progress)
        result = images.from_array(pixels[0])
        kept = images.metadata_of(image)
        for key, value in (("exif", kept.exif), ("icc_profile", kept.icc), ("dpi", kept.dpi)):
            if value:
                result.info[key] = value
        return Restored(result, tiled)

    def _restore_array(self, array: np.ndarray, progress: Progress | None) -> Restored:
        if array.ndim not in (2, 3):
            raise InputError(f"expected an array [H, W] or [H, W, C], got shape {list(array.shape)}")
        native = array.dtype.newbyteorder("=").str[1:]
        if native not in ("u1", "u2", *_FLOAT_ARRAYS):
            raise InputError(f"expected dtype uint8, uint16, float16, float32 or float64, got {array.dtype}; convert it first")
        pixels = np.asarray(array)[None]
        pixels, tiled = self._run(pixels[..., None] if array.ndim == 2 else pixels, progress)
        return Restored(pixels[0, ..., 0] if array.ndim == 2 else pixels[0], tiled)

    def _restore_tensor(self, tensor: Tensor, progress: Progress | None) -> Restored:
        if tensor.layout != torch.strided or tensor.ndim not in (2, 3, 4):
            raise InputError(f"expected a dense tensor [H, W], [C, H, W] or [N, C, H, W], got shape {list(tensor.shape)}")
        if tensor.dtype not in _FLOAT_TENSORS:
            raise InputError(f"expected a float tensor in [0, 1], got {tensor.dtype}; for uint8 use tensor.float() / 255")
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        host = tensor.detach().to("cpu", wide).resolve_neg()
        host = host.view(*(1,) * (4 - host.ndim), *host.shape) if host.ndim < 4 else host  # [N, C, H, W]
        pixels, tiled = self._run(host.permute(0, 2, 3, 1).numpy(), progress)
        # Through the dtype of the input only what was computed has to go: alpha came from it and goes back unchanged.
        result = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(tensor.device, tensor.dtype).contiguous()
        return Restored(result.reshape(result.shape[4 - tensor.ndim :]), tiled)

    def _run(self, pixels: np.ndarray, progress: Progress | None) -> tuple[np.ndarray, Tiled]:
        """pixels: [N, H, W, C] of any strides -> [N, H, W, C'], the same dtype."""
        n, h, w, channels = pixels.shape
        colour = colors.colour_channels(channels)
        if h < 1 or w < 1:
            raise InputError(f"the image has no pixels: {w} x {h}")
        if pixels.dtype.kind == "f" and n > 0:
            _check_floats(pixels[..., :colour])
        kept = 1 if self.color == "gray" else colour
        out = np.empty((n, h, w, kept + channels - colour), pixels.dtype)
        out[..., kept:] = pixels[..., colour:]

        def read(i: int, window: Window) -> np.ndarray:
            return colors.planes(colors.to_unit(pixels[i][window.whole]), self.color)

        def write(i: int, window: Window, restored: np.ndarray) -> None:
            unit = colors.to_unit(pixels[i][window.core])
            merged = colors.merge(unit, colors.planes(unit, self.color), restored, self.color)
            out[i][window.core][..., :kept] = colors.to_samples(merged, pixels.dtype)

        return out, self._tiler.run(n, h, w, read, write, self.device, progress)


def _check_floats(values: np.ndarray) -> None:
    """values: [N, H, W, C] floats, not empty."""
    low, high = float(values.min()), float(values.max())  # both hand NaN on
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError("the image contains NaN or infinity")
    if high > _SUSPICIOUS:
        warnings.warn(
            f"the image has values up to {high:.4g}, but float images are expected in [0, 1]; divide a 0..255 image by 255",
            UserWarning,
            stacklevel=6,
        )


def _network(task: str, model: Any) -> tuple[str, MemNet | FusedMemNet]:
    """A name to show, and the network."""
    if isinstance(model, MemNet | FusedMemNet):
        return type(model).__name__, model
    if isinstance(model, nn.Module):
        raise InputError(f"expected a MemNet or a FusedMemNet, not {type(model).__name__}")
    if model is None:
        model = DEFAULT_MODELS[task]
        if model not in list_models():
            raise InputError(f"the weights {model} are not bundled with this installation; name a model or a weight file")
    if not isinstance(model, str | os.PathLike):
        raise InputError(f"model must be a name, a path or a network, not {type(model).__name__}")
    name = os.fspath(model)
    if name in list_models(pretrained=True):
        return name, create_model(name)
    if name in list_models():
        raise InputError(f"'{name}' has no weights, and random ones restore nothing; name a weight file or a bundled model")
    if not Path(name).exists():
        known = ", ".join(list_models(pretrained=True)) or "none are bundled"
        raise InputError(f"there is no model and no file '{name}'; bundled models: {known}")
    return name, load_weights(name)


def _placed(net: MemNet | FusedMemNet, backend: str, precision: str, algorithm: str, device: str, own: bool) -> FusedMemNet:
    """The network fused, on the device asked for. A network of the caller (not own) is never moved: a copy is."""
    where = next(net.parameters()).device
    target = where
    if device != "auto":
        try:
            target = torch.device(device)
        except RuntimeError:
            target = torch.device("meta")
        if target.type not in ("cpu", "cuda"):
            raise InputError(f"unknown device '{device}'; choose from auto, cpu, cuda, cuda:N")
    elif own and torch.cuda.is_available():
        target = torch.device("cuda")
    if target.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (target.index or 0) >= count:
            there = f"this machine has {count} CUDA devices" if count else "PyTorch sees no CUDA device"
            raise BackendUnavailable(backend, f"device {device} does not exist: {there}")
        target = torch.device("cuda", torch.cuda.current_device() if target.index is None else target.index)
    if isinstance(net, FusedMemNet) and target == where and (backend, precision, algorithm) == ("auto",) * 3:
        return net
    if target != where:
        net = copy.deepcopy(net.reference if isinstance(net, FusedMemNet) else net).to(target)
    return fuse(net, backend, precision, algorithm)
