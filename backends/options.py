"""What options of a command can be: numbers within bounds, places, files; each option of its mode.

Whoever types what cannot be is told at once, in one line that says what can. Nothing is read or
computed for it but a look at a path, and nothing is imported that takes long.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Whole:
    """A whole number from `least` to `most`, for an option's type.

    powers  also as a power, such as 2^30
    """

    least: int = 1
    most: int = 1_000_000_000
    powers: bool = False

    def __call__(self, text: str) -> int:
        """Raises ArgumentTypeError for all that is none."""
        base, power, exponent = (
            text.strip().partition("^") if self.powers else (text.strip(), "", "")
        )
        parts = [part.lstrip("0") or part[-1:] for part in ((base, exponent) if power else (base,))]
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise self._refused(text)
        # By its length before it is computed: a power may have any number of digits.
        if any(len(part) > 30 for part in parts):
            raise self._too_large(text)
        number, times = int(parts[0]), int(parts[1]) if power else 1
        if (number > 1 and times > self.most.bit_length()) or number**times > self.most:
            raise self._too_large(text)
        if number**times < self.least:
            raise self._refused(text)
        return int(number**times)

    def _refused(self, text: str) -> argparse.ArgumentTypeError:
        return argparse.ArgumentTypeError(
            f"{shown(text)} is no whole number from {self.least} to {self.most}"
        )

    def _too_large(self, text: str) -> argparse.ArgumentTypeError:
        return argparse.ArgumentTypeError(
            f"{shown(text)} is too large; a whole number from {self.least}, at most {self.most}"
        )


@dataclass(frozen=True)
class Number:
    """A number from `least` to `most`, both finite, for an option's type."""

    least: float
    most: float

    def __call__(self, text: str) -> float:
        """Raises ArgumentTypeError for all that is none: NaN and infinities, too."""
        stripped = text.strip()
        if _DECIMAL.fullmatch(stripped) and self.least <= float(stripped) <= self.most:
            return float(stripped)
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is no number from {self.least:g} to {self.most:g}"
        )


LEARNING_RATE = Number(1e-12, 100.0)
"""Adam moves a weight by about so much a step: less is nothing in fp32, more is no training."""
SEED = Whole(0, 2**63 - 1)
"""What torch's generators take; the nanoseconds of a clock among them."""
STEPS = Whole(1, 999_999)
"""Of a training: a checkpoint's name has six digits."""
TOKENS = Whole(1, 4096)
"""Of one request: what a worker takes."""
SEQUENCE = Whole(2, 4096)
"""Tokens; of one alone nothing can be predicted."""
LANES = Whole(1, 256)
"""Each is a thread with a micro-batch of its own in memory."""
RANK = Whole(1, 4096)
SECONDS = Number(0, 86_400)
"""Up to a day."""
TIMES = Whole(1, 1_000_000)
"""Rounds and repeats of a benchmark."""
PROCESSES = Whole(1, 1024)


def shown(text: str) -> str:
    """For a message: what somebody typed, cut where it is long."""
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def place(text: str) -> Path:
    """A path that can be, whether or not anything is there, for an option's type.

    Raises ArgumentTypeError for one that is empty, too long, below a file, or not to be looked at.
    """
    if not text:
        raise argparse.ArgumentTypeError("an empty path; this directory is '.'")
    try:
        os.lstat(text)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"{shown(text)}: {why}") from error
    return Path(text)


ALL: tuple[str, ...] = ()
"""The modes of an option that each mode takes."""


@dataclass(frozen=True)
class Modes:
    """What a command can be asked to do, and which options each of that takes.

    named   every mode in words: what asks for it
    active  the modes that parsed options ask for, one or several
    of      the modes that take an option, one of which must be active; ALL for any
    """

    named: Mapping[str, str]
    active: Callable[[argparse.Namespace], Collection[str]]
    of: Mapping[str, Sequence[str]]

    def stranger(self, words: Sequence[str], parsed: argparse.Namespace) -> str | None:
        """What is wrong with the first option of another mode in a command line; None for none."""
        active = set(self.active(parsed))
        for word in words:
            modes = self.of.get(word.partition("=")[0], ALL)
            if modes and active.isdisjoint(modes):
                asked = " or ".join(self.named[mode] for mode in modes)
                return f"{word.partition('=')[0]} is for {asked}"
        return None


class Parser(argparse.ArgumentParser):
    """A command line. Options are written out, and one of another mode is refused: it would change
    nothing, and whoever gives it expects that it does.

    doc   the command's help
    name  what comes after `python -m`
    """

    def __init__(self, doc: str | None, name: str, modes: Modes | None = None) -> None:
        super().__init__(
            prog=f"python -m {name}", description=doc, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        self.modes = modes

    def options(self) -> dict[str, argparse.Action]:
        """Every option by each of its long names, but --help."""
        named = {name: action for action in self._actions for name in action.option_strings}
        return {n: a for n, a in named.items() if n.startswith("--") and n != "--help"}

    def rivals(self, action: argparse.Action) -> set[argparse.Action]:
        """The options of which only one may be given, where this is among them."""
        groups = [set(group._group_actions) for group in self._mutually_exclusive_groups]
        return set().union(*(group for group in groups if action in group))

    def parse(self, words: Sequence[str] | None = None) -> argparse.Namespace:
        """The options of a command line (this process's own). Ends the process, as argparse does,
        with what is wrong."""
        words = sys.argv[1:] if words is None else words
        if any(word == "--" or word.endswith("=--") for word in words):
            self.error("'--' is no value, and nothing comes after it")  # argparse makes [] of it
        parsed = self.parse_args(words)
        wrong = None if self.modes is None else self.modes.stranger(words, parsed)
        if wrong is not None:
            self.error(wrong)
        return parsed
