"""The site, where MkDocs is installed (`make docs` installs it)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs.markdown import DOCS, ROOT
from tests.docs.test_pages import in_the_list

pytest.importorskip("mkdocstrings", reason="no MkDocs: `make docs` installs it")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it, in a directory of its own."""
    place = tmp_path_factory.mktemp("site") / "built"
    config = DOCS / "site" / "mkdocs.yml"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-q", "-f", str(config), "-d", str(place)],
        capture_output=True, text=True, timeout=200, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return place


def test_every_page_of_the_list_is_built(site: Path) -> None:
    """Strictly: no dead link, no dead anchor, nothing left out."""
    listed = in_the_list(yaml.safe_load((DOCS / "site" / "mkdocs.yml").read_text())["nav"])
    assert all((site / page).with_suffix(".html").is_file() for page in listed)
    assert not list(site.rglob("*.py"))


def test_docstrings_are_there_as_they_were_written(site: Path) -> None:
    """Of both halves of a cipher, the messages and the verbs; fields are a list."""
    page = (site / "reference.html").read_text(encoding="utf-8")
    for name in ("OwnerCipher", "WorkerCipher", "Multiply", "LinearWanted", "WorldConfig"):
        assert f'.{name}"' in page, name
    assert "<li><code>weight</code>: int8[N, K] as stored" in page
    assert "::: " not in page


def test_blocks_of_code_and_links_survive(site: Path) -> None:
    """What a code host takes: words behind a language, and the README's links to docs/."""
    assert '<code class="language-sh">kill -9' in (site / "remote.html").read_text()
    overview = (site / "overview.html").read_text()
    assert 'href="security.html#' in overview
    assert 'href="docs/' not in overview
    assert 'href="overview.html#on-a-gpu"' in (site / "remote.html").read_text()
