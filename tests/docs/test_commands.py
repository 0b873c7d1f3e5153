"""Every command that a page shows is one that there is, with options that it has.

Commands are begun, stopped when they come to read their command line, and asked what they make of
it. Run for real are those of docs/remote.md (tests/scenarios/test_remote_page.py), of the tutorial
(here), and the quickstart (tests/scenarios/test_scenarios.py).
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from backends.options import Number, Whole
from docs import generate_commands
from docs.generate_commands import begun
from tests.docs.markdown import PAGES, ROOT, blocks, in_line
from tests.scenarios.commands import run

_GENERATED = re.compile(r"<!-- figures.*?: begin -->.*?<!-- figures.*?: end -->", re.DOTALL)
"""These say what was run at a commit of its own."""
_ENDS = ("|", "&&", "&", ">", "<", "2>&1", ";", "||", ")")
_LANGUAGES = ("", "sh", "sh there", "text")


class WrongError(Exception):
    """A command line that its command refuses."""


def lines(block: str) -> Iterator[str]:
    """A block's lines, those that go on joined; without what stands apart behind them.

    What may be left out, [--in brackets], is in them.
    """
    block = re.sub(r"\[(--[^\]]*)\]", r"\1", block.replace("\\\n", " "))
    for line in block.splitlines():
        yield re.split(r"(?<=\S) {2,}(?=[^-\s])|\s#", f"{line.strip()} ", maxsplit=1)[0]


def words_of(line: str) -> list[list[str]]:
    """The commands of a line, each from `python` or `make` on."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
    lexer.whitespace_split = True
    lexer.commenters = ""
    try:
        words = list(lexer)
    except ValueError:
        return []  # prose with an apostrophe
    found: list[list[str]] = []
    for place, word in enumerate(words):
        begins = place == 0 or words[place - 1] in _ENDS or "=" in words[place - 1]
        module = word.endswith("python") and words[place + 1 : place + 2] == ["-m"]
        if module or (word == "make" and begins and len(words) > place + 1):
            rest = words[place:]
            end = next((n for n, word in enumerate(rest) if word in _ENDS), len(rest))
            found.append(rest[:end])
    return found


def shown(page: Path) -> list[tuple[list[str], bool]]:
    """(words, whether that is all of it) of every command of a page."""
    text = _GENERATED.sub("", page.read_text(encoding="utf-8"))
    found, parts = [], in_line(text)
    for language, block in blocks(text):
        for line in lines(block) if language in _LANGUAGES else ():
            parts += line.split("`")[1::2]  # a command's help names others in its text
            found += [(words, True) for words in words_of(line) if "`" not in line]
    # In a message that is quoted, `make room` is none.
    named = [words for code in parts for words in words_of(code)]
    return found + [(words, False) for words in named if words[0] != "make" or len(words) == 2]


def lenient(kind: Any) -> Any:
    """An option's type for words that stand for others: numbers are looked at, places are not."""
    if not isinstance(kind, Whole | Number):
        return None
    return lambda text: kind(text) if text[:1].isdigit() else text


def soften(parser: argparse.ArgumentParser) -> None:
    """Nothing is written for an option, and words may stand for values."""

    def refuse(message: str) -> NoReturn:
        raise WrongError(message)

    parser.error = refuse  # type: ignore[method-assign]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                soften(inner)
        else:
            action.type = lenient(action.type)


