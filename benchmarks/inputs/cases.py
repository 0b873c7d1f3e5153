"""What is drawn for one case: a command line, from the command's own parser."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from backends.options import Number, Whole
from benchmarks.inputs import bring, made, values
from benchmarks.inputs.entries import ENTRIES, Entry

NASTY = 0.6
"""Part of the drawn options that get what is not ordinary."""
_BASED = 0.85
_AS_TWO_WORDS = 0.3

Draw = random.Random


@dataclass(frozen=True)
class Value:
    """What an option is given. `never`: no command can make sense of it."""

    text: str
    never: bool = False


@dataclass
class Case:
    """One command line.

    words     after the command's name; {pool} and {mine} stand for folders
    nonsense  words of it that can never be right
    """

    number: int
    entry: Entry
    words: list[str]
    nonsense: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """As somebody would see it in a shell."""
        shown = [w if len(w) <= 60 else f"{w[:60]}..." for w in map(ascii, self.words)]
        return " ".join([f"python -m {self.entry.name}", *shown])


_GOOD = "--weights={pool}/weights/good"
_SMALL = ("--tokens=64", "--sequence=64", "--steps=2")
_REAL = ("--real-cpu", _GOOD, "--data={pool}/data/good.txt", "--cache={pool}/cache", *_SMALL)
BASES: Mapping[str, Sequence[Sequence[str]]] = {
    "scenarios.quickstart": (("--cache={pool}/cache", "--steps=2"),),
    "scenarios.llama1b": (
        _REAL, _REAL, _REAL, ("--real-cpu", *_SMALL), _SMALL, (*_SMALL, "--gpu=l4"),
        ("--real-gpu", _GOOD), (*_REAL, "--compare-clear"),
        (*_REAL, "--worker=localhost:1", "--tls={pool}/tls/owner"),
    ),
    "scenarios.generate": (
        ("--prompt=x", "--cache={pool}/cache"), (_GOOD, "--prompt=x", "--cache={pool}/cache"),
    ),
    "scenarios.endpoint": (("--listen=127.0.0.1:0", "--cache={pool}/cache"), (_GOOD,)),
    "scenarios.finetune": (
        (_GOOD, "--data={pool}/data/good.txt", "--cache={pool}/cache", "--sequence=64",
         "--steps=2", "--sample-tokens=0"),
    ),
    "scenarios.merge": ((_GOOD, "--adapter={mine}/new", "--into={mine}/merged"),),
    "scenarios.prepare": ((_GOOD, "--cache={pool}/cache"), ()),
    "scenarios.params": ((),),
    "scenarios.certs": ((), ("--check={pool}/tls/owner",)),
    "scenarios.worker": (
        ("--model={pool}/model", "--listen=localhost:0"),
        ("--model={pool}/model", "--listen=0.0.0.0:0", "--tls={pool}/tls/worker"),
    ),
    "scenarios.whatif": (
        ("--sweep=lanes=1,2", "--set=tokens=64", "--set=steps=1"),
        ("--study={pool}/studies/good.toml",),
    ),
    "scenarios.chaos": (("--seeds=2",), ("--seed=1",), ("--planted",), ("--mutants",)),
    "scenarios.chaos --processes": (("--kills=1",), ("--quickstart",)),
    "scenarios.crashes.owner": (
        ("--model={mine}/new", "--prepare"), ("--model={pool}/model", "--worker=localhost:1"),
    ),
    "scenarios.make_tiny_llama": (("--steps=1",),),
    "benchmarks.fidelity": ((), ("--network",)),
    "benchmarks.network_owner": (("--worker=localhost:1", "--tls={pool}/tls/owner"),),
    "benchmarks.gpu_fidelity": (("--figures={pool}/figures.json", "--gpu", "h100"),),
    "benchmarks.he_linear": (("--rounds=1", "--tokens", "1"),),
    "benchmarks.inputs": (("--cases=3",),),
}  # fmt: skip
"""Command lines from which a case departs; of a command without any, the empty one."""


class Drawer:
    """Draws cases from a seed: the same seed, the same cases."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._parsers = {entry.name: entry.parser() for entry in ENTRIES}

    def cases(self, count: int, entries: Sequence[Entry] = ENTRIES) -> Iterator[Case]:
        """So many, of these commands."""
        return (self.case(number, entries) for number in range(count))

    def case(self, number: int, entries: Sequence[Entry] = ENTRIES) -> Case:
        """The case of a number."""
        rng = Draw(f"inputs:{self._seed}:{number}")
        (entry,) = rng.choices(entries, [entry.weight for entry in entries])
        parser = self._parsers[entry.name]
        options = {
            name: action for action in parser._actions for name in action.option_strings[-1:]
        }
        options.pop("--help", None)
        base = list(rng.choice(BASES.get(entry.name, ((),)))) if rng.random() < _BASED else []
        case = Case(number, entry, base)
        for name in rng.sample(
            sorted(options), min(len(options), rng.choice((0, 1, 1, 1, 2, 2, 3)))
        ):
            _give(case, name, options[name], rng)
        if rng.random() < 0.02:
            case.words.append(rng.choice(("--no-such-option", "stray", "--seed", "--", "-x", "")))
        case.nonsense += _out_of_place(case)
        return case


