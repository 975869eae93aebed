"""Draw docs/proof.png: the report of the demo's record, as a browser shows its first screen. Needs Chromium.

python scripts/proof_picture.py
"""

import json
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from mezzotint.parity.result import Proof
from mezzotint.report.page import write_page
from mezzotint.report.proof import proof_page

ROOT = Path(__file__).resolve().parents[1]
SIZE = {"width": 1000, "height": 1420}


def main() -> None:
    """Render the report and take the picture."""
    record = json.loads((ROOT / "benchmarks" / "records" / "demo.json").read_text(encoding="utf-8"))
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as player:
        page_path = Path(folder) / "report.html"
        write_page(page_path, proof_page(Proof.from_json(record)))
        browser = player.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(page_path.as_uri())
        page.wait_for_timeout(1500)  # charts draw themselves
        page.screenshot(path=ROOT / "docs" / "proof.png")
        browser.close()


if __name__ == "__main__":
    main()
