"""What a script of one's own needs: prepare a model, make it remote, connect it, train it.

    public = prepare(model)
    model = get_peft_model(remote(model, public), LoraConfig(...))
    with connect(model, workers=["gpu.example:7443"], tls="certs/owner") as session:
        transformers.Trainer(model, ...).train()        # or session.trainer(...).train()

Nothing is printed. Errors that a user can mend derive from `backends.errors.UserError`. All of it
is imported from `private_lora`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from backends.errors import UserError
from backends.he.manifest import GroupSpec, is_finished
from backends.he.params import Parameters
from backends.he.params import preset as named_preset
from backends.he.preparation import Arithmetic, work_units
from backends.he.preparation import prepare as prepare_files
from backends.he.store import PreparedModel
from backends.he.verdict import owner_verdicts
from backends.he.verification import Progress, Trust
from backends.ledger import WorkerLedger
from backends.nn.base import open_base
from backends.nn.corpus import Sequences
from backends.nn.kept import Kept
from backends.nn.recompute import recompute_in_evaluation
from backends.nn.remote import Remote, RemoteLinear
from backends.nn.selfcheck import require_faithful
from backends.nn.skeleton import LEAST_REMOTE, Skeleton, build_skeleton
from backends.nn.sources import Base, HeldBase
from backends.nn.trainer import TrainConfig, Trainer
from backends.places import PlaceError
from backends.session import Session, Usage, Workers, opened


class DoorError(UserError, ValueError):
    """A model, a preparation and a session do not belong together; the text says what to do."""


@dataclass(frozen=True)
class Public:
    """What is public of a model: int8 weights for workers, hints and plans for owners.

    directory    where it lies; workers need manifest.json and worker/ of it
    remote_head  whether workers compute the language-model head, too
    """

    prepared: PreparedModel
    identity: str
    remote_head: bool

    @property
    def directory(self) -> Path:
        """Of the prepared model."""
        return self.prepared.directory


def cache_directory() -> Path:
    """Where prepared models are kept: $XDG_CACHE_HOME/private-lora, or ~/.cache/private-lora.

    Raises PlaceError for a user without a home.
    """
    try:
        place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise PlaceError(
            "this user has no home directory to keep prepared models in; name another place, or "
            "set XDG_CACHE_HOME"
        ) from error
    return place / "private-lora"


def place_of(
    base: Base, groups: Sequence[GroupSpec], parameters: Parameters, cache: Path, owner_tag: bytes
) -> Path:
    """The directory of a prepared model in a cache: one a model, parameter set and tag."""
    facts = [base.identity(), asdict(parameters), [asdict(g) for g in groups], owner_tag.hex()]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return cache / f"{base.config.model_type}-{parameters.name}-{key}"


def prepared_at(
    directory: Path,
    skeleton: Skeleton,
    parameters: Parameters,
    owner_tag: bytes = b"",
    progress: Progress = lambda label, done: None,
    arithmetic: Arithmetic | None = None,
    trust: Trust | None = None,
) -> PreparedModel:
    """The prepared model in a directory; made there when it is not finished.

    A model is tried (`require_faithful`) before it is prepared. Raises PreparationError,
    CheckpointError.
    """
    if not is_finished(directory):
        require_faithful(skeleton)
    return prepare_files(
        directory, skeleton.groups, skeleton.load_weight, parameters, progress, owner_tag,
        arithmetic, trust or Trust(owner_verdicts()),
    )  # fmt: skip


def prepare(
    model: PreTrainedModel | str | Path,
    preset: str = "thin",
    cache: str | Path | None = None,
    remote_head: bool = False,
    owner_tag: bytes = b"",
    least_remote: float = LEAST_REMOTE,
    progress: Callable[[str, float], None] = lambda label, share: None,
) -> Public:
    """Prepare a model once; afterwards it is found in the cache. Interrupting is safe.

    model         in memory, which it is afterwards as it was before; or a checkpoint's directory,
                  a GGUF file or a hub id, which is then never in memory whole
    least_remote  the least share of its frozen weights that workers must compute
    progress      is told what is in work, and which share of all is done, 0 to 1

    Raises CheckpointError for a model that does not work here, PreparationError when the files
    cannot be made.
    """
    base = _base(model)
    parameters = named_preset(preset)
    try:
        skeleton = build_skeleton(base, remote_head, _dtype(base), least_remote=least_remote)
        place = Path(cache) if cache else cache_directory()
        directory = place_of(base, skeleton.groups, parameters, place, owner_tag)
        total, so_far = work_units(skeleton.groups, parameters), 0

        def advance(label: str, done: int) -> None:
            nonlocal so_far
            so_far += done
            progress(label, so_far / total)

        made = prepared_at(directory, skeleton, parameters, owner_tag, advance)
    finally:
        if isinstance(base, HeldBase):
            base.give_back()
    return Public(made, base.identity(), remote_head)


def _base(model: PreTrainedModel | str | Path) -> Base:
    return open_base(model) if isinstance(model, str | Path) else HeldBase(model)


def _dtype(base: Base) -> torch.dtype:
    """A model in memory keeps its type; others are fp32, which is fastest on a CPU."""
    return base.dtype if isinstance(base, HeldBase) else torch.float32


_KNOWN: WeakKeyDictionary[Remote, tuple[Skeleton, Public]] = WeakKeyDictionary()


def remote(model: PreTrainedModel | str | Path, public: Public) -> PreTrainedModel:
    """The model with its frozen linears remote: in place, or loaded without them from files.

    Their weights are given up; everything else stays here and frozen. Add adapters afterwards.

    Raises DoorError when `public` was prepared for another model.
    """
    base = _base(model)
    if base.identity() != public.identity:
        raise DoorError(
            f"{public.directory} was prepared for other weights than those of {base.describe()}; "
            "prepare this model"
        )
    skeleton = build_skeleton(
        base, public.remote_head, _dtype(base), least_remote=0.0,
        tables=public.directory.parent / "tables",
    )  # fmt: skip
    if skeleton.groups != public.prepared.groups:
        raise DoorError(f"{public.directory} was prepared by another version; prepare again")
    skeleton.read = _gone
    recompute_in_evaluation(skeleton.model)
    if isinstance(base, HeldBase):
        base.give_up()
    _KNOWN[skeleton.remote] = skeleton, public
    return skeleton.model


def _gone(module: str) -> torch.Tensor:
    raise DoorError(f"the weights of {module} are with the workers")


_TAINTED = "what was computed: do not use it; start over without that worker"


class OpenSession:
    """A model connected to workers.

    caught  what was found of workers that gave wrong answers, by their identity
    """

    def __init__(
        self, session: Session, model: nn.Module, skeleton: Skeleton, lanes: int,
        ledger: WorkerLedger,
    ) -> None:  # fmt: skip
        self._session, self._model, self._skeleton = session, model, skeleton
        self._lanes, self._ledger = lanes, ledger

    @property
    def caught(self) -> dict[str, str]:
        """Workers that will not be asked again."""
        return self._ledger.retired

    @property
    def served(self) -> frozenset[str]:
        """Workers of whom an answer was used."""
        return self._ledger.served

    @property
    def kept(self) -> Kept | None:
        """Counts of activations that are kept; None without `keep_activations`."""
        return self._session.kept

    def usage(self) -> Usage:
        """Seconds, bytes and blocks so far."""
        return self._session.usage()

    def trainer(
        self, sequences: Sequences, config: TrainConfig, checkpoints: Path | None = None,
        **more: Any,
    ) -> Trainer:  # fmt: skip
        """A trainer with this session's lanes, which goes back to a checkpoint when a worker is
        caught. More: as `Trainer` takes it.

        sequences  int64[n, S] token ids
        """
        return Trainer(
            self._model, sequences, config, lanes=self._lanes,
            forget_lane=self._skeleton.remote.forget_lane, checkpoints=checkpoints,
            ledger=self._ledger, **more,
        )  # fmt: skip

    def require_untainted(self) -> None:
        """Raise TaintedError when a worker was caught whose answers were used before."""
        self._ledger.require_untainted(_TAINTED)


@contextmanager
def connect(
    model: nn.Module,
    workers: Sequence[str] = (),
    tls: str | Path | None = None,
    lanes: int = 1,
    ledger: str | Path | None = None,
    keep_activations: int = 0,
) -> Iterator[OpenSession]:
    """Within the `with`, the remote linears of a model compute, encrypted, by these workers.

    model    as `remote` gave it, with adapters of `peft` on it or not
    workers  "host:port" each; without any, one in this process
    tls      directory of this side's certificates; without it workers on this machine only
    lanes    threads that may use the model at once
    ledger   file of workers that were caught, kept from run to run
    keep_activations  bytes of memory for what the layers below the lowest adapter make of every
             sequence: seen again, it is not sent again. Workers then see how many there are

    Raises DoorError for another model; CannotKeepError where nothing can be kept; what reaching
    workers raises; and at the end, or in the place of RemoteLinearError when no worker is left,
    TaintedError when what was computed rests on a worker that was caught.
    """
    skeleton, public = _of(model)
    _require_no_dropout(model)
    there = Workers.at(workers, None if tls is None else Path(tls))
    known = WorkerLedger(None if ledger is None else Path(ledger))
    with (
        known.untainted(_TAINTED),
        opened(
            skeleton, public.prepared, lanes, ledger=known,
            workers=there, keep_bytes=keep_activations,
        ) as session,
    ):  # fmt: skip
        try:
            yield OpenSession(session, model, skeleton, lanes, known)
        finally:
            skeleton.remote.forget_lane()


def _of(model: nn.Module) -> tuple[Skeleton, Public]:
    for module in model.modules():
        if isinstance(module, RemoteLinear) and module.remote in _KNOWN:
            return _KNOWN[module.remote]
    raise DoorError("the model has no remote linears; make it remote first, and add adapters then")


def _require_no_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if "lora_dropout" in name and isinstance(module, nn.Dropout) and module.p > 0:
            raise DoorError(
                f"{name} has LoRA dropout {module.p:g}, which is off where the base stays in "
                "evaluation mode; leave lora_dropout at 0"
            )