def _give(case: Case, name: str, action: argparse.Action, rng: Draw) -> None:
    """Put an option into a command line, in place of what it has of it."""
    chosen = _values(case.entry.name, name, action, rng)
    words, at = [], 0
    while at < len(case.words):
        word = case.words[at]
        at += 1
        if word.partition("=")[0] != name:
            words.append(word)
            continue
        while "=" not in word and at < len(case.words) and not case.words[at].startswith("--"):
            at += 1  # its values, as words of their own
    case.words = words
    if action.nargs == 0:
        case.words.append(name)
    elif action.nargs in ("+", "*"):
        case.words += [name, *(value.text for value in chosen)]
    else:
        (value,) = chosen[:1]
        whole = value.text and value.text[0] != "-" and rng.random() < _AS_TWO_WORDS
        case.words += [name, value.text] if whole else [f"{name}={value.text}"]
    case.nonsense += [f"{name}={v.text[:40]!a}" for v in chosen if v.never]


def _values(command: str, name: str, action: argparse.Action, rng: Draw) -> list[Value]:
    if action.nargs == 0:
        return []
    count = rng.choice((1, 1, 2)) if action.nargs in ("+", "*") else 1
    pool = _pool(command, name, action)
    nasty = rng.random() < NASTY
    kinds = [v for v in pool if v.never] if nasty else [v for v in pool if not v.never]
    return [rng.choice(kinds or pool) for _ in range(count)]


def _both(fine: Sequence[str], never: Sequence[str] = ()) -> list[Value]:
    return [*(Value(text) for text in fine), *(Value(text, True) for text in never)]


def _pool(command: str, name: str, action: argparse.Action) -> list[Value]:
    """Everything that an option may get."""
    if action.choices is not None and not isinstance(action.type, Whole):
        return _both([str(c) for c in action.choices], ("no-such-choice", "", "\udcff", "1e400"))
    if name in _BY_NAME:
        return _BY_NAME[name](command)
    if isinstance(action.type, Whole | Number) or action.type in (int, float):
        return _numbers(name, action)
    where = str(action.metavar or "")
    if "DIR" in where or "FILE" in where or name in ("--out", "--trace", "--model"):
        return _places(name)
    return _both(values.WORDS)


def _numbers(name: str, action: argparse.Action) -> list[Value]:
    fine, never = list(values.NUMBERS), list(values.NO_NUMBERS)
    (fine if name in values.ZERO_IS_FINE else never).append("0")
    if isinstance(action.type, Whole):
        never += [str(action.type.most + 1), "1.5"]
        fine += [str(action.type.least), str(action.type.most)]
    elif isinstance(action.type, Number):
        fine += [str(action.type.least), str(action.type.most)]
    return _both(fine, never)


