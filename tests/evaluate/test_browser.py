"""A report's HTML in a real browser, as wide as a telephone and as a desk's window."""

import html as escaping
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from tests.evaluate.test_report import MODEL, TEACHER

from signbit.evaluate.page import html
from signbit.evaluate.report import make_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

#: The page in a frame, since a window of headless Chromium is never narrower than 500 px; the title says what is seen.
FRAME = """<!doctype html><iframe style="width:{width}px;height:1400px;border:0" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => {{
  const frame = document.querySelector("iframe"), page = frame.contentDocument;
  document.title = JSON.stringify({{
    window: frame.contentWindow.innerWidth,
    document: page.documentElement.scrollWidth,
    pictures: [...page.images].map(image => [image.src.slice(0, 22), image.naturalWidth, image.offsetWidth]),
    headers: [...page.querySelectorAll("thead")].map(head => head.offsetHeight),
  }});
}});
</script>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium (apt-get install chromium) or Chrome is installed"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    pytest.importorskip("matplotlib", reason="the extra plot")
    samples = ({"prompt": "Once upon a time", "text": " there was a dog" * 30, "how": "greedy"},)
    models = [replace(MODEL, samples=samples), TEACHER, replace(MODEL, name="a" * 60)]
    commands = [f"signbit report m --against {'TEACHER' * 30}"]
    return html(make_page(models, TEACHER, tmp_path_factory.mktemp("report"), commands, {"torch": "2"}))


def seen(page, width, folder):
    """What Chromium makes of a page in a window of this width, in px."""
    (folder / "frame.html").write_text(FRAME.format(width=width, page=escaping.escape(page)), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1300,1400"]
    done = subprocess.run(
        [BROWSER, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", (folder / "frame.html").as_uri()],
        env={**os.environ, "HOME": str(folder)}, check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr[-2000:]
    return json.loads(escaping.unescape(title[1]))


@pytest.mark.parametrize("width", [390, 1200])
def test_a_report_is_no_wider_than_the_window_and_shows_its_pictures(report, width, tmp_path):
    found = seen(report, width, tmp_path)
    assert found["window"] == found["document"] == width
    assert len(found["pictures"]) == 2
    for source, drawn, shown in found["pictures"]:
        assert source == "data:image/png;base64," and drawn > 300 and 300 < shown <= width
    assert width > 390 or max(found["headers"]) < 70, "a column's title has two lines at most"
