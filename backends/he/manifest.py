"""The manifest of a prepared model: what it states, and how one of unknown origin is read.

    {"format": 3, "model_digest": ..., "owner_tag": ..., "parameters": {...} or null,
     "seed": ... or null,
     "groups": [{"spec": {...}, "forward_plan": {...}, "backward_plan": {...},
                 "arrays": {"weight": {"dtype": "int8", "shape": [N, K], "sha256": ...},
                            "scale": ..., "channels": ..., "forward": ..., "backward": ...}}, ...],
     "setup_digest": ...}

`setup_digest` is the SHA-256 of all the rest. It holds the manifest and, through the arrays'
digests, every file together; it says nothing about whether hints and plans are *right*. That is
for `verification.py`.

Read from a disk that anyone may have written: bounded, every key and no other, every type and
range. What can be derived (dtypes, shapes, the model's digest, the seed of A) is derived and
compared. All that does not fit is a PreparationError of one line.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from backends.defaults import MAX_INPUTS, OWNER_TAG_BYTES
from backends.errors import UserError
from backends.files import read_bounded, write_json
from backends.he.params import RING_DEGREE, Parameters
from backends.he.plan import MatrixPlan
from backends.he.public import public_seed
from backends.he.ring import tiles_of
from backends.he.vector import LANES
from backends.he.wire import Format

FORMAT = 3
NAME = "manifest.json"
KINDS = {
    "weight": "worker", "scale": "owner", "channels": "owner", "forward": "owner",
    "backward": "owner",
}  # fmt: skip
"""Kinds of array, and whose folder each is in."""
QUANTISED = ("weight", "scale", "channels")
"""Those of them that are there without hints, too."""

_LARGEST_BYTES = 16 << 20  # of a manifest; a model with 64 groups has 0.1 MB
_LONGEST_NAME = 2000  # characters; a group's name has those of its members
_T = TypeVar("_T")


class PreparationError(UserError, RuntimeError):
    """A prepared model cannot be made or used; the text says what to do."""


@dataclass(frozen=True)
class GroupSpec:
    """Linear modules fed the same tensor, so that one ciphertext serves them all.

    members       module names in the order their outputs are concatenated
    out_features  outputs of each member
    precise       whether its products are planned for a small error, as a language-model head's are
    """

    name: str
    members: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    precise: bool = False

    @property
    def total_out(self) -> int:
        """N: outputs of all members together."""
        return sum(self.out_features)


def array_form(spec: GroupSpec, kind: str, rank: int) -> tuple[str, tuple[int, ...]]:
    """(dtype, shape) of one of KINDS."""
    outputs, inputs = spec.total_out, spec.in_features
    if kind == "weight":
        return "int8", (outputs, inputs)
    if kind == "scale":
        return "float32", (outputs,)
    if kind == "channels":
        return "float32", (inputs,)
    rows = outputs if kind == "forward" else inputs
    return "int32", (tiles_of(rows), rank, RING_DEGREE, LANES)


@dataclass(frozen=True)
class GroupEntry:
    """What is stored of one group.

    sha256  hex digest of each array's elements, by kind
    """

    spec: GroupSpec
    forward_plan: MatrixPlan
    backward_plan: MatrixPlan
    sha256: dict[str, str]

    def record(self, rank: int) -> dict[str, Any]:
        """As JSON holds it."""
        arrays = {}
        for kind, digest in self.sha256.items():
            dtype, shape = array_form(self.spec, kind, rank)
            arrays[kind] = {"dtype": dtype, "shape": list(shape), "sha256": digest}
        return {
            "spec": json.loads(json.dumps(asdict(self.spec))),
            "forward_plan": asdict(self.forward_plan),
            "backward_plan": asdict(self.backward_plan),
            "arrays": arrays,
        }


@dataclass(frozen=True)
class Wanted:
    """What somebody asks a prepared model to be."""

    groups: tuple[GroupSpec, ...]
    parameters: Parameters | None
    owner_tag: bytes = b""


@dataclass(frozen=True)
class Manifest:
    """All that is stated of a prepared model."""

    parameters: Parameters | None
    owner_tag: bytes
    groups: tuple[GroupEntry, ...]

    @property
    def formats(self) -> list[Format]:
        """How the values of every matrix travel, forward and backward of each group."""
        return [
            plan.format for entry in self.groups
            for plan in (entry.forward_plan, entry.backward_plan)
        ]  # fmt: skip

    @property
    def rank(self) -> int:
        """Module rank of the hints, 0 where there are none."""
        return self.parameters.rank if self.parameters else 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those of KINDS that each group has."""
        return tuple(KINDS) if self.parameters else QUANTISED

    @property
    def model_digest(self) -> bytes:
        """32 bytes that name the quantised weights."""
        return digest_of_groups(self.groups)

    @property
    def seed(self) -> bytes | None:
        """The seed of A; None without hints. Derived: the owner takes nobody's word for A."""
        if self.parameters is None:
            return None
        return public_seed(self.model_digest, self.parameters, self.owner_tag)

    def record(self) -> dict[str, Any]:
        """As JSON holds it, but for `setup_digest`."""
        return {
            "format": FORMAT,
            "model_digest": self.model_digest.hex(),
            "owner_tag": self.owner_tag.hex(),
            "parameters": asdict(self.parameters) if self.parameters else None,
            "seed": self.seed.hex() if self.seed else None,
            "groups": [entry.record(self.rank) for entry in self.groups],
        }

    @property
    def setup_digest(self) -> bytes:
        """32 bytes that name everything: the manifest and the contents of all files."""
        return record_digest(self.record())

    def write(self, directory: Path) -> None:
        """Write it; a prepared model is finished when it has one."""
        record = self.record()
        write_json(directory / NAME, record | {"setup_digest": record_digest(record).hex()})

    def differences(self, wanted: Wanted) -> list[str]:
        """What is other than wanted, a phrase each."""
        found = []
        if self.parameters != wanted.parameters:
            found.append(_parameter_difference(self.parameters, wanted.parameters))
        if self.owner_tag != wanted.owner_tag:
            found.append(f"{_tag_name(self.owner_tag)}, not {_tag_name(wanted.owner_tag)}")
        specs = tuple(entry.spec for entry in self.groups)
        if specs != wanted.groups:
            pairs = zip(specs, wanted.groups, strict=False)
            other = next((_spec_difference(a, b) for a, b in pairs if a != b), "")
            found.append(other or f"{len(specs)} groups of modules, not {len(wanted.groups)}")
        return found


