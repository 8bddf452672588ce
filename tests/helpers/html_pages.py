"""Reads an HTML page strictly, and looks at it in Chromium where there is one."""

import html.parser
import shutil
import subprocess

import matplotlib.image

_VOID = {"meta", "link", "br", "img"}
_LEADS = {"src", "href", "xlink:href", "action", "data", "srcset"}


class _Page(html.parser.HTMLParser):
    """Checks that tags are closed in turn, and keeps tags, section headings, text and what leads out of the page."""

    def __init__(self):
        super().__init__()
        self.tags, self.headings, self.links, self.text, self._open = [], [], [], "", []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        leads = [value for name, value in attrs if name in _LEADS]
        self.links += [value for value in leads if not value.startswith(("#", "data:image/png;"))]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self._open[-1:] == ["h2"] and "footer" not in self._open:
            self.headings.append(data)


def read(path):
    """Return what is in a page whose tags are closed in turn."""
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert not page._open
    return page


def require_shown(path, folder):
    """Check in Chromium, if it is installed, that a page fits a phone and follows the system to dark."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        return
    for scheme, background in ((1, (255, 255, 255)), (0, (16, 21, 31))):
        shot = folder / f"shot-{scheme}.png"
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--window-size=500,3000",
        ]
        options += [
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--user-data-dir={folder / 'browser'}",
        ]
        command = [chromium, *options, f"--screenshot={shot}", path.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        pixels = (matplotlib.image.imread(shot)[..., :3] * 255).round().astype(int)
        assert (pixels[:, -10:] == background).all(), "something is wider than the screen"
        assert (pixels != background).any(axis=-1).mean() > 0.1, "the page is empty"
