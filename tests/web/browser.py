"""A Chromium on this machine. `python -m tests.web.browser` prints where it is; exit code 1 = there is none."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

# Nothing of the page needs another server; without these flags Chromium itself looks for some at every start.
FLAGS = [
    "--no-sandbox",  # tests may run as root
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-unsafe-swiftshader",  # the editor for masks draws with WebGL
]


def find_chromium() -> str | None:
    """CHROMIUM, else a browser of the system, else the one that `playwright install chromium` fetched."""
    if named := os.environ.get("CHROMIUM"):
        return named
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if found := shutil.which(name):
            return found
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).is_file() else None


if __name__ == "__main__":
    where = find_chromium()
    print(where or "no Chromium on this machine")
    sys.exit(where is None)
