"""`Restorer`: images of any common kind in, the same kind out, through a fused network and exact tiles."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Sequence
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
from memnet_fast.resize import axes, resample
from memnet_fast.restore import color as colors
from memnet_fast.restore import images
from memnet_fast.restore.tiling import OFFICIAL_TILES, Progress, Tiled, Tiler, Window
from memnet_fast.weights import load_weights

DEFAULT_MODELS = {"denoise": "memnet_m6r6.denoise", "deblock": "memnet_m6r6.deblock", "sr": "memnet_m6r6.sr"}
SCALES = (2, 3, 4)
_FLOAT_ARRAYS = ("f2", "f4", "f8")
_FLOAT_TENSORS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Noise takes values of a [0, 1] image somewhat beyond 1; above this, it is an image in 0..255 passed by mistake.
_SUSPICIOUS = 1.5
# A result of this many bytes is followed by a file of that order; the workspace, needed last, makes room for it.
_LARGE_RESULT = 1 << 28


@dataclass(frozen=True)
class Restored:
    """An image of the same kind as the one given (scale times as large), and how it was computed."""

    image: Any
    tiled: Tiled


class Restorer:
    """Restores images.

    task: "denoise" (Gaussian noise of unknown strength), "deblock" (artefacts of JPEG compression), "sr" (super-resolution).
    scale: 2, 3 or 4 with "sr", where it must be given. The image is enlarged by MATLAB's bicubic resampling (`resize`), and the
    network restores what that blurs; with color "y" chroma, and always alpha, stay as the bicubic resampling gives them.
    model: a name of `list_models()`, a weight file, a MemNet or a FusedMemNet, with one channel in and out; None is the bundled
    model of the task.
    backend, precision, algorithm: as for `fuse`. device: "cpu", "cuda", "cuda:1", or "auto": CUDA where there is one, but a
    network that is passed in stays where it is.
    tile: "auto" (the whole image if its workspace fits into 40 % of the free memory and 2 GiB, on a GPU 60 % and 16 GiB, else
    the largest tile that does), 0 (whole image), or the side of the square windows in pixels. A tile that turns out too large
    is halved.
    overlap: "exact" (the receptive radius: tiled and whole results are equal; bit by bit with algorithm "direct", to rounding
    with "winograd"), or the number of pixels that windows lose at inner edges (an approximation). 16 cuts exactly as the
    official test scripts do, with tile "auto" into their blocks (`tiling.OFFICIAL_TILES`), however much memory there is.
    batch: "auto", or how many windows are computed at once. tta: average over the 8 flips and rotations.
    color: "y" restores luma and keeps chroma, "rgb" restores each channel, "gray" gives one channel. Gray images stay gray.

    Calling it, restorer(image), gives the same kind, size (times scale), dtype and mode back:
      PIL image by the rules of `memnet_fast.restore.images` (EXIF, XMP, ICC profile and resolution stay in `info`);
      numpy array [H, W] or [H, W, C], uint8, uint16, float16, float32, float64, any strides and byte order;
      float tensor [H, W], [C, H, W] or [N, C, H, W] on any device; images of a batch do not influence each other.
    C is 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGBA); alpha is kept as it is, and colour below alpha 0 restored like any
    other. With color "gray" the number of axes stays, and C becomes 1, or 2 with alpha. Floats are images in [0, 1]; values
    outside are legal (noise), and float results are neither clipped nor rounded. A maximum above 1.5 gives a UserWarning. The
    network computes in float32 at most.

    Raises InputError (a kind of input or option that is not restored, NaN or infinity in it), BackendUnavailable,
    ImageUnsupported (mode of a PIL image), DeviceOOM, NumericError, and the errors of `load_weights`.
    May be called from several threads.

    options: what can change a pixel, by the names above, as JSON values; the weights of the network are not among it.
    """

    def __init__(
        self,
        task: str = "denoise",
        *,
        scale: int | None = None,
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
        if task == "sr" and (type(scale) is not int or scale not in SCALES):
            raise InputError(f"super-resolution needs a scale of {', '.join(map(str, SCALES))}, got {scale!r}")
        if task != "sr" and (scale is not None):
            raise InputError(f"the task '{task}' has no scale, got {scale!r}")
        if color not in colors.COLOR_MODES:
            raise InputError(f"unknown color '{color}'; choose from {', '.join(colors.COLOR_MODES)}")
        limits = (("tile", tile, "auto", 0), ("overlap", overlap, "exact", 0), ("batch", batch, "auto", 1))
        for name, value, word, least in limits:
            if value != word and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise InputError(f"{name} must be '{word}' or a whole number of at least {least}, got {value!r}")
        self.task = task
        self.scale = scale or 1
        self.color = color
        self.model_name, net = _network(task, model)
        config = net.config
        if (config.in_channels, config.out_channels) != (1, 1):
            raise InputError(
                f"{self.model_name} has {config.in_channels} channels in and {config.out_channels} out; only networks with one "
                f"channel in and out restore images here"
            )
        self.net = placed(net, backend, precision, algorithm, device, own=not isinstance(model, nn.Module))
        self._tiler = Tiler(self.net, tile, overlap, batch, tta, OFFICIAL_TILES[task])
        # What was chosen stands in the place of "auto" where the choice decides about bits.
        chosen = {"backend": self.net.backend, "precision": self.net.precision, "algorithm": self.net.algorithm}
        self.options: dict[str, Any] = {"task": task, "scale": self.scale, "color": color, "tta": tta, **chosen}
        self.options |= {"tile": tile, "overlap": overlap}

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

    def restore_many(self, arrays: Sequence[np.ndarray], progress: Progress | None = None) -> list[Restored]:
        """Arrays [H, W, C] of one shape and dtype, computed together; each has the bits that it has alone."""
        if len({(a.shape, a.dtype) for a in arrays}) > 1 or any(a.ndim != 3 for a in arrays):
            raise InputError("only arrays [H, W, C] of one shape and dtype are restored together")
        for array in arrays:
            _check_array(array)
        if not arrays:
            return []
        results, tiled = self._run(np.stack(arrays), progress)
        return [Restored(result, tiled) for result in results]

    def _restore_pil(self, image: Image.Image, progress: Progress | None) -> Restored:
        if image.width < 1 or image.height < 1:
            raise InputError(f"the image has no pixels: {image.width} x {image.height}")
        plain = images.plain_mode(image)
        pixels, tiled = self._run(images.to_array(plain)[None], progress)
        result = images.from_array(pixels[0].astype(">u2") if plain.mode == "I;16B" else pixels[0])
        kept = images.metadata_of(image).fitting(*result.size, pixels.shape[-1])
        for key, value in (("exif", kept.exif), ("icc_profile", kept.icc), ("dpi", kept.dpi), ("xmp", kept.xmp)):
            if value:
                result.info[key] = value
        return Restored(result, tiled)

    def _restore_array(self, array: np.ndarray, progress: Progress | None) -> Restored:
        if array.ndim not in (2, 3):
            raise InputError(f"expected an array [H, W] or [H, W, C], got shape {list(array.shape)}")
        _check_array(array)
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
        """pixels: [N, H, W, C] of any strides -> [N, H * scale, W * scale, C'], the same dtype."""
        n, h, w, channels = pixels.shape
        colour = colors.colour_channels(channels)
        if h < 1 or w < 1:
            raise InputError(f"the image has no pixels: {w} x {h}")
        if pixels.dtype.kind == "f" and n > 0:
            _check_floats(pixels[..., :colour])
        kept = 1 if self.color == "gray" else colour
        out = np.empty((n, h * self.scale, w * self.scale, kept + channels - colour), pixels.dtype)
        if self.scale == 1:
            out[..., kept:] = pixels[..., colour:]

        def read(i: int, window: Window) -> np.ndarray:
            if self.scale == 1:
                return colors.planes(colors.to_unit(pixels[i][window.whole]), self.color)
            # Luma first and then larger: one plane instead of three.
            return _enlarged(pixels[i], self.scale, window.whole, lambda part: colors.planes(colors.to_unit(part), self.color))

        def write(i: int, window: Window, seen: np.ndarray, restored: np.ndarray) -> None:
            target = out[i][window.core]
            unit = None
            if self.color == "y" and colour == 3:
                unit = self._unit(pixels[i], window.core)
            target[..., :kept] = colors.to_samples(colors.merge(unit, seen, restored), pixels.dtype)
            if self.scale > 1 and channels > colour:
                alpha = _enlarged(pixels[i], self.scale, window.core, lambda part: colors.alpha_plane(part)[None])[0]
                target[..., kept] = colors.to_samples(np.clip(alpha, 0, 1), pixels.dtype)

        size = (h * self.scale, w * self.scale)
        tiled = self._tiler.run(n, *size, read, write, self.device, progress, out.nbytes)
        if out.nbytes >= _LARGE_RESULT:
            self.net.release_workspace()
        return out, tiled

    def _unit(self, pixels: np.ndarray, place: tuple[slice, slice]) -> np.ndarray:
        """The colour channels [h, w, 1 or 3] at a place of the result, before the network changes them."""
        if self.scale == 1:
            return colors.to_unit(pixels[place])
        return np.moveaxis(_enlarged(pixels, self.scale, place, lambda part: np.moveaxis(colors.to_unit(part), -1, 0)), 0, -1)


def _enlarged(
    pixels: np.ndarray, scale: int, place: tuple[slice, slice], planes: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Planes [K, h', w'] at a place of the enlarged image. pixels: [H, W, C]; planes(part): [K, h, w] of a part of it."""
    row_taps, col_taps = axes((pixels.shape[0], pixels.shape[1]), scale)
    rows, row_taps = row_taps.part(place[0].start, place[0].stop)
    cols, col_taps = col_taps.part(place[1].start, place[1].stop)
    part = np.ascontiguousarray(planes(pixels[rows, cols]))
    return resample(torch.from_numpy(part), row_taps, col_taps).numpy()


def _check_array(array: np.ndarray) -> None:
    if array.dtype.newbyteorder("=").str[1:] not in ("u1", "u2", *_FLOAT_ARRAYS):
        raise InputError(f"expected dtype uint8, uint16, float16, float32 or float64, got {array.dtype}; convert it first")


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
    if not may_exist(name):
        known = ", ".join(list_models(pretrained=True)) or "none are bundled"
        raise InputError(f"there is no model and no file '{name}'; bundled models: {known}")
    return name, load_weights(name)


def may_exist(path: str) -> bool:
    """Whether there is something, or it cannot be told; who reads it then says why."""
    try:
        return Path(path).exists()
    except OSError:
        return True


def placed(net: MemNet | FusedMemNet, backend: str, precision: str, algorithm: str, device: str, own: bool) -> FusedMemNet:
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