def check(words: list[str], whole: bool) -> None:
    """Raises WrongError for a command that is not there, or options that it has not."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        if set(words[1:]) - set(targets):
            raise WrongError(f"make has no {words[1:]}")
        return
    _, _, module, *rest = words
    ours = module.partition(".")[0] in ("scenarios", "benchmarks", "sim", "docs")
    if not ours or not re.fullmatch(r"[a-z0-9_.]+", module):
        return  # pytest, or scenarios.NAME
    file = ROOT / module.replace(".", "/")
    if not file.with_suffix(".py").exists() and not (file / "__main__.py").exists():
        raise WrongError(f"there is no {module}")
    if module.startswith("docs."):
        if set(rest) - {"--check"}:
            raise WrongError(f"{module} has no such options")
        return
    parser, read = begun([module, *rest])
    if not whole or read[-1:] in (["..."], ["--help"]):
        options = {word.partition("=")[0] for word in read if word.startswith("--")}
        if options - set(parser._option_string_actions):
            raise WrongError(f"{module} has not all of {', '.join(sorted(options))}")
        return
    soften(parser)
    parsed = parser.parse_args(read)
    wrong = None if parser.modes is None else parser.modes.stranger(read, parsed)
    if wrong is not None:
        raise WrongError(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_there_with_their_options(page: Path) -> None:
    """In blocks of code whole, in lines at least what is written."""
    for words, whole in shown(page):
        try:
            check(words, whole)
        except WrongError as error:
            pytest.fail(f"{' '.join(words)}: {error}")


def test_pages_show_commands() -> None:
    """The reader of pages finds them: all that a person would."""
    found = {" ".join(words) for page in PAGES for words, whole in shown(page) if whole}
    assert len(found) > 60
    assert "make quickstart" in found
    assert "python -m scenarios.whatif --study home-office" in found
    worker = next(words for words in found if "scenarios.worker" in words and "$PORT" in words)
    assert worker.endswith("--metrics $METRICS")


@pytest.mark.parametrize(
    "line",
    [
        "python -m scenarios.nothing", "python -m scenarios.whatif --studio home-office",
        "make nothing", "python -m scenarios.params --in none-such=1 --rank 99",
        "python -m scenarios.worker --listen localhost:7443",  # it needs --model
        "python -m scenarios.llama1b --data texts",  # for real runs only
        "python -m scenarios.params --preset thin --rank 3",  # one or the other
        "cd there && python -m scenarios.params --nothing x | tee y",
        "python -m docs.generate_commands --rewrite",
    ],
)  # fmt: skip
def test_a_wrong_command_is_noticed(line: str) -> None:
    """By its name, its options, their values, and what does not go together."""
    ((words),) = words_of(line)
    with pytest.raises(WrongError):
        check(words, True)


def test_the_page_of_commands_is_fresh() -> None:
    """`python -m docs.generate_commands` changes nothing."""
    page = generate_commands.PAGE.read_text(encoding="utf-8")
    assert generate_commands.renewed(page) == page
    assert all(f"\n### {name}\n" in page for name in generate_commands.commands())


@pytest.mark.slow
def test_the_tutorial_works_as_it_is_written(tmp_path: Path) -> None:
    """Its steps with texts of one's own: a look at them, a training, a completion."""
    texts = tmp_path / "my-texts"
    texts.mkdir()
    (texts / "notes.txt").write_text("Dear diary, the worker sees ciphertexts only.\n" * 200)
    page = (ROOT / "docs" / "tutorial.md").read_text()
    script = "".join(text for language, text in blocks(page) if language == "sh")
    (model,) = re.findall(r"^MODEL=(\S+)$", script, re.MULTILINE)
    commands = [words for line in lines(script) for words in words_of(line)]
    assert [words[2] for words in commands] == [
        "scenarios.finetune", "scenarios.finetune", "scenarios.generate"
    ]  # fmt: skip
    said = []
    for _, _, *words in commands:
        here = [str(ROOT / model) if word == "$MODEL" else word for word in words]
        if "--steps" in here:
            here[here.index("--steps") + 1] = "2"
            here += ["--sequence", "64", "--batch", "1", "--evaluate-on", "1"]
            here += ["--sample-tokens", "2", "--yes"]
        said.append(run(*here, "--cache", str(tmp_path / "cache"), cwd=tmp_path))
    assert "read 1 file," in said[0]
    assert (tmp_path / "runs" / "mine" / "adapter" / "adapter_model.safetensors").is_file()
    assert "Dear" in said[2]
