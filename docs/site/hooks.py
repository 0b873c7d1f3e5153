"""What MkDocs asks of this project: pages that are not in docs/, and what it reads otherwise.

The pages themselves are written for a code host as well, so nothing of the site is in them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = {"README.md": "overview.md", "tests/README.md": "tests.md", "CHANGELOG.md": "changes.md"}
"""Files of the repository and what their pages are called."""
_TWO_INDICES = re.compile(r"\]\[(?=[^`\n]*(?:`[^`\n]*`[^`\n]*)*$)", re.MULTILINE)
_WORDS_AFTER_LANGUAGE = re.compile(r"^(```\w+) .*$", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Adds those pages, their links turned to the site's."""
    for path, page in OUTSIDE.items():
        text = (ROOT / path).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=linked(text, "")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page's links turned, and what Python-Markdown reads otherwise than a code host.

    Of a code block's first line only the language counts; int8[T][K] is no link.
    """
    text = _WORDS_AFTER_LANGUAGE.sub(r"\1", linked(markdown, "../"))
    return _TWO_INDICES.sub(r"]\\[", text)


def linked(text: str, up: str) -> str:
    """Links to the files of `OUTSIDE`, written with `up` before them, as links to their pages."""
    for path, page in OUTSIDE.items():
        text = text.replace(f"]({up}{path}", f"]({page}")
    return text
