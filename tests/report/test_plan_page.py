"""The report of a plan, opened in Chromium: no network, no error, charts drawn, names escaped."""

from pathlib import Path
from typing import Any

import pytest

from mezzotint.auditing.planning import plan_target
from mezzotint.auditing.script import parse_target
from mezzotint.hardware.gpus import find_gpu
from mezzotint.plan.precision import find_precision
from mezzotint.report.plan import plan_page

SCRIPT = """
import torch
from torch import nn

model = nn.Sequential()
model.add_module("<img src=x onerror=alert(1)>", nn.Linear(256, 512))
model.add_module("second", nn.Linear(512, 8))
model.cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(10):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(torch.randn(64, 256, device="cuda")).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report of two plans of the script."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "train.py").write_text(SCRIPT)
    target = parse_target(str(folder / "train.py"), [], is_module=False)
    names = ("as written", "float32")
    plans = plan_target(target, [find_gpu("A100")], lambda _card: [find_precision(name) for name in names])
    path = folder / "plan.html"
    path.write_text(plan_page(plans, "train.py <b>"), encoding="utf-8")
    return path


def test_the_page_opens(page: Path, browser: Any) -> None:
    opened = browser.new_page()
    problems: list[str] = []
    requests: list[str] = []
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(page.as_uri())
    opened.wait_for_selector("#memory .main-svg")
    opened.wait_for_selector("#roofline .main-svg")
    assert problems == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert opened.title().startswith("mezzotint plan")
    assert opened.locator("img").count() == 0
    assert opened.locator("tbody").first.locator("tr").count() == 2
    assert "onerror" in opened.locator("body").inner_text()
    opened.close()