def _shown(value: Any) -> str:
    """For a message: whoever wrote a manifest chose how long what it holds is."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _tag_name(tag: bytes) -> str:
    return f"owner tag {_shown(tag.decode(errors='backslashreplace'))}" if tag else "no owner tag"


def _spec_difference(found: GroupSpec, wanted: GroupSpec) -> str:
    """The group, and the first of its facts that differs."""
    if found.name != wanted.name:
        return f"group {_shown(found.name)} where {_shown(wanted.name)} is wanted"
    name = next(f.name for f in fields(found) if getattr(found, f.name) != getattr(wanted, f.name))
    values = [getattr(spec, name) for spec in (found, wanted)]
    if isinstance(values[0], tuple):
        if len(values[0]) != len(values[1]):
            values, name = [len(value) for value in values], f"number of {name}"
        else:
            values = next([a, b] for a, b in zip(*values, strict=True) if a != b)
    return (
        f"group {_shown(wanted.name)} with {name.replace('_', ' ')} {_shown(values[0])}, "
        f"not {_shown(values[1])}"
    )


def _parameter_difference(found: Parameters | None, wanted: Parameters | None) -> str:
    if found is None or wanted is None:
        names = [f"parameters {_shown(p.name)}" if p else "no hints" for p in (found, wanted)]
    else:
        pairs = (asdict(found), asdict(wanted))
        others = [key for key in pairs[0] if pairs[0][key] != pairs[1][key]]
        names = [", ".join(f"{key} {_shown(pair[key])}" for key in others) for pair in pairs]
    return f"{names[0]}, not {names[1]}"


def digest_of_groups(entries: Sequence[GroupEntry]) -> bytes:
    """32 bytes that name the quantised weights."""
    facts = [[asdict(e.spec), *(e.sha256[kind] for kind in QUANTISED)] for e in entries]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def record_digest(record: dict[str, Any]) -> bytes:
    """SHA-256 of JSON in one canonical spelling."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).digest()


class _UnfitError(ValueError):
    """A value in a file is not what may be there."""


