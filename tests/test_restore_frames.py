"""Files of several pages or frames: refused unless all are asked for, then each restored alone."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from support import pngs
from support.restoring import picture, small_net

from memnet_fast.errors import ImageTooLarge, ImageUnsupported, InputError
from memnet_fast.restore import Restorer, images


def saved(format: str, frames: list[Image.Image], **options) -> io.BytesIO:
    file = io.BytesIO()
    frames[0].save(file, format, save_all=True, append_images=frames[1:], **options)
    file.seek(0)
    return file


def frames_of(channels: int, count: int = 3) -> list[np.ndarray]:
    return [picture((20, 30, channels), seed=i) for i in range(count)]


def pil(arrays: list[np.ndarray]) -> list[Image.Image]:
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_apng_keeps_frames_times_and_loops(channels):
    frames = frames_of(channels)
    source = images.decode_image("a", saved("PNG", pil(frames), duration=[100, 50, 70], loop=2), pages="all")
    assert len(source.frames) == 3 and all(map(np.array_equal, source.frames, frames))
    again = images.decode_image("a", io.BytesIO(images.encode(source.frames, "PNG", metadata=source.metadata)), pages="all")
    assert all(map(np.array_equal, again.frames, frames))
    assert again.metadata.animation == source.metadata.animation
    assert (source.metadata.animation.durations, source.metadata.animation.loop) == ((100, 50, 70), 2)


def test_an_animation_of_16_bit_gray_loses_neither_bits_nor_frames():
    frames = [picture((5, 7, 1), np.uint16, seed=i) for i in range(3)]
    data = pngs.animated(frames, colour=0)
    with pytest.raises(ImageUnsupported, match="a has 3 frames"):
        images.decode_image("a", io.BytesIO(data))
    source = images.decode_image("a", io.BytesIO(data), pages="all")
    assert len(source.frames) == 3 and all(map(np.array_equal, source.frames, frames))
    with pytest.raises(ImageUnsupported, match="PNG cannot hold an animation of 16 bits here; write TIFF instead"):
        images.encode(source.frames, "PNG", metadata=source.metadata)
    again = images.decode_image("a", io.BytesIO(images.encode(source.frames, "TIFF")), pages="all")
    assert len(again.frames) == 3 and all(map(np.array_equal, again.frames, frames))


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_an_animation_of_16_bit_colour_or_alpha_is_refused(colour, channels):
    data = pngs.animated([picture((5, 7, channels), np.uint16, seed=i) for i in range(2)], colour=colour)
    for pages, reason in (("single", "has 2 frames"), ("all", "is animated with 16 bits for each channel")):
        with pytest.raises(ImageUnsupported, match=f"^a {reason}"):
            images.decode_image("a", io.BytesIO(data), pages=pages)


def test_the_default_image_of_an_apng_stays_outside_its_animation():
    file = saved("PNG", pil(frames_of(4)), duration=[100, 50], default_image=True)
    source = images.decode_image("a", file, pages="all")
    assert source.metadata.animation.default_image and len(source.frames) == 3
    with Image.open(io.BytesIO(images.encode(source.frames, "PNG", metadata=source.metadata))) as result:
        assert result.default_image and result.n_frames == 3
        result.seek(2)
        assert result.info["duration"] == 50


def test_palettes_of_an_animation_become_one_kind():
    first, *rest = (Image.fromarray(f) for f in frames_of(3))
    palette = first.quantize(16)  # of all: not every version of Pillow writes an animation of several palettes as it is
    frames = [palette, *(f.quantize(palette=palette) for f in rest)]
    source = images.decode_image("a", saved("PNG", frames, duration=10), pages="all")
    assert {f.shape for f in source.frames} <= {(20, 30, 3), (20, 30, 4)} and len({f.shape for f in source.frames}) == 1
    for got, frame in zip(source.frames, frames, strict=True):
        assert np.array_equal(got[..., :3], np.asarray(frame.convert("RGB")))


@pytest.mark.parametrize("lossless", [True, False])
def test_animated_webp_keeps_frames_and_times(lossless):
    file = saved("WEBP", pil(frames_of(3)), duration=[100, 50, 70], loop=3, lossless=lossless)
    source = images.decode_image("a", file, pages="all")
    assert source.metadata.lossless == lossless and source.metadata.animation.durations == (100, 50, 70)
    again = images.decode_image("a", io.BytesIO(images.encode(source.frames, "WEBP", metadata=source.metadata)), pages="all")
    assert again.metadata == source.metadata
    if lossless:
        assert all(map(np.array_equal, again.frames, source.frames))


def test_pages_of_a_tiff_may_differ_in_everything():
    pages = [picture((20, 30, 1)), picture((5, 6, 3)), picture((1, 1, 4)), picture((9, 7, 1), np.uint16)]
    source = images.decode_image("a", io.BytesIO(images.encode(pages, "TIFF")), pages="all")
    assert [p.dtype for p in source.frames] == [p.dtype for p in pages] and all(map(np.array_equal, source.frames, pages))
    with Image.open(io.BytesIO(images.encode(pages, "TIFF"))) as other:
        assert other.n_frames == 4
        other.seek(1)
        assert np.array_equal(np.asarray(other), pages[1])


def test_pages_of_16_bit_colour_and_of_floats():
    pytest.importorskip("tifffile")
    pages = [picture((7, 6, 3), np.uint16), picture((5, 6, 3)), picture((4, 3, 1), np.float32)]
    source = images.decode_image("a", io.BytesIO(images.encode(pages, "TIFF")), pages="all")
    assert all(map(np.array_equal, source.frames, pages)) and [p.dtype for p in source.frames] == [p.dtype for p in pages]


def test_several_frames_are_no_single_image():
    file = saved("TIFF", pil(frames_of(1)))
    with pytest.raises(ImageUnsupported, match="3 frames; pages 'all' restores each"):
        images.decode_image("a", file)
    file.seek(0)
    source = images.decode_image("a", file, pages="all")
    with pytest.raises(InputError, match="3 frames, not one"):
        _ = source.pixels
    with pytest.raises(InputError, match="unknown choice 'first' for pages; choose from single, all"):
        images.decode_image("a", file, pages="first")


def test_the_limit_counts_all_frames():
    for format in ("TIFF", "PNG", "WEBP"):
        file = saved(format, pil(frames_of(3)))
        with pytest.raises(ImageTooLarge, match="limit of 1799"):
            images.decode_image("a", file, 1799, pages="all")
        file.seek(0)
        assert len(images.decode_image("a", file, 1800, pages="all").frames) == 3


def test_what_cannot_hold_frames_says_so():
    for format in ("JPEG", "BMP"):
        with pytest.raises(ImageUnsupported, match=f"{format} cannot hold 3 frames; write TIFF, PNG or WebP"):
            images.encode(frames_of(3), format)
    with pytest.raises(ImageUnsupported, match="frames of different sizes; write TIFF"):
        images.encode([picture((4, 4, 3)), picture((5, 4, 3))], "PNG")
    with pytest.raises(ImageUnsupported, match="animation of 16 bits"):
        images.encode([picture((4, 4, 3), np.uint16)] * 2, "PNG")


def test_several_pictures_in_a_jpeg_are_refused_in_every_way():
    for pages in ("single", "all"):
        with pytest.raises(ImageUnsupported, match="2 frames as MPO"):
            images.decode_image("a", saved("MPO", pil(frames_of(3, 2))), pages=pages)


def test_frames_do_not_influence_each_other():
    """I39: the bits of a frame do not depend on the frames before it, one by one or together."""
    restorer = Restorer(model=small_net())
    frames = frames_of(3, 4)
    alone = [restorer(f) for f in frames]
    again = [restorer(f) for f in reversed(frames)][::-1]
    together = [r.image for r in restorer.restore_many(frames)]
    for a, b, c in zip(alone, again, together, strict=True):
        assert np.array_equal(a, b) and np.array_equal(a, c)
    assert restorer.restore_many([]) == []
    with pytest.raises(InputError, match="one shape and dtype"):
        restorer.restore_many([frames[0], frames[0][1:]])
