"""One self-contained HTML page: headings, sentences, tables and figures, read from top to bottom."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

STYLE = """
body { font: 17px/1.55 Georgia, serif; color: #222; max-width: 46rem; margin: 3rem auto; padding: 0 1rem; }
h1 { font-size: 1.9rem; line-height: 1.2; } h2 { margin-top: 2.6rem; font-size: 1.25rem; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: .92rem; }
table { border-collapse: collapse; font: 15px/1.4 system-ui, sans-serif; margin: 1rem 0; }
td, th { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f5f5f2; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; line-height: 1.4; }
"""


class Report:
    """Collects parts in order; every text is text, never markup."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = [f"<h1>{escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        self._parts.append(f"<p>{escape(text)}</p>")

    def code(self, text: str) -> None:
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        cells = "".join(
            f'<tr><td>{escape(name)}</td><td class="number">{escape(value)}</td></tr>' for name, value in rows
        )
        self._parts.append(f"<table>{cells}</table>")

    def figure(self, figure: Figure, caption: str) -> None:
        """Put a figure in the page itself, so that the page can be sent as one file."""
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=150, bbox_inches="tight")
        image = base64.b64encode(data.getvalue()).decode()
        self._parts.append(
            f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{image}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def html(self) -> str:
        head = (
            f'<meta charset="utf-8"><title>{escape(self.title)}</title><style>{STYLE}</style>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
        )
        body = "\n".join(self._parts)
        return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'

    def write(self, path: Path) -> None:
        path.write_text(self.html(), encoding="utf-8")