def _places(name: str) -> list[Value]:
    never = ["", "{pool}/places/a-file/below", "x" * 300, "/" + "x/" * 3000, "{pool}/places/loop/x"]
    if name in ("--json", "--trace", "--profile"):
        never += ["/proc/nowhere/f.json", "{pool}/places", "{pool}/places/fifo"]
    return _both(
        ["{mine}/new", "{mine}/a/b/c", "new.json", "ünïcode", "\udcff.json", "a\nb"], never
    )


def _weights(command: str) -> list[Value]:
    undecided = list(bring.UNDECIDED)
    if command == "scenarios.prepare":  # which needs no tokenizer
        undecided += [name for name in bring.DAMAGE if "tokenizer" in name]
    never = [f"{{pool}}/weights/{name}" for name in bring.DAMAGE if name not in undecided]
    never += [f"{{pool}}/weights/{name}" for name in ("empty", "a-file.safetensors", "model.gguf")]
    never += [
        "{pool}/weights/nowhere",
        "",
        "nobody/nothing",
        "a/b/c/d",
        "\udcff",
        "x" * 300,
        "http://x",
    ]
    fine = ["{pool}/weights/good", *(f"{{pool}}/weights/{name}" for name in undecided)]
    return _both(fine, never)


def _data(command: str) -> list[Value]:
    never = ["empty.txt", "spaces.txt", "short.txt", "nothing", "nowhere", "fifo.txt"]
    fine = ["good.txt", "utf16.txt", "utf16-bare.txt", "utf32.txt", "latin1.txt", "bom.txt",
            "nulls.txt",
            "random.bin", "surrogates.txt", "one-line.txt", "chat.jsonl", "README", "many",
            "loop"]  # fmt: skip
    here = "{pool}/data/"
    return _both([here + n for n in fine], [*(here + n for n in never), "", "/dev/null", "x" * 300])


def _tls(command: str) -> list[Value]:
    never = ["no-key", "open-key", "garbage", "empty-ca", "other-key", "not-base64", "nothing",
             "nowhere",
             "expired"]  # fmt: skip
    return _both(
        [f"{{pool}}/tls/{n}" for n in ("owner", "worker")],
        [*(f"{{pool}}/tls/{n}" for n in never), "", "{pool}/places/a-file", "x" * 300],
    )


def _model(command: str) -> list[Value]:
    if command != "scenarios.worker":
        return _places("--model")
    damaged = {name: f"{{mine}}/model-{name}" for name in made.MODELS}
    fine = ["{pool}/model", *(damaged.pop(name) for name in made.STILL_A_WORKERS_PART)]
    return _both(
        fine, [*damaged.values(), "", "{pool}/places/a-file", "{pool}/weights/good", "nowhere"]
    )


def _cache(command: str) -> list[Value]:
    uses = command in ("scenarios.llama1b", "scenarios.prepare")
    damaged = [f"{{mine}}/cache-{name}" for name in made.MODELS]
    fine = ["{pool}/cache", "{mine}/new", *damaged]
    return _both(fine, ["{pool}/places/a-file/x", "x" * 300] if uses else [])


def _out(command: str) -> list[Value]:
    found = _places("--out")
    return [*found, *_both([f"{{mine}}/run-{name}" for name in made.RUNS])]


def _devices(command: str) -> list[Value]:
    profiles = [f"{{pool}}/profiles/{name}.json" for name in _BAD_PROFILES]
    fine = ["h100", "l4", "cpu-2core", "{pool}/profiles/good.json"]
    return _both(fine, [*profiles, "b100", "", "nowhere.json", "../h100", "\udcff.json", "h100,l4"])


