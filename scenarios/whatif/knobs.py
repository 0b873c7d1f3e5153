"""The knobs of a what-if world, and what they can be.

`KEYS` is the list of them, for the command line, study files, tables and pictures alike. Nothing
here takes long to load: what is typed wrong is said at once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from backends.options import shown as shorter
from backends.places import named
from scenarios.options import HEAD_CHOICES
from scenarios.whatif import quantities
from scenarios.whatif.quantities import Form, Value
from sim.device import DeviceProfile, builtin_names
from sim.models import MODELS

ASSUMED_BPS, ASSUMED_RTT_S, ASSUMED_GPU = 1e9, 0.020, "h200"
"""A line and a GPU where nothing else is said."""
CHOICES = {
    "worker": ("elsewhere", "here"),
    "placement": ("spread", "by-layer", "one"),
    "connection": ("stream", "parallel"),
    "head": HEAD_CHOICES,
}
OF_ELSEWHERE = (
    "owners", "workers", "sites", "placement", "gpu", "bandwidth", "site-bandwidth", "rtt",
    "far-rtt", "jitter", "loss", "connection",
)  # fmt: skip
"""Knobs that mean nothing where no worker is elsewhere."""
PASSES_MOST = 1_000_000
"""Micro-batches of a world: some hours to simulate."""
WORKERS_MOST = 10_000


class SettingError(ValueError):
    """A knob is unknown or set to what it cannot be; the text names it and the choices."""


@dataclass(frozen=True)
class Setting:
    """Every knob of a what-if world.

    tokens, sequence    tokens of one lane's micro-batch, and of one sequence in it at most
    lanes               micro-batches of a step, all in flight
    bandwidth_bps       of each owner's own line, each direction
    rtt_s               round trip from an owner to the workers' site
    far_rtt_s           the same to the second site, where there are two
    site_bps            of each site's line, shared by all its workers
    jitter_s, loss      of each owner's own line
    worker              elsewhere: behind the line; here: in the owner's process, on its device (so
                        that `gpu` is that), as a real run without --worker
    placement           spread: every worker holds all layers; by-layer: each holds as many layers,
                        one after the other; one: only the first worker is used
    connection          stream: an owner's requests to a worker follow each other on the line;
                        parallel: they share it
    head                who multiplies by the language model's head; auto: both are simulated, and
                        the better one counts
    """

    model: str = "llama-3.2-1b"
    tokens: int = 256
    sequence: int = 256
    lanes: int = 4
    owners: int = 1
    workers: int = 1
    sites: int = 1
    worker: str = "elsewhere"
    placement: str = "spread"
    gpu: str = ASSUMED_GPU
    owner_device: str = "cpu-2core"
    bandwidth_bps: float = ASSUMED_BPS
    site_bps: float = 100e9
    rtt_s: float = ASSUMED_RTT_S
    far_rtt_s: float = 0.060
    jitter_s: float = 0.0
    loss: float = 0.0
    connection: str = "stream"
    head: str = "local"
    steps: int = 2

    def __post_init__(self) -> None:
        for knob, choices in CHOICES.items():
            if getattr(self, knob) not in choices:
                raise SettingError(
                    f"{knob}={getattr(self, knob)!r}: it is one of {', '.join(choices)}"
                )
        if self.worker == "here":
            if (self.owners, self.workers) != (1, 1):
                raise SettingError(
                    f"owners={self.owners}, workers={self.workers}: with worker=here there is one "
                    "of each, in one process"
                )
            object.__setattr__(self, "gpu", self.owner_device)
        passes = self.owners * self.lanes * self.steps
        if passes > PASSES_MOST:
            raise SettingError(
                f"owners={self.owners}, lanes={self.lanes}, steps={self.steps} are {passes} "
                f"micro-batches to simulate; at most {PASSES_MOST}"
            )
        if self.workers > WORKERS_MOST:
            raise SettingError(f"workers={self.workers}: at most {WORKERS_MOST}")
        if self.sites not in (1, 2):
            raise SettingError(f"sites={self.sites}: there are 1 or 2")
        if self.sites > self.workers:
            raise SettingError(f"sites={self.sites} needs as many workers; workers={self.workers}")
        if self.tokens % self.sequence and self.tokens > self.sequence:
            raise SettingError(f"tokens={self.tokens} is no multiple of sequence={self.sequence}")

    @property
    def label(self) -> str:
        """The model and what carries it, for a person."""
        if self.worker == "here":
            return f"{model_name(self.model)} on {device_name(self.gpu)}, owner and worker"
        gpus = f"{self.workers} x {device_name(self.gpu)}" if self.workers > 1 else (
            device_name(self.gpu)
        )  # fmt: skip
        return f"{model_name(self.model)} on {gpus}"


def model_name(choice: str) -> str:
    """A model's name, or the last one of its directory's path."""
    return choice if choice in MODELS else named(choice).resolve().name


def device_name(choice: str) -> str:
    """A profile's name as a person writes it: H200, RTX 4090, cpu-2core."""
    name = Path(choice).stem if choice.endswith(".json") else choice
    return name if name.startswith("cpu") else name.upper().replace("RTX", "RTX ")


