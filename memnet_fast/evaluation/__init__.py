"""Images degraded, restored and compared by a named protocol."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from memnet_fast import metrics
from memnet_fast.errors import ImageCorrupt, InputError, MemNetError
from memnet_fast.metrics import Protocol
from memnet_fast.restore.color import luma
from memnet_fast.tasks import Task

Restore = Callable[[Tensor], Tensor]

# What is degraded, restored and compared of a colour image. Of a gray image it is always the gray values.
PROTOCOLS = {
    "paper": "one plane, rounded to 8 bits: MATLAB's rgb2gray for denoise, the Y of its rgb2ycbcr (16..235) otherwise",
    "full-y": "one plane, rounded to 8 bits: full-range luma (JFIF, 0..255)",
    "rgb": "R, G and B, each plane by itself; PSNR over all values, SSIM as the mean over planes",
}
_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg", ".webp")
_FORMATS = ("PNG", "BMP", "TIFF", "JPEG", "WEBP")


@dataclass(frozen=True)
class Score:
    """PSNR in dB and SSIM (None for images too small for its window) of what was restored and of what was given."""

    name: str
    psnr: float
    ssim: float | None
    psnr_degraded: float
    ssim_degraded: float | None


def image_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The image files in a folder, in order of name. Raises InputError for what is no folder, or cannot be listed."""
    if not os.fspath(folder):
        raise InputError("the folder of images is an empty path")
    folder = Path(folder).expanduser()
    try:
        if not folder.is_dir():
            raise InputError(f"there is no folder '{folder}'")
        return sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and p.is_file())
    except OSError as error:
        raise InputError(f"cannot list the folder {folder}: {error.strerror or error}") from error


def read_image(path: Path) -> np.ndarray:
    """[H, W] or [H, W, 3] uint8. Raises ImageCorrupt, also for kinds that no protocol knows (16 bit, transparency)."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.mode not in ("1", "L", "RGB", "P") or "transparency" in image.info:
                raise ImageCorrupt(f"{path} has mode {image.mode}; protocols are defined for 8-bit gray and RGB images")
            return np.array(image.convert("RGB" if image.mode in ("RGB", "P") else "L"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageCorrupt(f"{path} cannot be decoded: {error}") from error


def planes(image: np.ndarray, task: Task, protocol: str) -> Tensor:
    """What takes part: image [H, W] or [H, W, 3] uint8 -> float32 [K, H, W] in [0, 1]. Raises InputError."""
    if protocol not in PROTOCOLS:
        raise InputError(f"unknown protocol '{protocol}'; choose from {', '.join(PROTOCOLS)}")
    if image.ndim == 2:
        levels = image[None].astype(np.float64)
    elif protocol == "rgb":
        levels = np.moveaxis(image, -1, 0).astype(np.float64)
    else:
        if protocol == "full-y":
            y = luma(image.astype(np.float64))
        else:
            y = metrics.one_channel(image.astype(np.float64), "gray" if task.name == "denoise" else "y")
        levels = np.floor(y + 0.5)[None]
    return torch.from_numpy(levels).div(255).float()


def compare(task: Task, level: float) -> Protocol:
    """Planes were chosen before; border and rounding are the paper's for all protocols."""
    paper = task.protocol(level)
    return Protocol("all", paper.shave, paper.rounded)


def degraded_pair(clean: Tensor, task: Task, level: float, seed: int) -> tuple[Tensor, Tensor]:
    """clean: [K, H, W] float -> (degraded, clean), cropped where the task asks for it."""
    clean = task.clean(clean, level)
    return task.degrade(clean, level, torch.Generator().manual_seed(seed)), clean


def score(name: str, image: np.ndarray, restore: Restore, task: Task, level: float, protocol: str, seed: int) -> Score:
    """image: [H, W] or [H, W, 3] uint8. restore: [K, H, W] float32 -> the same, every plane by itself."""
    given, clean = degraded_pair(planes(image, task, protocol), task, level, seed)
    restored, how = restore(given), compare(task, level)
    side = min(clean.shape[-2:]) - 2 * how.shave
    structured = side >= metrics.SSIM_WINDOW
    return Score(
        name,
        metrics.psnr(restored, clean, how),
        metrics.ssim(restored, clean, how) if structured else None,
        metrics.psnr(given, clean, how),
        metrics.ssim(given, clean, how) if structured else None,
    )


def evaluate(
    files: list[Path], restore: Restore, task: Task, level: float, protocol: str = "paper", seed: int = 0
) -> Iterator[Score | tuple[Path, MemNetError]]:
    """A score for each file, or the error that one file met; noise of file i comes from seed + i."""
    task.check(level)
    for i, path in enumerate(files):
        try:
            yield score(path.name, read_image(path), restore, task, level, protocol, seed + i)
        except MemNetError as error:  # one bad file must not end the others
            yield path, error


def mean(scores: list[Score]) -> Score:
    """The mean over images, as the published tables have it."""

    def of(values: list[float | None]) -> float | None:
        there = [v for v in values if v is not None]
        return sum(there) / len(there) if there else None

    return Score(
        "mean",
        of([s.psnr for s in scores]) or math.nan,
        of([s.ssim for s in scores]),
        of([s.psnr_degraded for s in scores]) or math.nan,
        of([s.ssim_degraded for s in scores]),
    )


@torch.no_grad()
def mean_psnr(net: Restore, images: list[Tensor], task: Task, level: float, seed: int = 0) -> tuple[float, float]:
    """Mean PSNR in dB over gray images [H, W] uint8 by the paper's protocol: (restored, degraded).

    net: a network, [1, 1, H, W] -> the same, on the device of its first parameter, or on the CPU.
    """
    parameter = next(net.parameters(), None) if isinstance(net, torch.nn.Module) else None
    device = torch.device("cpu") if parameter is None else parameter.device
    after, before = [], []
    for i, image in enumerate(images):
        given, clean = degraded_pair(planes(image.numpy(), task, "paper"), task, level, seed + i)
        restored = net(given[None].to(device))[0].cpu()
        after.append(metrics.psnr(restored, clean, compare(task, level)))
        before.append(metrics.psnr(given, clean, compare(task, level)))
    return sum(after) / len(after), sum(before) / len(before)
