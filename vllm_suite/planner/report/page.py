"""A report as one HTML file that needs nothing else: no scripts, no fonts, no pictures from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: 13px; line-height: 1.4; }
figure { margin: 0; overflow-x: auto; } figcaption { color: #555; font-size: 13px; }
svg { max-width: 100%; height: auto; }
"""


@dataclass(frozen=True)
class Section:
    """A heading and what is below it: plain text, shown as it is, or a picture as an ``<svg>`` element."""

    heading: str
    text: str = ""
    svg: str = ""
    caption: str = ""


def page(title: str, sections: Sequence[Section]) -> str:
    """The file's text."""
    parts = [f"<h1>{escape(title)}</h1>"]
    for number, section in enumerate(sections):
        parts.append(f"<h2>{escape(section.heading)}</h2>")
        if section.text:
            parts.append(f"<pre>{escape(section.text)}</pre>")
        if section.svg:
            caption = f"<figcaption>{escape(section.caption)}</figcaption>" if section.caption else ""
            parts.append(f"<figure>{_own(section.svg, number)}{caption}</figure>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _own(svg: str, number: int) -> str:
    """With ids of its own: those of two pictures in one page are in one space."""
    for mark in ('id="', 'href="#', "url(#"):
        svg = svg.replace(mark, f"{mark}p{number}-")
    return svg
