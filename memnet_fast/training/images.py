"""Training images: a folder is read once, wholly, and what cannot be used is known before the first step."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from memnet_fast.errors import InputError

_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")
_FORMATS = ("PNG", "BMP", "TIFF", "JPEG")
# More unusable files than this share are a wrong folder, not a few bad files.
_BAD_SHARE = 0.1
_log = logging.getLogger(__name__)


def load_gray_images(folder: str | os.PathLike[str], least: int = 1) -> list[Tensor]:
    """Every PNG, BMP, TIFF and JPEG file below a folder in order of name, each [H, W] uint8; colour becomes luma.

    least: images with a smaller side are left out, as are files that cannot be decoded; a warning counts them and names the
    first. Another one counts JPEG files: sets like BSDS come so, but what was lost is lost. Raises InputError where no image
    is left, or where more than a tenth of the files is left out.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"there is no folder '{folder}'")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not paths:
        raise InputError(f"no image (PNG, BMP, TIFF or JPEG) in {folder}")
    images, bad, compressed = [], [], 0
    for path in paths:
        try:
            with Image.open(path, formats=_FORMATS) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"mode {image.mode}: only 8-bit images are read")  # Pillow would clip them
                pixels = np.array(image.convert("L"))
                lossy = image.format == "JPEG"
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            bad.append(f"{path}: {error}")
            continue
        if min(pixels.shape) < least:
            bad.append(f"{path}: {pixels.shape[1]} x {pixels.shape[0]} is smaller than {least} x {least}")
            continue
        images.append(torch.from_numpy(pixels))
        compressed += lossy
    if compressed:
        text = "%d of %d images in %s are JPEG files; their artefacts are trained, or measured, as if they were the truth"
        _log.warning(text, compressed, len(images), folder)
    if bad:
        said = f"{len(bad)} of {len(paths)} images in {folder} cannot be used, the first is {bad[0]}"
        if len(bad) > _BAD_SHARE * len(paths):
            raise InputError(said)
        _log.warning("%s", said)
    return images


def digest(images: Iterable[Tensor]) -> str:
    """SHA-256 over sizes and pixels, in order."""
    total = hashlib.sha256()
    for image in images:
        total.update(f"{list(image.shape)}\n".encode())
        total.update(image.contiguous().numpy().data)
    return total.hexdigest()
