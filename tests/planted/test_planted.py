"""The planted defects: each still fits the source, and a few are looked for from end to end."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from scenarios.chaos.planted import PATCHES, ROOT, PatchError, Planted, all_planted, copy_tree, seek

ALL = all_planted()


def only_the_files(planted: Planted, target: Path) -> Path:
    """A tree with just what one defect changes."""
    for file, _, _ in planted.changes:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, target / file)
    return target


def test_there_are_enough_of_them() -> None:
    """And every one says what it breaks."""
    assert len(ALL) >= 15
    assert len(list(PATCHES.glob("*.patch"))) == len(ALL)
    assert all(planted.what and planted.changes for planted in ALL)


@pytest.mark.parametrize("planted", ALL, ids=lambda planted: planted.name)
def test_every_patch_applies(planted: Planted, tmp_path: Path) -> None:
    """The patched source differs and is still Python; taking it back restores it."""
    tree = only_the_files(planted, tmp_path)
    planted.apply(tree)
    for file, _, _ in planted.changes:
        text = (tree / file).read_text()
        assert text != (ROOT / file).read_text()
        compile(text, file, "exec")
    planted.take_back(tree)
    for file, _, _ in planted.changes:
        assert (tree / file).read_bytes() == (ROOT / file).read_bytes()


@pytest.mark.parametrize("planted", [p for p in ALL if p.found_by != "chaos"], ids=lambda p: p.name)
def test_named_tests_exist(planted: Planted) -> None:
    """`Found by:` names a test of this tree."""
    file, _, name = planted.found_by.partition("::")
    assert f"def {name}(" in (ROOT / file).read_text()


def test_a_patch_that_no_longer_fits_is_an_error(tmp_path: Path) -> None:
    """It names the file."""
    planted = ALL[0]
    tree = only_the_files(planted, tmp_path)
    file = planted.changes[0][0]
    (tree / file).write_text("# rewritten\n")
    with pytest.raises(PatchError, match=file):
        planted.apply(tree)


@pytest.mark.parametrize("text", ["", "words\nFound by: chaos\n", "--- a/x\n+++ b/x\n"])
def test_what_is_no_patch_is_an_error(text: str, tmp_path: Path) -> None:
    """A reason and a diff belong to it."""
    path = tmp_path / "bad.patch"
    path.write_text(text)
    with pytest.raises(PatchError, match=r"bad\.patch"):
        Planted.read(path)


@pytest.mark.slow
def test_chaos_and_a_named_test_find_theirs(tmp_path: Path) -> None:
    """End to end in a copy of the tree; the copy is whole again afterwards."""
    copy_tree(tmp_path)
    names = {planted.name: planted for planted in ALL}
    # The first two seeds from 1 on compute in clear, so that no kernel is compiled for the copy.
    by_chaos = seek(names["timer-not-cancelled"], tmp_path, seeds=20, first=1)
    assert by_chaos.found
    assert 1 <= by_chaos.seeds <= 20
    assert "timer" in by_chaos.how
    assert seek(names["answer-size-unchecked"], tmp_path).found
    for file in ("protocol/owner.py",):
        assert (tmp_path / file).read_bytes() == (ROOT / file).read_bytes()
