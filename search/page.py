"""Pages that people are sent: one HTML file with its pictures and charts, that asks no network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

_TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **content: object) -> bytes:
    """Fill in a template that extends base.html; whatever is not Markup is escaped."""
    drawing = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    scripts = [Markup(text) for text in (get_plotlyjs(), drawing)]
    page = (
        _environment()
        .get_template(template)
        .render(scripts=scripts, script_sources=_sources(scripts), **content)
    )
    return page.encode()


def chart(figure: Figure, label: str) -> Markup:
    """Return a chart as HTML, its data as JSON that page.js draws.

    label: what it shows, for whoever cannot see it.
    """
    # Nothing in a JSON block ends it but </script>, and < stands only in texts.
    data = str(figure.to_json()).replace("<", "\\u003c")
    return Markup(
        '<div class="chart" role="img" aria-label="{}"><script type="application/json">{}'
        "</script></div>"
    ).format(label, Markup(data))


def picture_uri(data: bytes) -> str:
    """Return an encoded picture (PNG or JPEG) as a data: URI."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _sources(scripts: Sequence[str]) -> str:
    """Name these scripts for the Content-Security-Policy, which then lets no other one run."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in scripts)
    return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "reward": lambda value: f"{value:.4f}",
        "signed": lambda value: f"{value:+.4f}",
    }
    return environment