_BAD_PROFILES = (
    "nan-rate", "infinite-rate", "zero-rate", "negative-rate", "tiny-rate", "text-rate",
    "true-rate",
    "rates-list", "nan-overhead", "long-overhead", "nan-bandwidth", "no-cores", "width-text",
    "width-wide", "origin-text", "assumed-text", "name-number", "unknown-key", "list", "null",
    "cut",
    "empty", "deep", "number", "latin1", "fifo", "folder",
)  # fmt: skip


def _studies(command: str) -> list[Value]:
    bad = [name for name in bring.STUDIES if name not in bring.GOOD_STUDIES]
    fine = [f"{{pool}}/studies/{name}.toml" for name in bring.GOOD_STUDIES]
    never = [
        f"{{pool}}/studies/{name}.toml" for name in (*bad, "binary", "fifo", "folder", "nowhere")
    ]
    return _both(
        ["home-office", *fine], [*never, "", "no-such", "\udcff.toml", "x" * 300 + ".toml"]
    )


def _knob(fine: Sequence[str], never: Sequence[str]) -> Callable[[str], list[Value]]:
    return lambda command: _both(fine, never)


_BY_NAME: Mapping[str, Callable[[str], list[Value]]] = {
    "--weights": _weights, "--data": _data, "--tls": _tls, "--check": _tls,
    "--model": lambda command: (
        _both(["gpt2", "llama-3.2-1b"], ["llama-9", "", "\udcff", "nan"])
        if command == "scenarios.llama1b" else _model(command)
    ),
    "--cache": _cache, "--out": _out, "--gpu": _devices, "--owner-device": _devices,
    "--study": _studies,
    "--figures": _knob(
        ["{pool}/figures.json"],
        ["{pool}/profiles/good.json", "{pool}/profiles/list.json", "{pool}/profiles/deep.json",
         "{pool}/places/fifo", "{pool}/figures-nan.json", "{pool}/figures-words.json", "",
         "nowhere"],
    ),
    "--bandwidth": _knob(values.RATES, values.NO_QUANTITIES),
    "--rtt": _knob(values.TIMES, values.NO_QUANTITIES),
    "--jitter": _knob(values.TIMES, values.NO_QUANTITIES),
    "--loss": _knob(values.SHARES, values.NO_QUANTITIES),
    "--workers": _knob(values.COUNTS, values.NO_COUNTS),
    "--owners": _knob(values.COUNTS, values.NO_COUNTS),
    "--sweep": _knob(values.SWEEPS, values.NO_SWEEPS),
    "--set": _knob(("lanes=2", "gpu=l4", "rtt=5ms"), values.NO_SWEEPS),
    "--only": _knob(("timer-not-cancelled",), ("no-such-defect", "")),
    "--shape": _knob(values.SHAPES, values.NO_SHAPES),
    "--worker": lambda command: (
        _both(values.HOSTS, values.NO_HOSTS) if command == "scenarios.certs"
        else _both(("localhost:1", "127.0.0.1:1"), values.NO_ADDRESSES)
    ),
    "--name": lambda command: (
        _both(values.HOSTS, values.NO_HOSTS) if command == "scenarios.certs"
        else _both(values.WORDS)
    ),
    "--owner": _knob(("ann", "b-2"), ("", "worker", "../ann", "a b", "-x", "x" * 64, "\udcff")),
    "--authority": _out,
    "--listen": _knob(("localhost:0", "127.0.0.1:0"), values.NO_ADDRESSES),
    "--metrics": _knob(("0", "localhost:0"), ("", "nowhere", "a..b:1", "65536", "-1", "٣")),
}  # fmt: skip


def _out_of_place(case: Case) -> list[str]:
    """Options of another mode than the case asks for, by the list of them."""
    given = {word.partition("=")[0] for word in case.words} | set(case.words)
    found = []
    for needed, absent, options in values.FOREIGN.get(case.entry.name, ()):
        if given.issuperset(needed) and given.isdisjoint(absent):
            found += [f"{name} out of place" for name in options if name in given]
    return found
