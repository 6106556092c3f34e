"""A page to look at: upload an image, choose what to do, compare before and after, download the result (extra "demo": Gradio).

The page is served to this machine only, loads nothing from elsewhere, and reports to nobody. The download is the very file that
the command line would write; the slider shows 8 bits of it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from memnet_fast.errors import MemNetError, MissingExtra
from memnet_fast.restore import Restorer, images
from memnet_fast.restore.report import describe

TASKS = {"Denoise": "denoise", "Remove JPEG artefacts": "deblock", "Enlarge": "sr"}
_COLORS = {"luma only": "y", "every channel": "rgb", "to gray": "gray"}
_MAX_PIXELS = 50_000_000


def gradio() -> ModuleType:
    """The package. Raises MissingExtra."""
    try:
        import gradio

        gradio.ImageSlider  # noqa: B018  older versions have none
    except (ImportError, AttributeError) as error:
        raise MissingExtra(f"the page needs Gradio 6 ({error}); pip install 'memnet-fast[demo]'") from error
    return gradio


def build(**options: Any) -> Any:
    """The page, a gradio.Blocks that is not served yet. options: further arguments of every Restorer."""
    gr = gradio()
    busy = threading.Lock()
    results = tempfile.TemporaryDirectory(prefix="memnet-ui-")
    atexit.register(results.cleanup)

    @lru_cache(maxsize=4)
    def restorer(task: str, scale: int | None, color: str, tta: bool) -> Restorer:
        return Restorer(task, scale=scale, color=color, tta=tta, **options)

    def restore(
        path: str | None,
        task: str,
        scale: int,
        color: str,
        tta: bool,
        progress: Any = gr.Progress(),  # noqa: B008  Gradio looks for it there
    ) -> tuple[tuple[np.ndarray, np.ndarray], str, str]:
        if path is None:
            raise gr.Error("Choose an image first.")

        def told(done: int, total: int) -> None:
            progress((done, total), unit="windows")

        try:
            source = images.read_image(path, _MAX_PIXELS, gray=_COLORS[color] == "gray")
            with busy:  # one network at a time: two would only share the processors
                chosen = restorer(TASKS[task], int(scale) if TASKS[task] == "sr" else None, _COLORS[color], tta)
                start = time.perf_counter()
                result = chosen.restore(source.pixels, told)
                seconds = time.perf_counter() - start
            place = Path(tempfile.mkdtemp(dir=results.name))
            target = place / Path(path).name
            # By the name, as the command line does.
            format = images.EXTENSIONS.get(target.suffix.lower(), source.format)
            images.write_image(target, result.image, format, metadata=source.metadata)
        except MemNetError as error:
            raise gr.Error(describe(error).replace(path, Path(path).name)) from error
        height, width = result.image.shape[:2]
        quality = f", JPEG of quality {source.jpeg_quality}" if source.jpeg_quality is not None else ""
        told_text = (
            f"{source.pixels.shape[1]} x {source.pixels.shape[0]}{quality} -> {width} x {height}; {seconds:.2f} s, "
            f"{width * height / seconds / 1e6:.3g} megapixels/s ({chosen.model_name}, {chosen.backend}, {chosen.precision})"
        )
        before = _shown(source.pixels)
        scaled = before.repeat(chosen.scale, 0).repeat(chosen.scale, 1)
        return (scaled, _shown(result.image)), str(target), told_text

    with gr.Blocks(title="memnet", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# memnet\nRestores images with MemNet, on this machine.")
        with gr.Row():
            with gr.Column(scale=1):
                upload = gr.File(label="Image", file_types=list(images.EXTENSIONS), type="filepath", elem_id="upload")
                task = gr.Radio(list(TASKS), value="Denoise", label="Task", elem_id="task")
                scale = gr.Radio([2, 3, 4], value=2, label="Times larger", visible=False, elem_id="scale")
                color = gr.Radio(list(_COLORS), value="luma only", label="Colour", elem_id="color")
                tta = gr.Checkbox(label="Average over 8 flips and rotations (8 times slower)", elem_id="tta")
                start = gr.Button("Restore", variant="primary", elem_id="start")
            with gr.Column(scale=2):
                slider = gr.ImageSlider(label="Before and after", format="png", elem_id="slider")
                facts = gr.Textbox(label="What was done", interactive=False, elem_id="facts")
                download = gr.File(label="Result", interactive=False, elem_id="download")
        task.change(lambda name: gr.update(visible=TASKS[name] == "sr"), task, scale, api_name=False)
        start.click(restore, [upload, task, scale, color, tta], [slider, download, facts], api_name="restore")
    page.allowed_folder = results.name
    return page


def serve(page: Any, port: int | None = None, *, wait: bool = True, browser: bool = False) -> str:
    """Serves the page on this machine and returns its address; with `wait`, not before ctrl-C.

    port: None takes the first free one from 7860 on. Raises MissingExtra.
    """
    gr = gradio()
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    with _past_proxies():
        _, address, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            inbrowser=browser,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            theme=theme,
            footer_links=[],
            allowed_paths=[page.allowed_folder],
        )
    if wait:
        page.block_thread()
    return address


@contextlib.contextmanager
def _past_proxies() -> Iterator[None]:
    """While Gradio asks its own server whether it is there: a proxy would look for it on another machine."""
    before = os.environ.get("no_proxy")
    others = before or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = f"{others},127.0.0.1" if others else "127.0.0.1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["no_proxy"]
        else:
            os.environ["no_proxy"] = before


def _shown(pixels: np.ndarray) -> np.ndarray:
    """Pixels [H, W, C] -> RGB, uint8 [H, W, 3], without alpha."""
    if pixels.dtype.kind == "f":
        pixels = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    elif pixels.dtype.itemsize == 2:
        pixels = (pixels // 257).astype(np.uint8)
    return pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1].repeat(3, -1)