@dataclass(frozen=True)
class Key:
    """A knob: the field of `Setting` it sets, how its values are written, what it is."""

    field: str
    form: Form
    meaning: str


_COUNT = Form(quantities.count, whole=True)
_RATE = Form(quantities.bandwidth_bps, quantities.show_bandwidth)  # type: ignore[arg-type]
_TIME = Form(quantities.duration_s, quantities.show_duration)  # type: ignore[arg-type]
_PART = Form(quantities.fraction, quantities.show_fraction)  # type: ignore[arg-type]
_WORD = Form(str, numeric=False)
_DEVICE = Form(str, lambda choice: device_name(str(choice)), numeric=False)

_DEVICES = f"{', '.join(builtin_names())}, or a JSON file"

KEYS: dict[str, Key] = {
    "model": Key(
        "model", _WORD, f"what is trained: {', '.join(MODELS)}, or a directory with a config.json"
    ),
    "tokens": Key("tokens", _COUNT, "tokens of one lane's micro-batch"),
    "sequence": Key("sequence", _COUNT, "tokens of a sequence"),
    "lanes": Key("lanes", _COUNT, "micro-batches of a step, all in flight"),
    "owners": Key("owners", _COUNT, "owners that fine-tune at the same time"),
    "workers": Key("workers", _COUNT, "GPUs"),
    "sites": Key("sites", _COUNT, "places the GPUs are in, 1 or 2"),
    "worker": Key(
        "worker",
        _WORD,
        "elsewhere, or here: in the owner's process, on its device, as a run without --worker",
    ),
    "placement": Key("placement", _WORD, f"of layers on GPUs: {', '.join(CHOICES['placement'])}"),
    "gpu": Key("gpu", _DEVICE, f"device profile of a worker: {_DEVICES}"),
    "owner-device": Key("owner_device", _DEVICE, f"device profile of an owner: {_DEVICES}"),
    "bandwidth": Key(
        "bandwidth_bps", _RATE, "of each owner's line, both ways: 100Mb/s (kb/s, Mb/s, Gb/s, Tb/s)"
    ),
    "site-bandwidth": Key("site_bps", _RATE, "of each site's line: 100Gb/s"),
    "rtt": Key("rtt_s", _TIME, "round trip from an owner to the GPUs: 20ms (us, ms, s)"),
    "far-rtt": Key("far_rtt_s", _TIME, "round trip to the second site: 60ms"),
    "jitter": Key("jitter_s", _TIME, "mean extra delay of a frame: 5ms"),
    "loss": Key("loss", _PART, "packets lost on an owner's line: 0.001 or 0.1%"),
    "connection": Key("connection", _WORD, "requests on the line: stream or parallel"),
    "head": Key("head", _WORD, "local, remote or auto"),
    "steps": Key("steps", _COUNT, "steps that count"),
}
BY_FIELD = {key.field: name for name, key in KEYS.items()}
assert set(BY_FIELD) == {f.name for f in fields(Setting)}