@dataclass(frozen=True)
class _Value:
    """A JSON value that nobody vouches for, and where it stands, for messages."""

    value: Any
    where: str

    def fail(self, wanted: str) -> NoReturn:
        raise _UnfitError(f"{self.where or 'it'} is {_shown(self.value)}, not {wanted}")

    def parts(self, names: Sequence[str]) -> list[_Value]:
        """The values of an object that has exactly these keys, in the order of `names`."""
        if type(self.value) is not dict or set(self.value) != set(names):
            self.fail(f"an object of {', '.join(names)}")
        dot = f"{self.where}." if self.where else ""
        return [_Value(self.value[name], f"{dot}{name}") for name in names]

    def items(self) -> list[_Value]:
        """Those of a list of one or more."""
        if type(self.value) is not list or not self.value:
            self.fail("a list of one or more")
        return [_Value(item, f"{self.where}[{i}]") for i, item in enumerate(self.value)]

    def whole(self, least: int, most: int) -> int:
        if type(self.value) is not int or not least <= self.value <= most:
            self.fail(f"a whole number from {least} to {most}")
        return self.value

    def real(self, least: float, most: float) -> float:
        number = self.value
        if type(number) is not float or not math.isfinite(number) or not least <= number <= most:
            self.fail(f"a number with a point from {least:g} to {most:g}")
        return number

    def truth(self) -> bool:
        if type(self.value) is not bool:
            self.fail("true or false")
        return bool(self.value)

    def text(self) -> str:
        text = self.value
        if type(text) is not str or not 1 <= len(text) <= _LONGEST_NAME or not text.isprintable():
            self.fail(f"a printable text of 1 to {_LONGEST_NAME} characters")
        return text

    def hex(self, least: int, most: int) -> str:
        """Lower-case hexadecimal of so many bytes."""
        text = self.value
        if type(text) is not str or not re.fullmatch(r"([0-9a-f]{2})*", text):
            self.fail("lower-case hexadecimal")
        if not least <= len(text) // 2 <= most:
            self.fail(f"hexadecimal of {least} to {most} bytes")
        return text

    def equal(self, wanted: Any) -> None:
        """Raise unless it is that, of the same types."""
        if json.dumps(self.value) != json.dumps(wanted):
            self.fail(f"{wanted!r}")

    def made(self, kind: type[_T]) -> _T:
        """An instance of a dataclass of texts, whole numbers from 0 and real ones."""
        names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        values: dict[str, Any] = {}
        for field, part in zip(fields(kind), self.parts(names), strict=True):  # type: ignore[arg-type]
            if field.type == "str":
                values[field.name] = part.text()
            elif field.type == "bool":
                values[field.name] = part.truth()
            elif field.type == "int":
                values[field.name] = part.whole(0, 1 << 62)
            else:
                values[field.name] = part.real(0.0, 1e300)
        try:
            return kind(**values)
        except ValueError as error:
            raise _UnfitError(f"{self.where}: {error}") from error


def _read_spec(value: _Value) -> GroupSpec:
    names = [f.name for f in fields(GroupSpec)]
    name, members, in_features, out_features, precise = value.parts(names)
    spec = GroupSpec(
        name.text(),
        tuple(item.text() for item in members.items()),
        in_features.whole(1, MAX_INPUTS),
        tuple(item.whole(1, MAX_INPUTS) for item in out_features.items()),
        precise.truth(),
    )
    if len(set(spec.members)) != len(spec.members):
        members.fail("names of different modules")
    if len(spec.members) != len(spec.out_features) or spec.total_out > MAX_INPUTS:
        out_features.fail(f"outputs of {len(spec.members)} members, {MAX_INPUTS} together")
    return spec


def _read_plan(value: _Value, inputs: int) -> MatrixPlan:
    plan = value.made(MatrixPlan)
    if plan.in_features != inputs:
        value.fail(f"a plan for {inputs} inputs")
    largest = 127 * math.sqrt(inputs) * (1 + 1e-9), 127.0 * inputs
    if not 1 <= plan.max_norm <= largest[0] or plan.max_l1 > largest[1] or plan.noise_gain <= 0:
        value.fail("a plan for int8 weights")
    try:
        Format(plan.up_bits, plan.down_bits)
    except ValueError as error:
        value.fail(f"a plan: {error}")
    return plan


