"""Options that several commands have.

Nothing here takes long to load: whoever types something wrong, or asks for --help, is answered at
once (`python -m benchmarks.startup`). What acts on these options is in the modules named after it.
"""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Sequence
from pathlib import Path

from backends.defaults import CLIP, LEAST_DELTA, LEAST_REMOTE, OWNER_TAG_BYTES
from backends.he.params import PRESETS
from backends.options import ALL, Modes, Number, place
from backends.places import PlaceError, cache_directory, named

TINY_LLAMA = Path(__file__).parent / "assets" / "tiny-llama"
"""The small model of this repository, which needs no download."""
HEADS = ("local", "remote")
HEAD_CHOICES = (*HEADS, "auto")


def add_cache_option(parser: argparse.ArgumentParser) -> None:
    """`--cache`. One that cannot be looked into, or no home to have it in, is an error at once."""
    parser.add_argument(
        "--cache", type=_cache, default="", metavar="DIR",
        help="where prepared models are kept ($XDG_CACHE_HOME/private-lora, or "
        "~/.cache/private-lora)",
    )  # fmt: skip


def _cache(text: str) -> Path:
    """Of an option's text, or where prepared models live when there is none."""
    try:
        place = named(text) if text else cache_directory()
        place.exists()
        there = next(each for each in (place, *place.parents) if os.path.lexists(each))
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is no directory")
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: of an unknown user
        why = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(
            f"{text or 'no place of your own'}: {why}; name a directory that you can use"
        ) from error
    return place


def add_preparation_options(parser: argparse.ArgumentParser, usual: str = "thin") -> None:
    """`--preset`, `--owner-tag` and `--cache`: which prepared model, and where.

    usual  preset
    """
    add = parser.add_argument
    add("--preset", default=usual, choices=sorted(PRESETS),
        help="cipher: `thin` has few bits and products a few per cent off, `thin-6bit` rounds "
        "weights to 6 bits too, `exact` has products to some tenths of a per cent and nothing "
        "wraps; `conservative` and `paranoid` are exact with larger lattices "
        f"({usual})")  # fmt: skip
    add("--owner-tag", type=_owner_tag, default=b"", metavar="TEXT",
        help="prepare a public matrix and hints of your own instead of those that all owners of "
        "the model share (docs/security.md); any text, not a secret")  # fmt: skip
    add_cache_option(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """`--weights` and `--lm-head`: which model; and the above. `chosen_base` needs `--seed` too."""
    add = parser.add_argument
    add(
        "--weights",
        type=weights_text,
        metavar="DIR|FILE|ID",
        help="checkpoint: a directory, a GGUF file, or an id of the hub; random weights without",
    )
    add_head_options(parser)
    add_preparation_options(parser)


def add_head_options(parser: argparse.ArgumentParser) -> None:
    """`--lm-head` and `--least-remote`: what of a model is the workers'."""
    add = parser.add_argument
    add("--lm-head", choices=HEAD_CHOICES, default="local",
        help="who multiplies by the head: remote saves the owner work and costs traffic (see "
        "docs/design.md); auto asks the simulator and says why")  # fmt: skip
    add(
        "--least-remote",
        type=Number(0, 1),
        default=LEAST_REMOTE,
        metavar="SHARE",
        help="refuse a model of whose frozen weights workers can compute less than this "
        f"({LEAST_REMOTE:g})",
    )


def weights_text(text: str) -> str:
    """For an option's type: a directory or a hub id. What is left empty, as by a variable that is
    not set, is neither.
    """
    place(text)
    try:
        named(text)
    except PlaceError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _owner_tag(text: str) -> bytes:
    tag = os.fsencode(text)
    if not 1 <= len(tag) <= OWNER_TAG_BYTES:
        raise argparse.ArgumentTypeError(f"a tag has 1 to {OWNER_TAG_BYTES} bytes")
    return tag


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    """`--worker` and `--tls`."""
    parser.add_argument(
        "--worker", action="append", default=[], metavar="HOST:PORT",
        help="a worker on another machine, see `python -m scenarios.worker` (several times: the "
        "work is shared, and one takes over for another); one in this process without. The run "
        "probes the line first, and says how long it will take",
    )  # fmt: skip
    parser.add_argument(
        "--tls", type=place, metavar="DIR",
        help="this side's ca.pem, cert.pem and key.pem, see `python -m scenarios.certs`; only "
        "workers on this machine can do without",
    )  # fmt: skip


def modes_with_workers(names: Sequence[str]) -> Modes:
    """Of a command that takes these options always, and `--tls` where `add_worker_options` has a
    worker elsewhere."""
    return Modes(
        {"elsewhere": "a run with --worker"},
        lambda args: ("elsewhere",) if args.worker else (),
        {"--tls": ("elsewhere",)} | dict.fromkeys(names, ALL),
    )


def add_loss_option(parser: argparse.ArgumentParser) -> None:
    """--loss-on."""
    parser.add_argument(
        "--loss-on", choices=("all", "completions"),
        help="what is counted: all tokens, or of conversations and pairs what the assistant says "
        "(completions, if the chat template tells; docs/texts.md)",
    )  # fmt: skip


DP_OPTIONS = ("--dp-epsilon", "--dp-delta", "--dp-clip")


def add_dp_options(parser: argparse.ArgumentParser) -> None:
    """`DP_OPTIONS`, for `dp_of`."""
    parser.add_argument(
        "--dp-epsilon", type=Number(1e-3, 1e3), metavar="E",
        help="differential privacy: clip each sequence's gradient and add noise, so that the "
        "adapter tells little of any one of them, within this budget for all steps; takes "
        "--preset exact (docs/dp.md)",
    )  # fmt: skip
    parser.add_argument(
        "--dp-delta", type=Number(LEAST_DELTA, 0.1), metavar="D",
        help=f"its delta, from {LEAST_DELTA:g}, below 1/n for n sequences (n^-1.1)",
    )  # fmt: skip
    parser.add_argument(
        "--dp-clip", type=Number(1e-9, 1e9), metavar="C",
        help=f"what the gradient of a sequence's mean loss may weigh at most ({CLIP})",
    )  # fmt: skip
