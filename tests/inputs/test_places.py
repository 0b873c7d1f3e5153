"""Places to write to: whatever they are, one line before anything long, and nothing left behind."""

from __future__ import annotations

import argparse
import ast
import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from backends import places
from backends.files import replacing
from backends.places import (
    PlaceError,
    output_directory,
    output_file,
    replaced_directory,
    require_room,
    taken_bytes,
)
from scenarios import certs, record
from scenarios.chaos import __main__ as chaos
from scenarios.cli import one_line
from scenarios.finetune import __main__ as finetune
from scenarios.llama1b import __main__ as llama1b
from scenarios.merge import __main__ as merge
from scenarios.options import add_cache_option
from scenarios.prepare import __main__ as prepare
from scenarios.prepare import run as preparing
from scenarios.quickstart import __main__ as quickstart
from scenarios.whatif import __main__ as whatif
from sim import calibrate
from tests.inputs.full import full

ROOT = Path(__file__).resolve().parents[2]
KINDS = (output_directory, replaced_directory, output_file)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with one of everything, which is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("held")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def listing(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


BAD = {
    "file/below": "file is a file",
    "file/far/below": "file is a file",
    "link/below": "link is a link to nothing",
    "": "an empty name",
    "  ": "an empty name",
    "a\0b": "NUL",
    "\udcff": "UTF-8",
    "x" * 300: "File name too long",
    "new/" + "x" * 300: "File name too long",
    "x/" * 3000: "File name too long",
    "~nobody-of-this-name/x": "home directory",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_no_place_at_all(here: Path, kind: Callable[[str], Path], text: str) -> None:
    """Said in one line of bearable length, with what is wrong; nothing has been made."""
    before = listing(here)
    text = text.rstrip("/")
    with pytest.raises(PlaceError) as refused:
        kind(text)
    said = str(refused.value)
    assert BAD.get(text, BAD.get(f"{text}/", "")) in said
    assert "\n" not in said
    assert len(said) < 400
    assert listing(here) == before


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (output_directory, "file", "is a file; name a directory"),
        (replaced_directory, "file", "is a file; name a directory"),
        (output_directory, "pipe", "is a file; name a directory"),
        (output_directory, "link", "it is a link to nothing"),
        (replaced_directory, ".", "name a directory of its own"),
        (replaced_directory, "x" * 250, "File name too long"),
        (output_file, "directory", "it is a directory"),
        (output_file, "new/", "it is a directory"),
        (output_file, ".", "it is a directory"),
        (output_file, "pipe", "no regular file"),
        (output_file, "/dev/null", "no regular file"),
        (output_file, "x" * 250, "File name too long"),
    ],
)
def test_the_wrong_kind_of_place(
    here: Path, kind: Callable[[str], Path], text: str, said: str
) -> None:
    """A file for a directory and the other way round, a pipe, a device, a name without room."""
    with pytest.raises(PlaceError, match=said):
        kind(text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["new", "directory/new", "deep/er/new", "directory/../a b\nc"])
def test_a_place_that_will_do(here: Path, kind: Callable[[str], Path], text: str) -> None:
    """Missing parents are no error; nothing is there afterwards that was not."""
    before = listing(here)
    assert kind(text) == Path(text)
    assert listing(here) == before


