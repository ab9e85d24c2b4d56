"""The page is one file, and whatever it is given is text."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from matplotlib.figure import Figure

from mechanistic.analysis.report import Report


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report__question_text_is_text(tmp_path: Path) -> None:
    attack = '<script>alert("x")</script>'
    report = Report(attack)
    report.heading(attack)
    report.paragraph(attack)
    report.code(attack)
    report.table([(attack, attack)])
    report.figure(Figure(), f'"{attack}')
    report.write(tmp_path / "page.html")
    page = Tags()
    page.feed((tmp_path / "page.html").read_text())
    assert "script" not in page.tags
    assert page.text.count(attack) == 8


def test_report__is_self_contained(tmp_path: Path) -> None:
    report = Report("title")
    report.figure(Figure(), "a figure")
    report.write(tmp_path / "page.html")
    page = Tags()
    page.feed((tmp_path / "page.html").read_text())
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
