"""The project's pages, read as a code host reads them: headings, links, blocks of code."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted((
    *DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "tests" / "README.md"
))  # fmt: skip
"""Every page of the repository."""

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
_CODE = re.compile(r"(`+)(.+?)\1", re.DOTALL)


def blocks(text: str) -> list[tuple[str, str]]:
    """(what stands behind the fence, text) of every block of code."""
    return [(found[1].strip(), found[2]) for found in _FENCE.finditer(text)]


def prose(text: str) -> str:
    """The page without its blocks of code."""
    return _FENCE.sub("", text)


def in_line(text: str) -> list[str]:
    """Code within lines, line ends as spaces."""
    return [" ".join(found[2].split()) for found in _CODE.finditer(prose(text))]


def links(text: str) -> list[str]:
    """Where a page's links and pictures lead, but for those to other hosts."""
    plain = _CODE.sub("", prose(text))
    return [to for to in _LINK.findall(plain) if not re.match(r"[a-z]+:", to)]


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub and GitLab make them."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in _headings(text):
        name = _CODE.sub(r"\2", heading).lower()
        name = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", name)
        kept = "".join(c for c in name if c in " -_" or unicodedata.category(c)[0] in "LN")
        slug = kept.strip().replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def _headings(text: str) -> Iterator[str]:
    for line in prose(text).splitlines():
        hashes, space, heading = line.partition(" ")
        if space and hashes and not hashes.strip("#"):
            yield heading
