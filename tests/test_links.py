"""Every link inside the documentation leads to a file that is there, and to a heading in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[1]
PAGES = sorted([*PACK.glob("*.md"), *(PACK / "docs").rglob("*.md"), *(PACK / "web").rglob("*.md")])
CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(<?([^()\s>]+)>?(?: \"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"")
HEADING = re.compile(r"^#{1,6} +(.*?) *#*$", re.MULTILINE)
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)


def links_of(text: str) -> list[str]:
    """The targets inside the repository; code shows links without being any."""
    found = [link or attribute for link, attribute in LINK.findall(CODE.sub("", text))]
    return [target for target in found if not ELSEWHERE.match(target)]


def anchors_of(text: str) -> set[str]:
    """Headings as GitHub makes anchors of them: a second one of the same words gets "-1"."""
    without_blocks = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    anchors: list[str] = []
    for heading in HEADING.findall(without_blocks):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        base = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        before = sum(re.fullmatch(rf"{re.escape(base)}(-\d+)?", a) is not None for a in anchors)
        anchors.append(f"{base}-{before}" if before else base)
    return set(anchors)


def broken_links(page: Path, text: str) -> list[str]:
    """The targets in this text of a page that lead nowhere."""
    broken = []
    for target in links_of(text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path if path else page).resolve()
        inside = file.is_relative_to(PACK) and file.exists()
        if not inside or (
            anchor
            and file.suffix == ".md"
            and anchor not in anchors_of(file.read_text(encoding="utf-8"))
        ):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(PACK)) for page in PAGES])
def test_every_link_leads_somewhere(page):
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_links_and_anchors_are_read_as_github_does():
    text = '[a](x.md#b) ![c](<d.png>) `[e](f)` [g](https://h) <img src="i.png">\n```\n[j](k)\n```\n'
    assert links_of(text) == ["x.md#b", "d.png", "i.png"]
    headings = "# What is *not* done?\n## `ppcl run`, twice\n## Twice\n### Twice\n```\n# no\n```\n"
    assert anchors_of(headings) == {"what-is-not-done", "ppcl-run-twice", "twice", "twice-1"}


def test_a_broken_link_is_found():
    page = PACK / "docs" / "architecture.md"
    text = "[a](nowhere.md) [b](#nowhere) [c](../README.md) [d](#where-things-are)"
    assert page in PAGES and broken_links(page, text) == ["nowhere.md", "#nowhere"]