def test_home_is_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--out=~/x` reaches us as it is typed."""
    monkeypatch.setenv("HOME", str(here / "directory"))
    assert output_directory("~/x") == here / "directory" / "x"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_what_the_system_refuses(here: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only file system, permissions, a full disk, a quota: by trying, whatever it is."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(places, "_try", refuse)
    before = listing(here)
    for kind in (output_directory, replaced_directory):
        with pytest.raises(PlaceError, match=os.strerror(code)):
            kind("deep/er")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(PlaceError, match=os.strerror(code)):
        output_file("deep/er")
    assert listing(here) == before


def test_a_full_disk_is_noticed_by_writing(here: Path) -> None:
    """An empty file can be made on one; what is held by a file that cannot grow stays."""
    with full():
        for kind in KINDS:
            with pytest.raises(PlaceError, match="File too large"):
                kind("new")
    (here / "file").write_text("held" * 100)
    (here / "file").chmod(0o640)
    with full(), pytest.raises(PlaceError):
        output_file("file")
    assert (here / "file").read_text() == "held" * 100
    output_file("file")
    assert (here / "file").read_text() == "held" * 100
    assert stat.S_IMODE((here / "file").stat().st_mode) == 0o640


def test_leftovers_of_the_dead_go_and_of_the_living_stay(here: Path) -> None:
    """Only of this very file."""
    dead = [f".f.json.{'1' * 16}.tmp", f".g.json.{'2' * 16}.tmp", ".f.json.notes.tmp"]
    for name in dead:
        (here / name).write_text("half")
    with replacing(here / "f.json") as living:
        living.write(b"whole")
        output_file("f.json")
    assert (here / "f.json").read_bytes() == b"whole"
    assert [name for name in dead if (here / name).exists()] == dead[1:]


def test_room(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both numbers, where, and what can be done; of a place that is not there yet, too."""
    usage = shutil.disk_usage(here)._replace(free=3_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    require_room(here / "new" / "deep", 3_000_000, "this", "go")
    with pytest.raises(PlaceError, match=r"this needs 3\.1 MB .*new.* has 3\.0 MB free.*go"):
        require_room(here / "new", 3_100_000, "this", "go")
    assert taken_bytes(here) == len("held")
    assert taken_bytes(here / "new") == 0


def main_of(module: object) -> Callable[[list[str]], object]:
    def call(arguments: list[str]) -> object:
        sys.argv = ["command", *arguments]
        return module.main()  # type: ignore[attr-defined]

    return call


def cache_of(arguments: list[str]) -> object:
    parser = argparse.ArgumentParser()
    add_cache_option(parser)
    return parser.parse_args(arguments)


COMMANDS: dict[str, tuple[Callable[[list[str]], object], tuple[str, ...]]] = {
    "llama1b": (llama1b.parse, ("--out", "--json", "--trace", "--cache")),
    "quickstart": (quickstart.parse, ("--out", "--json", "--trace", "--cache")),
    "finetune": (finetune.parse, ("--out", "--json", "--trace", "--cache")),
    "merge": (merge.parse, ("--into", "--json")),
    "prepare": (main_of(prepare), ("--worker-part", "--json", "--cache")),
    "certs": (main_of(certs), ("--out", "--authority")),
    "chaos": (chaos.parse, ("--json", "--trace")),
    "whatif": (whatif.parse, ("--json", "--out")),
    "calibrate": (main_of(calibrate), ("--json", "--out")),
    "cache": (cache_of, ("--cache",)),
}


@pytest.mark.parametrize(
    ("command", "option"), [(name, o) for name, (_, options) in COMMANDS.items() for o in options]
)
@pytest.mark.parametrize("text", ["file/below", "a\0b", "x" * 300])
def test_every_command_looks_first(
    here: Path, command: str, option: str, text: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The option is named, in the last line, and the status is that of a bad command line."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as ended:
        COMMANDS[command][0]([option, text])
    assert ended.value.code == 2
    assert f"error: argument {option}: " in capsys.readouterr().err.splitlines()[-1]


def test_no_option_was_forgotten() -> None:
    """Every option of that name in any command is of a type that looks."""
    outputs = {"--out", "--json", "--trace", "--worker-part"}
    kinds = {kind.__name__ for kind in KINDS} | {"width"}  # of a matrix, in scenarios.params
    seen = 0
    for room in ("scenarios", "benchmarks", "sim"):
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text()
            if not any(f'"{option}"' in text for option in outputs):
                continue
            for node in ast.walk(ast.parse(text)):
                if not (isinstance(node, ast.Call) and node.args):
                    continue
                first = node.args[0]
                called = ast.unparse(node.func).rpartition(".")[2]
                if called not in ("add", "add_argument") or not isinstance(first, ast.Constant):
                    continue
                if first.value in outputs:
                    types = [k.value for k in node.keywords if k.arg == "type"]
                    assert next(map(ast.unparse, types)) in kinds, f"{path}: {first.value}"
                    seen += 1
    assert seen >= 10


def test_figures_that_cannot_be_written_are_printed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that has filled meanwhile costs the file, not the hours."""
    (here / "f.json").write_text("former")
    with full(), pytest.raises(SystemExit) as ended:
        record.write(here / "f.json", {"seconds": 1.5}, found={})
    assert str(ended.value.code).startswith("error: ")
    assert "File too large" in str(ended.value.code)
    assert '{"seconds": 1.5}' in capsys.readouterr().out
    assert (here / "f.json").read_text() == "former"
    assert listing(here).count("f.json") == 1


@pytest.mark.parametrize("content", [None, "notes", "manifest"])
def test_a_worker_part_that_cannot_be_is_said_before_preparing(
    here: Path, content: str | None
) -> None:
    """An empty directory will do, one of ours may; anything else is not replaced."""
    part = here / "part"
    part.mkdir()
    if content is not None:
        (part / ("manifest.json" if content == "manifest" else "notes")).write_text("{}")
    if content == "notes":
        with pytest.raises(Exception, match="no worker's part"):
            preparing._require_free(part, here / "cache")
    else:
        preparing._require_free(part, here / "cache")
    with pytest.raises(Exception, match="outside the cache"):
        preparing._require_free(here / "cache" / "part", Path("cache"))


def test_half_of_the_certificates_is_not_left(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full between the two: the same command can be given again."""
    real = certs.Authority.issue

    def issue(self: certs.Authority, directory: Path, hosts: tuple[str, ...] = ()) -> None:
        with full(0 if hosts else 1 << 20):
            real(self, directory, hosts)

    monkeypatch.setattr(certs.Authority, "issue", issue)
    with pytest.raises(OSError, match="cannot be written"):
        certs.make(here / "certs", ["localhost"], 10)
    monkeypatch.undo()
    assert listing(here / "certs") == []
    assert "identity" in certs.make(here / "certs", ["localhost"], 10)


def test_an_error_obeys_no_terminal() -> None:
    """Names of files may hold anything; the line is one line, and only shows it."""
    assert one_line("a\x1b[2J\u202eb\nc") == "a\\x1b[2J\\u202eb c"
