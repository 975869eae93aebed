"""The frame of every report: one HTML file with everything in it, escaped by jinja2, charts by plotly.

Charts take their colours from the page, so that they follow light, dark and print: the figure is drawn with a
transparent ground, and the style sheet colours its text, axes and grid.
"""

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mezzotint.errors import DataError
from mezzotint.files import write_whole
from mezzotint.version import package_version

# Readable on white and on near-black; told apart by readers who do not see red and green (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("mezzotint.report", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_page(template: str, title: str, *, has_charts: bool = True, **values: Any) -> str:
    """Return a whole HTML page from a template in `pages/`; every value is escaped but those that are Markup.

    Without `has_charts` plotly's script, 4.5 MB, stays out.
    """
    page = _environment().get_template(template)
    plotly = _plotly_script() if has_charts else Markup("")
    return _with_policy(page.render(title=title, version=package_version(), plotly=plotly, **values))


def _with_policy(page: str) -> str:
    """Return the page with a Content-Security-Policy that allows its own scripts, by hash, and nothing from a network.

    Plotly sets styles on elements, and draws the picture that is saved from data and blob addresses.
    """
    digests = {
        hashlib.sha256(text.encode()).digest() for text in re.findall(r"<script[^>]*>(.*?)</script>", page, re.S)
    }
    hashes = " ".join(sorted(f"'sha256-{base64.b64encode(one).decode()}'" for one in digests)) or "'none'"
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    return page.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n{meta}', 1)


@cache
def _plotly_script() -> Markup:
    """Return plotly's own script, so that the page needs no network."""
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())


def chart(figure: Any, name: str) -> Markup:
    """Return a plotly figure as a part of a page; `name` is the element's id."""
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 70, "r": 20, "t": 20, "b": 60},
        colorway=list(COLOURS),
    )
    html = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config={"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["lasso2d", "select2d"]},
    )
    return Markup(html)


def write_page(path: Path, page: str) -> None:
    """Write a page whole or not at all. Raises DataError where the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}; pass another --out") from error


def rows_of(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return facts as words for a table, those without a value left out."""
    return [(key.replace("_", " "), str(value)) for key, value in facts.items() if value not in (None, "")]
