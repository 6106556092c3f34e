"""`Restorer` on arrays, tensors and PIL images: kinds, colour, alpha, devices, models."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from support.restoring import picture, small_net

from memnet_fast.errors import BackendUnavailable, CheckpointMismatch, ImageUnsupported, InputError
from memnet_fast.fused import fuse
from memnet_fast.reference import MemNet, MemNetConfig
from memnet_fast.restore import Restorer
from memnet_fast.weights import save_weights


@pytest.fixture(scope="module")
def net():
    return small_net()


@pytest.fixture(scope="module")
def restorer(net):
    return Restorer(model=net, algorithm="direct")


def through(net, plane):
    """The reference on one plane [H, W] of floats in [0, 1], float64 out."""
    x = torch.from_numpy(np.ascontiguousarray(plane, np.float32))[None, None]
    with torch.no_grad():
        return net(x)[0, 0].numpy().astype(np.float64)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">u2", np.float16, np.float32, ">f4", np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (33, 29), (12, 9, 1), (12, 9, 2), (12, 9, 3), (12, 9, 4)])
def test_arrays_keep_shape_and_dtype_and_hold_the_reference(restorer, net, shape, dtype):
    image = picture(shape, dtype)
    result = restorer(image)
    assert result.shape == image.shape and result.dtype == image.dtype
    scale = np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1
    pixels = (image if image.ndim == 3 else image[..., None]).astype(np.float64) / scale
    got = (result if result.ndim == 3 else result[..., None]).astype(np.float64)
    if pixels.shape[2] <= 2:
        expected = through(net, pixels[..., 0])[..., None]
    else:
        y = pixels[..., :3] @ np.array([0.299, 0.587, 0.114])
        expected = pixels[..., :3] + (through(net, y) - y)[..., None]
    n = expected.shape[2]
    assert np.abs(expected - pixels[..., :n]).max() > 0.01, "this network must change the image"
    bound = 0.5 + 1e-5 * scale if image.dtype.kind == "u" else {2: 6e-4, 4: 1e-5, 8: 1e-5}[image.dtype.itemsize]
    expected = np.clip(expected, 0, 1) * scale if scale > 1 else expected
    assert np.abs(got[..., :n] - expected).max() <= bound
    alpha = (image if image.ndim == 3 else image[..., None])[..., n:]
    assert np.array_equal((result if result.ndim == 3 else result[..., None])[..., n:], alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(9, 14), (1, 9, 14), (2, 9, 14), (3, 9, 14), (4, 9, 14), (2, 3, 9, 14)])
def test_tensors_keep_shape_and_dtype(restorer, net, shape, dtype):
    image = torch.rand(shape).to(dtype)
    result = restorer(image)
    assert result.shape == image.shape and result.dtype == dtype and result.is_contiguous()
    if shape == (9, 14):
        expected = torch.from_numpy(through(net, image.float().numpy())).to(dtype)
        torch.testing.assert_close(result, expected, atol=1e-2 if dtype.itemsize == 2 else 1e-5, rtol=0)
    if len(shape) == 3 and shape[0] in (2, 4):
        assert torch.equal(result[-1], image[-1])


def test_images_of_a_batch_do_not_influence_each_other(restorer):
    batch = torch.rand(3, 3, 20, 17)
    together = restorer(batch)
    for i in range(3):
        assert torch.equal(together[i], restorer(batch[i]))
    assert restorer(batch[:0]).shape == (0, 3, 20, 17)


@pytest.mark.parametrize("change", ["negative strides", "transposed", "every other", "read-only", "channel first"])
def test_strides_do_not_matter_and_the_input_is_left_alone(restorer, change):
    base = picture((26, 30, 3))
    view = {
        "negative strides": base[::-1, ::-1],
        "transposed": base.transpose(1, 0, 2),
        "every other": base[::2, 1::2],
        "read-only": base,
        "channel first": np.ascontiguousarray(base.transpose(2, 0, 1)).transpose(1, 2, 0),
    }[change]
    view.flags.writeable = change != "read-only"
    before = view.copy()
    assert np.array_equal(restorer(view), restorer(np.ascontiguousarray(view)))
    assert np.array_equal(view, before)


def test_color_y_keeps_chroma(net):
    image = picture((31, 40, 3), np.float64)
    result = Restorer(model=net, color="y")(image)
    for weights in ((-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411)):
        np.testing.assert_allclose(result @ np.array(weights), image @ np.array(weights), atol=1e-8)
    assert np.abs(result - image).max() > 0.01


def test_color_rgb_restores_each_channel_alone(net):
    image = picture((31, 40, 3))
    result = Restorer(model=net, color="rgb", algorithm="direct")(image)
    gray = Restorer(model=net, algorithm="direct")
    for c in range(3):
        assert np.array_equal(result[..., c], gray(image[..., c]))


@pytest.mark.parametrize(
    ("shape", "expected"), [((5, 6), (5, 6)), ((5, 6, 1), (5, 6, 1)), ((5, 6, 3), (5, 6, 1)), ((5, 6, 4), (5, 6, 2))]
)
def test_color_gray_gives_one_channel(net, shape, expected):
    image = picture(shape)
    result = Restorer(model=net, color="gray")(image)
    assert result.shape == expected
    if shape == (5, 6, 4):
        assert np.array_equal(result[..., 1], image[..., 3])


def test_results_of_integers_are_clipped_and_not_wrapped(net):
    shifted = small_net()
    with torch.no_grad():
        shifted.recon.bias.fill_(2.0)
    assert (Restorer(model=shifted)(picture((9, 9))) == 255).all()
    with torch.no_grad():
        shifted.recon.bias.fill_(-2.0)
    assert (Restorer(model=shifted)(picture((9, 9), np.uint16)) == 0).all()


def test_float_results_are_not_clipped(net):
    shifted = small_net()
    with torch.no_grad():
        shifted.recon.bias.fill_(2.0)
    assert Restorer(model=shifted)(picture((9, 9), np.float32)).min() > 1


def test_a_dark_16_bit_image_is_still_16_bit(restorer):
    """Some tools guess 8 bits when no value is above 255."""
    dark = picture((20, 20)).astype(np.uint16)
    assert not np.array_equal(restorer(dark), restorer(dark.astype(np.uint8)))
    assert restorer(dark).dtype == np.uint16


def test_floats_of_0_to_255_warn_once_and_are_computed_as_they_are(restorer, net):
    image = picture((12, 13), np.float32) * 255
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = restorer(image)
    assert [w.category for w in caught] == [UserWarning] and "divide a 0..255 image by 255" in str(caught[0].message)
    assert caught[0].filename == __file__
    np.testing.assert_allclose(result, through(net, image), rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restorer(picture((12, 13), np.float32) + 0.6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channels", [1, 3])
def test_nan_and_infinity_are_refused(restorer, value, channels):
    image = picture((10, 10, channels), np.float32)
    image[7, 3, -1] = value
    with pytest.raises(InputError, match="NaN or infinity"):
        restorer(image)
    with pytest.raises(InputError, match="NaN or infinity"):
        restorer(torch.from_numpy(image).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.int32), "expected dtype uint8, uint16"),
        (np.zeros((4, 4), bool), "expected dtype"),
        (np.zeros((4, 4), np.complex64), "expected dtype"),
        (np.zeros(4, np.uint8), r"\[H, W\] or \[H, W, C\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"got shape \[1, 4, 4, 3\]"),
        (np.zeros((3, 8, 8), np.uint8), "1 to 4 channels.*got 8"),
        (np.zeros((0, 5), np.uint8), "no pixels: 5 x 0"),
        (np.zeros((5, 0), np.float32), "no pixels: 0 x 5"),
        (torch.zeros(4, 4, dtype=torch.uint8), r"tensor.float\(\) / 255"),
        (torch.zeros(4), r"got shape \[4\]"),
        (torch.zeros(3, 0, 4), "no pixels"),
        (torch.zeros(4, 4).to_sparse(), "dense tensor"),
        ([[0.5]], "got list"),
        ("photo.png", "got str"),
        (None, "got NoneType"),
    ],
)
def test_what_is_not_an_image_is_refused(restorer, image, message):
    with pytest.raises(InputError, match=message):
        restorer(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sharpen"}, "unknown task 'sharpen'; choose from denoise, deblock, sr"),
        ({"task": "sr"}, "super-resolution needs a scale of 2, 3, 4, got None"),
        ({"task": "sr", "scale": 5}, "needs a scale of 2, 3, 4, got 5"),
        ({"task": "sr", "scale": 2.0}, "got 2.0"),
        ({"task": "denoise", "scale": 2}, "the task 'denoise' has no scale, got 2"),
        ({"color": "lab"}, "choose from y, rgb, gray"),
        ({"tile": -1}, "tile must be 'auto' or a whole number of at least 0"),
        ({"tile": 64.0}, "tile must be"),
        ({"tile": True}, "tile must be"),
        ({"overlap": "auto"}, "overlap must be 'exact' or"),
        ({"batch": 0}, "batch must be 'auto' or a whole number of at least 1"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"device": "meta"}, "unknown device 'meta'"),
        ({"backend": "tpu"}, "unknown backend 'tpu'"),
        ({"precision": "fp7"}, "unknown precision"),
        ({"model": "memnet_m6r6"}, "has no weights"),
        ({"model": "no_such_model"}, "there is no model and no file 'no_such_model'"),
        ({"model": torch.nn.Conv2d(1, 1, 3)}, "not Conv2d"),
        ({"model": 7}, "not int"),
        ({"model": MemNet(MemNetConfig(in_channels=3, out_channels=3, channels=16, num_memory_blocks=1))}, "3 channels in"),
    ],
)
def test_bad_options_are_refused(net, options, message):
    with pytest.raises(InputError, match=message):
        Restorer(**{"model": net, **options})


def test_a_backend_that_cannot_run_says_why(net):
    with pytest.raises(BackendUnavailable, match="fp32 or bf16, not fp16"):
        Restorer(model=net, backend="cpu", precision="fp16")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="cuda:3 does not exist"):
            Restorer(model=net, device="cuda:3")


def test_models_come_as_file_network_or_fused_network(net, tmp_path):
    image, path = picture((16, 18)), tmp_path / "small.safetensors"
    save_weights(net, path)
    expected = Restorer(model=net)(image)
    for model in (path, str(path), fuse(net)):
        assert np.array_equal(Restorer(model=model)(image), expected)
    assert Restorer(model=path).model_name == str(path)
    fused = fuse(net, algorithm="direct")
    assert Restorer(model=fused).net is fused
    assert Restorer(model=fused, algorithm="winograd").algorithm == "winograd"
    (tmp_path / "other.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointMismatch):
        Restorer(model=tmp_path / "other.safetensors")


def test_the_torch_backend_agrees(net):
    image = picture((40, 33, 3), np.float32)
    expected = Restorer(model=net, backend="cpu")(image)
    np.testing.assert_allclose(Restorer(model=net, backend="torch")(image), expected, atol=1e-5)
    np.testing.assert_allclose(Restorer(model=net, backend="torch", precision="bf16")(image), expected, atol=0.05)


def test_threads_may_share_a_restorer(restorer):
    images = [picture((20 + i, 31), seed=i) for i in range(6)]
    expected = [restorer(image) for image in images]
    got: list = [None] * len(images)

    def work(i):
        got[i] = restorer(images[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(images))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16", "I;16B"])
def test_pil_images_follow_the_rules_of_arrays(restorer, mode):
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "I;16": (), "I;16B": ()}[mode]
    pixels = picture((21, 17, *channels), {"I;16": "<u2", "I;16B": ">u2"}.get(mode, np.uint8))
    image = Image.fromarray(pixels)
    assert image.mode == mode
    image.info.update(dpi=(72, 72), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0", icc_profile=b"profile")
    result = restorer(image)
    assert result.mode == mode and result.size == image.size
    assert np.array_equal(np.asarray(result), restorer(pixels))
    assert result.info == {"dpi": (72.0, 72.0), "exif": image.info["exif"], "icc_profile": b"profile"}


def test_pil_modes_that_are_not_restored_are_named(restorer):
    for mode in ("CMYK", "YCbCr", "LAB", "HSV", "F", "I"):
        with pytest.raises(ImageUnsupported, match=f"mode {mode}"):
            restorer(Image.new(mode, (4, 4)))
    with pytest.raises(InputError, match="no pixels"):
        restorer(Image.new("L", (0, 4)))


@pytest.mark.gpu
def test_cuda_gives_the_result_of_the_cpu(net):
    image = picture((60, 50, 3), np.float32)
    expected = Restorer(model=net, device="cpu", backend="torch")(image)
    restorer = Restorer(model=net, device="cuda", tile=32)
    assert restorer.device.type == "cuda" and next(net.parameters()).device.type == "cpu"
    np.testing.assert_allclose(restorer(image), expected, atol=1e-4)
    moved = torch.from_numpy(image).permute(2, 0, 1).cuda()
    assert restorer(moved).device == moved.device