def key_called(name: str) -> Key:
    """The knob of that name. Raises SettingError."""
    try:
        return KEYS[name]
    except KeyError:
        raise SettingError(f"no knob {name!r}; there are {', '.join(KEYS)}") from None


def values_of(name: str, text: str) -> list[Value]:
    """The values a text gives a knob. Raises SettingError, naming knob, value and choices."""
    key = key_called(name)
    try:
        values = key.form.values(text)
    except ValueError as error:
        raise SettingError(f"{name}: {error}") from None
    if name == "model":
        for value in values:
            _require_model(str(value))
    return values


def _require_model(text: str) -> None:
    """Raises SettingError for what is neither a model known by name nor a config's directory."""
    try:
        known = text in MODELS or (named(text) / "config.json").is_file()
    except (OSError, ValueError):  # no path at all, or one that is not to be looked at
        known = False
    if not known:
        raise SettingError(
            f"model={shorter(text)}: it is one of {', '.join(MODELS)}, or a directory with a "
            "config.json"
        )


def changed(setting: Setting, changes: Mapping[str, Value]) -> Setting:
    """The setting with some knobs, by name, turned."""
    return replace(setting, **{key_called(name).field: value for name, value in changes.items()})  # type: ignore[arg-type]


def require_elsewhere(names: Iterable[str]) -> None:
    """Raise SettingError for a knob that would change nothing where the worker is here."""
    for name in names:
        if name in OF_ELSEWHERE:
            raise SettingError(
                f"{name} is of a worker elsewhere, and it is in the owner's process: leave {name} "
                "out"
            )


def shown(name: str, value: Value) -> str:
    """A knob's value as a person writes it."""
    return KEYS[name].form.show(value)


@functools.cache
def profile_of(choice: str) -> DeviceProfile:
    """A built-in profile, or the one in a JSON file. Raises ProfileError."""
    if choice.endswith(".json"):
        return DeviceProfile.load(Path(choice))
    return DeviceProfile.builtin(choice)


def provenance(choice: str) -> str:
    """How a device's figures are known, for small print; `Origin` says it figure by figure."""
    measured = profile_of(choice).origin.kind == "measured"
    return "measured" if measured else "data sheet and assumptions"


# --- what is paid


@dataclass(frozen=True)
class Prices:
    """What is paid, in US dollars.

    gpu_hour    rent of one GPU, whether it is busy or not; None takes the table below
    gb_out      every 10^9 bytes that leave the GPUs' site (what arrives is free at most clouds)
    mbps_month  an owner's line, per Mb/s and month of 730 hours
    """

    gpu_hour: float | None = None
    gb_out: float = 0.05
    mbps_month: float = 0.10

    def rent(self, setting: Setting) -> float:
        """Of all workers, $/h; an owner's own machine costs none. Raises SettingError."""
        return setting.workers * self.of_gpu(setting.gpu) if setting.worker == "elsewhere" else 0.0

    def of_gpu(self, gpu: str) -> float:
        """Rent of one such GPU, $/h. Raises SettingError when none is known."""
        if self.gpu_hour is not None:
            return self.gpu_hour
        try:
            return GPU_HOUR[gpu]
        except KeyError:
            raise SettingError(
                f"no price is known for gpu={gpu!r}: give --price-gpu-hour"
            ) from None


PRICE_MOST = 1e6

GPU_HOUR = {"h200": 3.5, "h100": 2.5, "a100": 1.8, "l4": 0.7, "rtx4090": 0.4}
"""Typical rents in $/h; assumptions, not quotes."""
