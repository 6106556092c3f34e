"""`memnet demo`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from memnet_fast.cli.messages import State, say, shown

_SEED = 0
_PHOTOS = ("chelsea", "astronaut", "coffee", "camera")


@click.command(short_help="Restores a noisy photograph and says what was gained.")
@click.option("-o", "--output", default="memnet-demo", metavar="FOLDER", help="Where the pictures go.")
@click.option("--photo", type=click.Choice(_PHOTOS), default="chelsea", help="camera is gray, the others have colour.")
@click.option("--sigma", type=click.FloatRange(0, 255), default=30.0, help="Standard deviation of the noise, in grey levels.")
@click.option("-n", "--model", metavar="NAME|FILE", help="A bundled model (memnet models) or a weight file.")
@click.option("--backend", default="auto", metavar="NAME", help="auto, or one that memnet doctor lists.")
@click.option("--ui", is_flag=True, help="Open a page to try out images of your own instead; ctrl-C ends it.")
@click.option("--port", type=click.IntRange(1, 65535), help="Of the page; default: the first free one from 7860 on.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
@click.pass_context
def demo(
    ctx: click.Context,
    output: str,
    photo: str,
    sigma: float,
    model: str | None,
    backend: str,
    ui: bool,
    port: int | None,
    verbose: bool,
) -> int:
    """Adds noise to a photograph of scikit-image, restores it, and says what was gained.

    The noise is Gaussian, independent in every channel, from a fixed seed, neither clipped nor rounded; every channel goes
    through the network. PSNR is over all channels, for a range of 255. Writes noisy, restored and both beside the original.
    """
    ctx.ensure_object(State).verbose = verbose
    if ui:
        return _serve(model, backend, port)
    if port is not None:
        raise click.UsageError("--port is for --ui")
    import torch

    from memnet_fast.backends import cpu
    from memnet_fast.degrade import gaussian
    from memnet_fast.metrics import psnr, scikit_image
    from memnet_fast.restore import Restorer
    from memnet_fast.restore.images import write_image
    from memnet_fast.restore.strip import comparison_strip

    data = scikit_image("data")
    restorer = Restorer("denoise", model=model, backend=backend, color="rgb")
    original = torch.from_numpy(getattr(data, photo)().copy())  # [H, W] or [H, W, 3] uint8
    clean = (original if original.ndim == 3 else original[..., None]).permute(2, 0, 1).float() / 255
    noisy = gaussian(clean, sigma, torch.Generator().manual_seed(_SEED))
    restorer(noisy[:, :32, :32])  # packs the weights and starts the threads
    start = time.perf_counter()
    restored = restorer(noisy)
    seconds = time.perf_counter() - start

    channels, height, width = clean.shape
    folder = Path(output)
    views = {
        name: (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        for name, image in (("noisy", noisy), ("restored", restored), ("original", clean))
    }
    before, after = psnr(noisy, clean), psnr(restored, clean)
    labels = {"noisy": f"noisy, sigma {sigma:g}: {before:.2f} dB", "restored": f"restored: {after:.2f} dB"}
    strip = comparison_strip([(labels.get(name, name), view) for name, view in views.items()])
    for name in ("noisy", "restored"):
        write_image(folder / f"{name}.png", views[name], "PNG")
    write_image(folder / "before_after.png", strip, "PNG")

    planes = "R, G and B" if channels == 3 else "gray"
    threads = cpu.num_threads() if restorer.backend == "cpu" else torch.get_num_threads()
    click.echo(f"photograph   {photo} (scikit-image), {width} x {height}, {planes}, noise of sigma {sigma:g} in every channel")
    click.echo(f"model        {shown(restorer.model_name)}")
    click.echo(f"PSNR         {before:.2f} dB noisy, {after:.2f} dB restored ({after - before:+.2f}), over {planes}")
    click.echo(f"time         {seconds * 1000:.0f} ms, {width * height / seconds / 1e6:.3f} megapixels/s")
    click.echo(
        f"backend      {restorer.backend}, {restorer.precision}, {restorer.algorithm}, {threads} threads, {restorer.device}"
    )
    click.echo(f"pictures     {shown(folder / 'before_after.png')}, noisy.png, restored.png")
    return 0


def _serve(model: str | None, backend: str, port: int | None) -> int:
    from memnet_fast import ui

    page = ui.build(model=model, backend=backend)
    try:
        address = ui.serve(page, port, wait=False)
    except OSError as error:
        raise click.UsageError(f"the page cannot be served: {error}") from error
    say(f"serving {address} to this machine; ctrl-C ends it")
    page.block_thread()
    return 0
