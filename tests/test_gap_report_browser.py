"""The page of a report as a browser shows it: whole, quiet, alone, and on a narrow screen."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest
import torch

import mmfast

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")

# what the page is like once it is loaded
PROBE = """<script>addEventListener("load", () => {
  const root = document.documentElement, body = document.body
  // what lies in a part that scrolls by itself may be wider
  const outside = e => !e.closest(".wide") || e.matches(".wide")
  const parts = [...body.querySelectorAll("*")].filter(outside)
  parent.postMessage(JSON.stringify({
    images: [...document.images].map(image => image.complete && image.naturalWidth),
    fetched: performance.getEntriesByType("resource").map(entry => entry.name.slice(0, 5)),
    width: innerWidth,
    needed: Math.max(root.scrollWidth, ...parts.map(e => e.getBoundingClientRect().right)),
    paper: getComputedStyle(body).backgroundColor,
  }), "*")
})</script>"""
# a frame may be narrower than a window; its title becomes what the page says of itself
FRAME = """<!doctype html><title></title>
<script>addEventListener("message", said => {{ document.title = said.data }})</script>
<iframe src="{page}" style="width: {width}px; height: 900px; border: 0"></iframe>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with names as long as they come, and a copy of it that looks at itself."""
    out = tmp_path_factory.mktemp("browser")
    x, y = (torch.randn(120, 16) + shift for shift in (0.5, -0.5))
    name = "embeddings_of_a_large_model_over_the_whole_validation_set.npy"
    mmfast.gap_report(x, y, out, names=(f"image_{name}", f"text_{name}"))
    html = (out / "report.html").read_text()
    # the page allows no script
    allowed = html.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    copy = out / "copy.html"
    copy.write_text(allowed.replace("</body>", f"{PROBE}</body>"))
    return copy


def browse(page, profile, width, *options):
    """What PROBE saw, and the lines of the console."""
    frame = profile / "frame.html"
    frame.write_text(FRAME.format(page=page.as_uri(), width=width))
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        *(f"--user-data-dir={profile}", "--window-size=1300,1000", "--dump-dom", *options),
        frame.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (title,) = re.findall("<title>(.*?)</title>", done.stdout, re.DOTALL)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(unescape(title)) if title else None, console


def test_page_in_a_narrow_window_in_the_dark(page, tmp_path):
    seen, console = browse(page, tmp_path, 400, "--blink-settings=preferredColorScheme=0")
    assert seen["width"] == 400
    assert seen["needed"] <= 400
    assert seen["paper"] == "rgb(21, 25, 30)"
    assert console == []


def test_page_in_a_wide_window(page, tmp_path):
    seen, console = browse(page, tmp_path, 1200)
    assert len(seen["images"]) == 5
    assert min(seen["images"]) > 100
    assert set(seen["fetched"]) <= {"data:"}
    assert seen["width"] == 1200
    assert seen["needed"] <= 1200
    assert seen["paper"] == "rgb(255, 255, 255)"
    assert console == []


def test_page_runs_no_script(page, tmp_path):
    """The copy's is run only because the copy allows it."""
    closed = page.with_name("closed.html")
    closed.write_text(page.read_text().replace("; script-src 'unsafe-inline'", ""))
    seen, console = browse(closed, tmp_path, 400)
    assert seen is None
    assert "Content Security Policy" in console[0]
