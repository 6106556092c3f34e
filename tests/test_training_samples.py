"""Batches of training samples: what they show, that seed and step alone decide, and what cannot be sampled."""

from __future__ import annotations

import pytest
import torch

from memnet_fast import degrade
from memnet_fast.errors import InputError
from memnet_fast.training.samples import ImageSet, Levels, sample_batch

LEVELS = {"denoise": Levels("denoise", 5, 70), "deblock": Levels("deblock", 5, 60), "sr": Levels("sr", only=(2, 3, 4))}


def _images(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    """Images in which every pixel of all images together is unique as far as bytes allow, and neighbours differ."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, size, dtype=torch.uint8, generator=generator) for size in sizes]


def _windows(image: torch.Tensor, side: int) -> set[bytes]:
    """Every window of an image under each flip and rotation, made with other functions than those under test."""
    found = set()
    for turned in (torch.rot90(image, k) for k in range(4)):
        for view in (turned, turned.flip(1)):
            for y in range(view.shape[0] - side + 1):
                for x in range(view.shape[1] - side + 1):
                    found.add(view[y : y + side, x : x + side].contiguous().numpy().tobytes())
    return found


@pytest.mark.parametrize("task", list(LEVELS))
def test_every_sample_is_a_window_and_all_windows_come(task: str) -> None:
    images = _images((16, 17), (19, 16))
    data = ImageSet(images, LEVELS[task], patch=9)
    if task == "sr":
        images = [degrade.modcrop(image, 12) for image in images]
    windows = set().union(*(_windows(image, 9) for image in images))
    seen = set()
    for step in range(40):
        degraded, clean = sample_batch(data, 64, 0, step)
        assert degraded.shape == clean.shape == (64, 1, 9, 9) and degraded.dtype == clean.dtype == torch.float32
        seen |= {patch.mul(255).round().byte().numpy().tobytes() for patch in clean[:, 0]}
    assert seen <= windows
    assert len(seen) > 0.6 * len(windows)


def test_super_resolution_shows_the_interpolated_whole_image_at_the_same_place() -> None:
    image = _images((25, 37))[0]
    data = ImageSet([image], LEVELS["sr"], patch=6)
    whole = degrade.modcrop(image, 12).float() / 255
    planes = {scale: degrade.bicubic(whole, scale) for scale in (2, 3, 4)}
    scales = set()
    for degraded, clean in zip(*sample_batch(data, 60, 1, 0), strict=True):
        matches = [
            scale
            for scale, plane in planes.items()
            for k in range(8)
            if _holds(_turned(whole, k), _turned(plane, k), clean[0], degraded[0])
        ]
        assert len(matches) >= 1
        scales.update(matches)
    assert scales == {2, 3, 4}


def _turned(image: torch.Tensor, k: int) -> torch.Tensor:
    turned = torch.rot90(image, k % 4)
    return turned.flip(1) if k >= 4 else turned


def _holds(clean: torch.Tensor, given: torch.Tensor, patch: torch.Tensor, degraded: torch.Tensor) -> bool:
    side = len(patch)
    here = (clean.unfold(0, side, 1).unfold(1, side, 1) == patch).all(-1).all(-1).nonzero()
    # float16 rounds values near 1 by at most 2^-12.
    return any((given[y : y + side, x : x + side] - degraded).abs().max() < 3e-4 for y, x in here.tolist())


def test_noise_is_white_and_of_every_level() -> None:
    data = ImageSet([torch.full((40, 40), 128, dtype=torch.uint8)], LEVELS["denoise"], patch=32)
    degraded, clean = sample_batch(data, 200, 0, 0)
    sigma = 255 * (degraded - clean).flatten(1).std(1)
    assert sigma.min() < 10 and sigma.max() > 65 and abs(float(sigma.mean()) - 37.5) < 4
    only = ImageSet([torch.full((40, 40), 128, dtype=torch.uint8)], Levels("denoise", only=(30, 50)), patch=32)
    degraded, clean = sample_batch(only, 64, 0, 0)
    sigma = 255 * (degraded - clean).flatten(1).std(1)
    # 1,024 values: the standard error is 2.2 %, and 30 and 50 are far apart.
    assert (((sigma / 30 - 1).abs() < 0.12) | ((sigma / 50 - 1).abs() < 0.12)).all() and sigma.min() < 36 < 44 < sigma.max()


def test_jpeg_blocks_lie_anywhere() -> None:
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    data = ImageSet([(2 * x + y).to(torch.uint8)], Levels("deblock", only=(5,)), patch=16)
    degraded, clean = sample_batch(data, 64, 0, 0)
    assert not torch.equal(degraded, clean)
    # At quality 5 a slope becomes steps, and steps fall between blocks: over the samples, at every column.
    steps = (degraded[:, 0].diff(dim=2).abs().sum(1) / 16).argmax(1) % 8
    assert len(set(steps.tolist())) == 8


@pytest.mark.parametrize("patch", [1, 9, 31, 48])
def test_jpeg_samples_are_those_of_windows_within_an_image(patch: int) -> None:
    """What lies outside of a window must not matter: a block that a window cuts off is coded as one at an image's border."""
    data = ImageSet(_images((80, 80)), LEVELS["deblock"], patch)
    code = data.jpeg

    def within_an_image(image: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
        around = torch.nn.functional.pad(image, (8, 8, 8, 8), value=0.3)
        return code(around, quality)[..., 8:-8, 8:-8]

    alone, _ = sample_batch(data, 16, 0, 0)
    data.jpeg = within_an_image
    assert torch.equal(sample_batch(data, 16, 0, 0)[0], alone)


def test_samples_are_compressed_by_a_file_or_on_the_device() -> None:
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    image = (127 + 60 * torch.sin(x / 4) + 50 * torch.cos(y / 3 + x / 11)).to(torch.uint8)
    coders = {"auto": degrade.jpeg, "file": degrade.jpeg, "device": degrade.jpeg_blocks}
    batches = {}
    for kind, coder in coders.items():
        data = ImageSet([image], LEVELS["deblock"], patch=16, jpeg=kind)
        assert data.jpeg is coder
        batches[kind] = sample_batch(data, 32, 0, 0)
        assert torch.equal(batches[kind][1], batches["auto"][1])
    assert torch.equal(batches["file"][0], batches["auto"][0])
    difference = (batches["device"][0] - batches["file"][0]).abs() * 255
    assert not torch.equal(*batches["file"]) and float(difference.mean()) < 0.1


def test_seed_and_step_decide_and_shares_make_up_the_batch() -> None:
    for levels in LEVELS.values():
        data = ImageSet(_images((30, 40), (24, 60)), levels, patch=12)
        one, again = sample_batch(data, 6, 1, 2), sample_batch(data, 6, 1, 2)
        assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
        for seed, step in ((2, 2), (1, 3), (2, 1)):
            assert not torch.equal(sample_batch(data, 6, seed, step)[1], one[1])
        shares = [sample_batch(data, 6, 1, 2, slice(rank, None, 2)) for rank in range(2)]
        for rank, share in enumerate(shares):
            assert all(torch.equal(a, b[rank::2]) for a, b in zip(share, one, strict=True))


def test_what_cannot_be_sampled_is_refused() -> None:
    with pytest.raises(InputError, match="no image"):
        ImageSet([], LEVELS["denoise"], 8)
    with pytest.raises(InputError, match="9 x 20 is too small: a patch of 10"):
        ImageSet(_images((40, 40), (20, 9)), LEVELS["denoise"], 10)
    with pytest.raises(InputError, match="needs 24 x 24"):
        ImageSet(_images((16, 16)), LEVELS["deblock"], 10)
    with pytest.raises(InputError, match="too small"):
        ImageSet(_images((23, 23)), LEVELS["sr"], 13)
    for task, low, high, only in (
        ("denoise", 70, 5, ()),
        ("denoise", -1, 5, ()),
        ("deblock", 0, 50, ()),
        ("deblock", 5, 50.5, ()),
        ("sr", 0, 0, ()),
        ("sr", 2, 4, ()),
        ("sr", 0, 0, (2, 5)),
        ("colourise", 1, 2, ()),
    ):
        with pytest.raises(InputError):
            Levels(task, low, high, only)
