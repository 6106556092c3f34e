"""Whether precision "fp8" is good enough for a network: what it costs in PSNR, on a small test image made here.

e4m3 has four significant bits, and its scales come from the running statistics of a network's batch normalisations. Statistics
that are not those of the network, and networks that need more digits, show in the result at once.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from memnet_fast.backends.torch import pack
from memnet_fast.errors import BackendUnavailable
from memnet_fast.plan import FusedPlan

LIMIT_DB = 0.05
_HEIGHT, _WIDTH = 40, 48
_BLOCK = 8
_DCT_STEP = 0.15  # JPEG's for low frequencies at quality 20


def _clean() -> Tensor:
    """[H, W] in [0, 1]: a smooth pattern, and bars in one half."""
    y, x = (torch.arange(side, device="cpu", dtype=torch.float32) / side for side in (_HEIGHT, _WIDTH))
    y = y.view(-1, 1)
    return 0.5 + 0.25 * torch.sin(9 * x + 5 * y) + 0.2 * ((x + y > 1) & (x * 8 % 2 >= 1)).float()


def _compressed(image: Tensor) -> Tensor:
    """The cosines of blocks, rounded, as in JPEG."""
    k = torch.arange(_BLOCK, device="cpu", dtype=torch.float32)
    dct = torch.cos(math.pi / _BLOCK * k[:, None] * (k + 0.5)) * math.sqrt(2 / _BLOCK)
    dct[0] /= math.sqrt(2)
    blocks = image.view(_HEIGHT // _BLOCK, _BLOCK, _WIDTH // _BLOCK, _BLOCK).transpose(1, 2)
    rounded = (dct @ blocks @ dct.T / _DCT_STEP).round() * _DCT_STEP
    return (dct.T @ rounded @ dct).transpose(1, 2).reshape(image.shape)


def _enlarged(image: Tensor) -> Tensor:
    """Half the size, and back."""
    half = F.interpolate(image[None, None], (_HEIGHT // 2, _WIDTH // 2), mode="bicubic", antialias=True)
    return F.interpolate(half, (_HEIGHT, _WIDTH), mode="bicubic", antialias=True)[0, 0]


def _degraded(clean: Tensor) -> Tensor:
    """[4, H, W] in [0, 1]: much noise, little noise, compressed, enlarged."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)
    return torch.stack([clean + 0.1 * noise, clean + 0.02 * noise, _compressed(clean), _enlarged(clean)]).clamp(0, 1)


def _run(plan: FusedPlan, images: Tensor, precision: str) -> Tensor:
    packed = pack(plan, images.device, precision)
    count, _, height, width = images.shape
    out = torch.empty((count, plan.config.out_channels, height, width), dtype=torch.float32, device="cpu")
    packed.run(images, out, torch.empty(packed.workspace_bytes(count, height, width), dtype=torch.uint8, device="cpu"))
    return out


def fp8_loss(plan: FusedPlan) -> float:
    """PSNR that fp8 costs, in dB: of the degraded test images that the network improves, the largest loss. NaN where a
    result is not finite.

    The errors of fp8 are taken for independent of those that the network leaves; on an image as small as this one, what they
    have in common is chance. Where the network improves none of the images, it is made for something else: half of what it
    changes about an image then stands for the error that it leaves, and the smallest loss counts.
    """
    clean = _clean()
    images = _degraded(clean)[:, None].expand(-1, plan.config.in_channels, -1, -1).contiguous()
    exact, small = (_run(plan, images, precision) for precision in ("fp32", "fp8"))

    def error(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3))

    wrong, left, given = error(small, exact), error(exact, clean), error(images, clean)
    if not bool(wrong.isfinite().all()):
        return math.nan
    improved = left < given
    of_all = wrong / torch.where(improved, left, error(exact, images) / 4)
    of_all[wrong == 0] = 0.0  # a network that changes nothing is exact: 0 of 0
    share = of_all[improved].amax() if bool(improved.any()) else of_all.amin()
    return 10 * math.log10(1 + float(share))


def require_fp8(plan: FusedPlan, backend: str) -> None:
    """Raises BackendUnavailable where e4m3 with scales from the running statistics cannot stand for these weights."""
    loss = fp8_loss(plan)
    # Also for NaN.
    if not loss <= LIMIT_DB:
        amount = f"loses {loss:.2g} dB on a test image (limit {LIMIT_DB} dB)"
        raise BackendUnavailable(
            backend,
            f"fp8 {'is not finite for a test image' if math.isnan(loss) else amount}: scales follow from the running "
            "statistics, which do not describe the network, or it needs more digits; load its weights before fuse(), or take "
            "fp16",
        )
