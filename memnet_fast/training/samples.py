"""What a network is trained on: random crops of images in memory, degraded, all of it in batches and on the device.

A batch is a function of (seed, step) alone: nothing has to be remembered to continue an interrupted training, and processes
that share a batch each compute their part of the same one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memnet_fast import degrade
from memnet_fast.errors import InputError
from memnet_fast.tasks import task

_JPEG_BLOCK = 8


@dataclass(frozen=True)
class Levels:
    """What one blind network is trained for.

    task: "denoise", "deblock" or "sr". low, high: of sigma (any number between them) or of the JPEG quality (any whole
    number). only: these values alone, each as often as the others; for sr the scales, and then low and high do not count.
    """

    task: str
    low: float = 0.0
    high: float = 0.0
    only: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.task == "sr" and not self.only:
            raise InputError("the levels of sr are its scales, as in only = [2, 3, 4]")
        for level in self.only or (self.low, self.high):
            task(self.task).check(level)
        if not self.only and self.low > self.high:
            raise InputError(f"the lowest level ({self.low:g}) is above the highest ({self.high:g})")

    def pick(self, uniform: Tensor) -> Tensor:
        """uniform: [N] in [0, 1) -> levels [N]"""
        if self.only:
            return torch.tensor(self.only, dtype=uniform.dtype)[(uniform * len(self.only)).long()]
        if self.task == "denoise":
            return self.low + (self.high - self.low) * uniform
        return (self.low + (self.high - self.low + 1) * uniform).floor()


def least_side(levels: Levels, patch: int) -> int:
    """How many pixels an image must have in each direction to hold a patch."""
    if levels.task == "deblock":  # whole blocks, however they lie: one that is cut off is coded as another one
        return -(-(patch + _JPEG_BLOCK - 1) // _JPEG_BLOCK) * _JPEG_BLOCK
    if levels.task == "sr":
        return -(-patch // _common(levels)) * _common(levels)
    return patch


def _common(levels: Levels) -> int:
    """What the sides of images for super-resolution are multiples of."""
    return math.lcm(*(int(scale) for scale in levels.only))


class ImageSet:
    """Gray images of any sizes, in memory as one row of bytes, so that a batch of crops is one indexed read.

    images: each [H, W] uint8. levels: what they are trained for; for sr every image is cropped to sides that all scales divide,
    and what bicubic interpolation makes of the whole image is kept beside it for each scale, in float16 (its rounding is an
    error of 78 dB, far beyond what any network reaches). jpeg: how samples are compressed, see Stage. Raises InputError without
    images or for images that hold no patch.
    """

    def __init__(
        self, images: list[Tensor], levels: Levels, patch: int, device: str | torch.device = "cpu", jpeg: str = "auto"
    ) -> None:
        if not images:
            raise InputError("there is no image to train on")
        self.levels, self.patch = levels, patch
        least = least_side(levels, patch)
        for image in images:
            if min(image.shape) < least:
                h, w = image.shape
                raise InputError(f"an image of {w} x {h} is too small: a patch of {patch} needs {least} x {least}")
        if levels.task == "sr":
            images = [degrade.modcrop(image, _common(levels)) for image in images]
        sizes = torch.tensor([image.shape for image in images])
        self.heights, self.widths = sizes.to(device).unbind(1)
        self.starts = torch.tensor([0, *(image.numel() for image in images[:-1])], device=device).cumsum(0)
        self.pixels = torch.cat([image.reshape(-1) for image in images]).to(device)
        by_file = jpeg == "file" or (jpeg == "auto" and self.pixels.device.type == "cpu")
        self.jpeg = degrade.jpeg if by_file else degrade.jpeg_blocks
        self.inputs: Tensor | None = None  # [scales, pixels]
        if levels.task == "sr":
            self.inputs = torch.stack([self._interpolated(images, int(scale)) for scale in levels.only])

    def _interpolated(self, images: list[Tensor], scale: int) -> Tensor:
        planes = [degrade.bicubic(image.to(self.pixels.device).float() / 255, scale) for image in images]
        return torch.cat([plane.reshape(-1).half() for plane in planes])

    def __len__(self) -> int:
        return len(self.starts)

    def places(self, uniform: Tensor, side: int) -> Tensor:
        """Which pixels to read: uniform [N, 4] in [0, 1) (image, row, column, turn) -> indices [N, 1, side, side].

        Every image is as likely as the others, as is every place in it, and each of the eight flips and rotations.
        """
        u = uniform.to(self.pixels.device)
        image = (u[:, 0] * len(self)).long()
        height, width = self.heights[image], self.widths[image]
        # In float64: a place in an image of thousands of pixels needs more than the 24 bits of a float32 draw.
        top, left = (u[:, 1] * (height - side + 1)).long(), (u[:, 2] * (width - side + 1)).long()
        turn = (u[:, 3] * 8).long()
        step = torch.arange(side, device=u.device)
        i, j = step.view(1, side, 1), step.view(1, 1, side)
        transposed, down, right = (((turn >> bit) & 1).bool().view(-1, 1, 1) for bit in range(3))
        i, j = torch.where(transposed, j, i), torch.where(transposed, i, j)
        i, j = torch.where(down, side - 1 - i, i), torch.where(right, side - 1 - j, j)
        row, column = top.view(-1, 1, 1) + i, left.view(-1, 1, 1) + j
        return (self.starts[image].view(-1, 1, 1) + row * width.view(-1, 1, 1) + column).unsqueeze(1)


def step_seed(seed: int, step: int) -> int:
    """A seed for one step: neighbouring seeds and steps give streams that have nothing to do with each other."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint32)[0])


def sample_batch(images: ImageSet, batch: int, seed: int, step: int, share: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """(degraded, clean), each [N, 1, patch, patch] float32 on the device of the images: `share` of the batch of this step.

    JPEG blocks lie anywhere relative to a patch, as in windows of a larger image: more than the patch is compressed.
    """
    patch, device = images.patch, images.pixels.device
    draws = torch.from_numpy(np.random.default_rng(step_seed(seed, step)).random((batch, 7)))
    levels = images.levels.pick(draws[:, 4])[share].view(-1, 1, 1, 1)
    draws = draws[share]
    if images.levels.task == "deblock":
        wide = images.pixels[images.places(draws, least_side(images.levels, patch))].float() / 255
        coded = images.jpeg(wide, levels.long())
        down, right = (draws[:, 5:] * _JPEG_BLOCK).long().to(device).unbind(1)
        side = torch.arange(patch, device=device)
        rows, columns = down.view(-1, 1, 1) + side.view(1, -1, 1), right.view(-1, 1, 1) + side.view(1, 1, -1)
        at = torch.arange(len(wide), device=device).view(-1, 1, 1), rows, columns
        return coded[:, 0][at].unsqueeze(1), wide[:, 0][at].unsqueeze(1)
    places = images.places(draws, patch)
    clean = images.pixels[places].float() / 255
    if images.inputs is not None:
        scale = (levels == torch.tensor(images.levels.only, dtype=levels.dtype)).long().argmax(-1, keepdim=True)
        return images.inputs[scale.to(device), places].float(), clean
    # The noise of the whole batch, then the share of it: a sample is the same however many processes share the batch.
    generator = torch.Generator(device).manual_seed(step_seed(seed, step))
    noise = torch.randn((batch, 1, patch, patch), generator=generator, device=device)[share]
    return clean + noise * (levels.to(device, torch.float32) / 255), clean
