"""The page of `memnet demo --ui`: its function through the client of Gradio, and the whole of it in a headless browser."""

from __future__ import annotations

import atexit
import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.restoring import picture, small_net

from memnet_fast.errors import MissingExtra
from memnet_fast.restore import Restorer, images

gradio = pytest.importorskip("gradio", reason="Gradio is not installed, or not in a version that works here")
if not hasattr(gradio, "ImageSlider"):
    pytest.skip("this Gradio is too old: it has no slider", allow_module_level=True)

from memnet_fast import ui  # noqa: E402

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def address():
    page = ui.build(model=small_net(), algorithm="direct")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")  # the visitors of these tests obey it, too
        yield ui.serve(page, wait=False)
    page.close()


@pytest.fixture(scope="module")
def client(address):
    return pytest.importorskip("gradio_client").Client(address, verbose=False)


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(picture((20, 31, 3))).save(tmp_path / "photo.png", dpi=(72, 72))
    return tmp_path / "photo.png"


def ask(client, path, task="Denoise", scale=2, color="luma only", tta=False):
    from gradio_client import handle_file

    slider, download, text = client.predict(handle_file(path), task, scale, color, tta, api_name="/restore")
    return slider, download, text


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({}, {}),
        ({"task": "Remove JPEG artefacts", "color": "every channel"}, {"task": "deblock", "color": "rgb"}),
        ({"task": "Enlarge", "scale": 3}, {"task": "sr", "scale": 3}),
        ({"color": "to gray", "tta": True}, {"color": "gray", "tta": True}),
    ],
)
def test_the_download_is_what_the_restorer_gives(client, photo, arguments, options):
    slider, download, text = ask(client, str(photo), **arguments)
    expected = Restorer(model=small_net(), algorithm="direct", **options)(images.read_image(photo).pixels)
    assert np.array_equal(images.read_image(download).pixels, expected)
    assert "31 x 20" in text and f"{expected.shape[1]} x {expected.shape[0]}" in text
    before, after = (np.asarray(Image.open(name)) for name in slider)
    assert before.shape == after.shape == (*expected.shape[:2], 3)
    assert np.array_equal(after[..., : expected.shape[2]], expected)


def test_the_name_tells_the_format_of_the_download(client, tmp_path):
    """As with the command line, whatever the upload holds."""
    Image.fromarray(picture((20, 31, 3))).save(tmp_path / "photo.png", format="JPEG")
    _, download, _ = ask(client, str(tmp_path / "photo.png"))
    with Image.open(download) as result:
        assert result.format == "PNG"


def test_results_are_removed_at_the_end(monkeypatch):
    at_end = []
    monkeypatch.setattr(atexit, "register", at_end.append)
    folder = Path(ui.build().allowed_folder)
    (folder / "result.png").touch()
    for step in at_end:
        if getattr(step, "__self__", None).__class__.__name__ == "TemporaryDirectory":
            step()
    assert not folder.exists()


def test_errors_are_one_line_without_paths(client, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    with pytest.raises(Exception, match="bad.png") as error:
        ask(client, str(bad))
    assert "/" not in str(error.value).split("bad.png")[0]


def test_the_page_is_for_this_machine_only(address):
    assert address.startswith("http://127.0.0.1:")
    page = urllib.request.urlopen(address).read().decode()
    assert "fonts.googleapis.com" not in page


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # nobody is there
    before = dict(os.environ)
    page = ui.build()
    try:
        address = ui.serve(page, wait=False)
        assert dict(os.environ) == before
        directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert directly.open(address).status == 200
    finally:
        page.close()


def test_16_bits_and_floats_are_shown():
    deep = (np.arange(6, dtype=np.uint16) * 257).reshape(1, 3, 2)
    assert np.array_equal(ui._shown(deep), np.array([[[0] * 3, [2] * 3, [4] * 3]], np.uint8))
    assert np.array_equal(ui._shown(np.array([[[-1.0], [0.5], [2.0]]])), np.array([[[0] * 3, [128] * 3, [255] * 3]], np.uint8))
    assert ui._shown(np.zeros((2, 2, 4), np.uint8)).shape == (2, 2, 3)


def test_without_gradio_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(MissingExtra, match=r"memnet-fast\[demo\]"):
        ui.build()


class _Browser:
    """As much of the protocol of Chromium's developer tools as one visit needs."""

    def __init__(self, folder: Path) -> None:
        from websockets.sync.client import connect

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0"]
        flags += [f"--user-data-dir={folder}", "--no-first-run", "--window-size=1200,900", "about:blank"]
        self._process = subprocess.Popen([BROWSER, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._open = contextlib.ExitStack()
        self._open.callback(self._end)
        self._number = 0
        try:
            port = self._port(folder / "DevToolsActivePort")
            pages = f"http://127.0.0.1:{port}/json"
            url = self.until(lambda: [t for t in json.loads(urllib.request.urlopen(pages).read()) if t["type"] == "page"])[0]
            self._socket = self._open.enter_context(connect(url["webSocketDebuggerUrl"], max_size=None))
        except BaseException:
            self.close()
            raise

    def _port(self, file: Path, seconds: float = 60) -> str:
        """Skips the test where the browser is a name only (a package that wants to be installed first), or shut in."""
        end = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < end:
            if file.exists() and file.read_text().count("\n") >= 1:
                return file.read_text().split()[0]
            time.sleep(0.2)
        pytest.skip(f"{BROWSER} does not start here (exit code {self._process.poll()})")

    def ask(self, method: str, **values):
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": values}))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, script: str):
        return self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def until(self, done, seconds: float = 90):
        end = time.monotonic() + seconds
        while not (answer := done()):
            assert time.monotonic() < end, "the page did not get there"
            time.sleep(0.2)
        return answer

    def close(self) -> None:
        self._open.close()

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_visit_in_a_browser(address, photo, tmp_path):
    """Upload, a choice of task, the button, and then the slider, the facts and the download are there."""
    pytest.importorskip("websockets")
    browser = _Browser(tmp_path / "profile")
    try:
        browser.ask("Page.enable")
        browser.ask("Page.navigate", url=address)
        browser.until(lambda: browser.value("!!document.querySelector('#upload input[type=file]')"))
        root = browser.ask("DOM.getDocument")["root"]["nodeId"]
        node = browser.ask("DOM.querySelector", nodeId=root, selector="#upload input[type=file]")["nodeId"]
        browser.ask("DOM.setFileInputFiles", nodeId=node, files=[str(photo)])
        browser.until(lambda: "photo" in (browser.value("document.querySelector('#upload')?.innerText") or ""))
        browser.value("[...document.querySelectorAll('#task input')].find(i => i.value === 'Enlarge').click()")
        browser.until(lambda: browser.value("!!document.querySelector('#scale input')"))
        browser.value("document.querySelector('#start').click()")
        facts = browser.until(lambda: browser.value("document.querySelector('#facts textarea')?.value"))
        assert "31 x 20 -> 62 x 40" in facts
        sizes = "[...document.querySelectorAll('#slider img')].map(i => i.complete && i.naturalWidth)"
        assert browser.until(lambda: (found := browser.value(sizes)) and len(found) >= 2 and all(found) and found) == [62, 62]
        assert browser.value("!!document.querySelector('#download a[href*=photo]')")
        picture_of_it = browser.ask("Page.captureScreenshot")["data"]
        (tmp_path / "page.png").write_bytes(base64.b64decode(picture_of_it))
        assert images.read_image(tmp_path / "page.png").pixels.std() > 0
    finally:
        browser.close()