def _read_entry(value: _Value, rank: int, kinds: Sequence[str]) -> GroupEntry:
    names = ("spec", "forward_plan", "backward_plan", "arrays")
    spec_value, forward, backward, arrays = value.parts(names)
    spec = _read_spec(spec_value)
    digests = {}
    for kind, array in zip(kinds, arrays.parts(kinds), strict=True):
        dtype, shape, sha256 = array.parts(("dtype", "shape", "sha256"))
        expected = array_form(spec, kind, rank)
        dtype.equal(expected[0])
        shape.equal(list(expected[1]))
        digests[kind] = sha256.hex(32, 32)
    return GroupEntry(
        spec, _read_plan(forward, spec.in_features), _read_plan(backward, spec.total_out), digests
    )


def _read_manifest(value: _Value) -> Manifest:
    if type(value.value) is dict and value.value.get("format", FORMAT) != FORMAT:
        _Value(value.value["format"], "format").fail(f"the format {FORMAT} of this version")
    names = ("format", "model_digest", "owner_tag", "parameters", "seed", "groups", "setup_digest")
    form, model_digest, owner_tag, parameters, seed, groups, setup_digest = value.parts(names)
    form.equal(FORMAT)
    found = None if parameters.value is None else parameters.made(Parameters)
    tag = bytes.fromhex(owner_tag.hex(0, OWNER_TAG_BYTES))
    rank, kinds = (found.rank, tuple(KINDS)) if found else (0, QUANTISED)
    entries = tuple(_read_entry(item, rank, kinds) for item in groups.items())
    if len({entry.spec.name for entry in entries}) != len(entries):
        raise _UnfitError("groups: two have one name")
    manifest = Manifest(found, tag, entries)
    model_digest.equal(manifest.model_digest.hex())
    seed.equal(manifest.seed.hex() if manifest.seed else None)
    setup_digest.equal(manifest.setup_digest.hex())
    return manifest


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _UnfitError("a key stands twice in one object")
    return found


def _refuse(word: str) -> NoReturn:
    raise _UnfitError(f"{word} is no number")


def _load(path: Path) -> _Value:
    """Raises OSError, ValueError or RecursionError when a file holds no JSON."""
    text = read_bounded(path, _LARGEST_BYTES)
    return _Value(json.loads(text, object_pairs_hook=_once, parse_constant=_refuse), "")


def is_finished(directory: Path) -> bool:
    """Whether a finished prepared model lies there, whatever it is worth.

    Raises PreparationError when that cannot be known.
    """
    try:
        (directory / NAME).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise PreparationError(
            f"{directory} cannot be looked into ({error.strerror or error}); mend that, or choose "
            "another place with --cache"
        ) from error
    return True


def anew(directory: Path) -> str:
    """What to do about a prepared model that is no good."""
    return f"delete {directory} and prepare anew"


def read_manifest(directory: Path, absent: str = "", mend: str = "") -> Manifest:
    """The manifest of a directory that anyone may have written.

    absent  what to do where there is none (prepare again)
    mend    what to do about one that is no good (`anew`)

    Raises PreparationError when there is none, or when it is not what `Manifest.write` makes.
    """
    path, mend = directory / NAME, mend or anew(directory)
    try:
        return _read_manifest(_load(path))
    except FileNotFoundError as error:
        raise PreparationError(
            f"{directory} holds no finished preparation; {absent or 'run it again'}"
        ) from error
    except OSError as error:
        raise PreparationError(
            f"{path} cannot be read: {error.strerror or error}; mend that, or {mend}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise PreparationError(
            f"{path} is no manifest of a prepared model: {error}; {mend}"
        ) from error


def group_record(entry: GroupEntry, parameters: Parameters | None) -> dict[str, Any]:
    """What `read_group_record` reads."""
    return {"parameters": _digest_text(parameters), "entry": entry.record(0)}


def _digest_text(parameters: Parameters | None) -> str:
    return parameters.digest().hex() if parameters else ""


def read_group_record(path: Path, parameters: Parameters | None) -> GroupEntry | None:
    """The entry, without hints, of a group that a former run finished; None for any other file.

    A run with other parameters quantises and plans otherwise: its files are others too.
    """
    try:
        stated, entry = _load(path).parts(("parameters", "entry"))
        stated.equal(_digest_text(parameters))
        return _read_entry(entry, 0, QUANTISED)
    except (OSError, ValueError, RecursionError):
        return None


def read_hint_record(path: Path) -> tuple[str, str] | None:
    """(seed, SHA-256) of a hint that a former run finished; None for any other file."""
    try:
        seed, sha256 = _load(path).parts(("seed", "sha256"))
        return seed.hex(32, 32), sha256.hex(32, 32)
    except (OSError, ValueError, RecursionError):
        return None
