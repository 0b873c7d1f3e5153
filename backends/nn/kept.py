"""Activations below the lowest adapter, kept: they never change, so they are asked for once.

With adapters in the upper layers only, what the lower ones make of a sequence is the same in every
epoch. Within `kept_activations` the hidden states that enter the lowest adapted layer are kept, in
this process's memory, a sequence at a time; a batch of sequences that were all seen before starts
there, and none of its lower products is sent again. Its noise is then that of the first time.

Owner code only. Workers see which products they are asked for, and so when a batch was new to the
owner: that tells them how many sequences there are. So nothing is kept unless somebody asks for it.
"""

from __future__ import annotations

import hashlib
import inspect
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from backends.errors import UserError
from backends.he.manifest import GroupSpec
from backends.nn.remote import Remote, RemoteLinear
from backends.nn.selfcheck import low_rank
from backends.nn.sources import probe_tokens

_PLAIN = (bool, int, float, str)
_APART = ("labels", "num_items_in_batch", "return_dict", "use_cache")
"""What a decoder is called with that is nothing to its layers."""
_MORE = ("output_hidden_states", "output_attentions")
"""What asks for more than the last layer's output."""
_SCALES = (0.3, 0.03, 0.003)  # of products that a model is tried with, until it stays finite


class CannotKeepError(UserError, ValueError):
    """A model's lower activations cannot be kept; the text says why."""


@dataclass
class Kept:
    """Counts.

    sequences  kept, and the bytes that they take
    passes     that started at the lowest adapter
    """

    sequences: int = 0
    bytes: int = 0
    passes: int = 0


@dataclass
class _Pass:
    """One call of the decoder: its sequences' keys, and their activations where all are known."""

    keys: list[bytes]
    caught: int
    known: torch.Tensor | None


class _Store:
    """Hidden states [S, H] of sequences, by a keyed hash of what the model was called with.

    caught  how many workers were caught so far: when it changes, nothing of before is used
    """

    def __init__(self, most_bytes: int, caught: Callable[[], int]) -> None:
        self.counts = Kept()
        self._most = most_bytes
        self._count_caught, self._caught = caught, caught()
        self._rows: dict[bytes, torch.Tensor] = {}
        self._lock = threading.Lock()

    def begin(self, keys: list[bytes]) -> _Pass:
        """What is known of these sequences."""
        with self._lock:
            self._trust_nothing_older()
            known = None
            if all(key in self._rows for key in keys):
                known = torch.stack([self._rows[key] for key in keys])
                self.counts.passes += 1
            return _Pass(keys, self._caught, known)

    def end(self, begun: _Pass, states: torch.Tensor) -> None:
        """Keep [B, S, H] of a pass, as many as fit; none if a worker was caught during it."""
        with self._lock:
            self._trust_nothing_older()
            if begun.caught != self._caught:
                return
            for key, row in zip(begun.keys, states.detach().cpu(), strict=True):
                if key not in self._rows and self.counts.bytes + row.nbytes <= self._most:
                    self._rows[key] = row.clone()
                    self.counts.bytes += row.nbytes
                    self.counts.sequences += 1

    def _trust_nothing_older(self) -> None:
        now = self._count_caught()
        if now != self._caught:
            self._wipe()
            self._caught = now

    def wipe(self) -> None:
        """Overwrite and forget everything."""
        with self._lock:
            self._wipe()

    def _wipe(self) -> None:
        for row in self._rows.values():
            row.zero_()
        self._rows.clear()
        self.counts.sequences = self.counts.bytes = 0


class _Shortcut:
    """Stands in front of a decoder and of its lowest layers, which it leaves out where it can."""

    def __init__(self, decoder: nn.Module, lower: list[nn.Module], store: _Store) -> None:
        self._decoder, self._lower, self._store = decoder, lower, store
        self._signature = inspect.signature(decoder.forward)
        self._key = secrets.token_bytes(32)
        self._lane = threading.local()

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Within this context it is there."""
        modules = [self._decoder, *self._lower]
        before = [vars(module).get("forward") for module in modules]
        self._decoder.forward = self._around(self._decoder.forward)
        for index, layer in enumerate(self._lower):
            layer.forward = self._instead(index, layer.forward)
        try:
            yield
        finally:
            for module, forward in zip(modules, before, strict=True):
                del module.forward
                if forward is not None:
                    module.forward = forward

    def _around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def decoder(*args: Any, **kwargs: Any) -> Any:
            keys = self._keys(args, kwargs)
            self._lane.begun = None if keys is None else self._store.begin(keys)
            try:
                return forward(*args, **kwargs)
            finally:
                self._lane.begun = None

        return decoder

    def _instead(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        last = index == len(self._lower) - 1

        def layer(*args: Any, **kwargs: Any) -> Any:
            begun: _Pass | None = getattr(self._lane, "begun", None)
            if begun is None or begun.known is None:
                found = forward(*args, **kwargs)
                if last and begun is not None and _is_hidden(found, len(begun.keys)):
                    self._store.end(begun, found)
                return found
            states: torch.Tensor = args[0] if args else kwargs["hidden_states"]
            return begun.known.to(states.device) if last else states

        return layer

    def _keys(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[bytes] | None:
        """A key for every sequence of a call; None where it is one that is computed in full."""
        told = self._signature.bind(*args, **kwargs).arguments
        told |= told.pop("kwargs", {})
        told = {k: v for k, v in told.items() if v is not None and k not in _APART}
        ids = told.get("input_ids")
        cached = not torch.is_grad_enabled() and kwargs.get("use_cache") is not False
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or cached or self._asks_more(told):
            return None
        if any(_changes(layer) for layer in self._lower):
            return None
        hashes = [hashlib.blake2b(key=self._key) for _ in ids]
        for name, value in sorted(told.items()):
            if isinstance(value, torch.Tensor):
                if value.dim() < 2 or len(value) not in (1, len(ids)):
                    return None
                rows = list(value.detach().cpu().expand(len(ids), *value.shape[1:]))
                facts = [f"{name} {row.dtype} {list(row.shape)}".encode() for row in rows]
                texts = [row.contiguous().numpy().tobytes() for row in rows]
            elif isinstance(value, _PLAIN):
                facts, texts = [f"{name} {value!r}".encode()] * len(ids), [b""] * len(ids)
            else:
                return None
            for found, fact, text in zip(hashes, facts, texts, strict=True):
                found.update(len(fact).to_bytes(8, "little") + fact + text)
        return [found.digest() for found in hashes]

    def _asks_more(self, told: dict[str, Any]) -> bool:
        config = getattr(self._decoder, "config", None)
        return any(told.get(name, getattr(config, name, False)) for name in _MORE)


def _is_hidden(found: object, sequences: int) -> bool:
    return isinstance(found, torch.Tensor) and found.dim() == 3 and len(found) == sequences


def _changes(layer: nn.Module) -> bool:
    """Whether anything of a layer is, or might be, trained or switched."""
    return any(isinstance(module, BaseTunerLayer) for module in layer.modules()) or any(
        parameter.requires_grad for parameter in layer.parameters()
    )


@contextmanager
def kept_activations(
    model: PreTrainedModel, remote: Remote, groups: list[GroupSpec], most_bytes: int,
    caught: Callable[[], int] = lambda: 0,
) -> Iterator[Kept]:  # fmt: skip
    """Within this context lower activations are kept, in at most so many bytes of memory.

    model   with its adapters on it
    caught  counts the workers that were caught: what rests on their answers is forgotten

    Raises CannotKeepError when the lowest layer has an adapter, or the model does not say the same
    when it starts in the middle.
    """
    decoder, lower = _lower_layers(model)
    _require_same(model, remote, groups, decoder, lower)
    store = _Store(most_bytes, caught)
    try:
        with _Shortcut(decoder, lower, store).placed():
            yield store.counts
    finally:
        store.wipe()


def _lower_layers(model: PreTrainedModel) -> tuple[nn.Module, list[nn.Module]]:
    """A model's decoder, and those of its layers that never change."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and any(isinstance(part, RemoteLinear) for part in module.modules())
    }
    outer = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise CannotKeepError(
            f"the activations of {type(model).__name__} cannot be kept: its layers are in "
            f"{len(outer)} lists"
        )
    layers = list(lists[outer[0]])
    lowest = next((i for i, layer in enumerate(layers) if _changes(layer)), len(layers))
    within = {id(parameter) for layer in layers for parameter in layer.parameters()}
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    late = set() if head is None else {id(parameter) for parameter in head.parameters()}
    late -= {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in within | late:
            raise CannotKeepError(f"activations cannot be kept: {name} is trained, too")
    if lowest == 0:
        raise CannotKeepError(
            "no activations are constant, since the lowest layer has an adapter; give "
            "LoraConfig(layers_to_transform=[...]) of upper layers, or keep none"
        )
    return model.get_submodule(outer[0].rpartition(".")[0]), layers[:lowest]


def _require_same(
    model: PreTrainedModel, remote: Remote, groups: list[GroupSpec], decoder: nn.Module,
    lower: list[nn.Module],
) -> None:  # fmt: skip
    """Raises CannotKeepError unless a pass that starts in the middle says what a whole one does."""
    tokens = probe_tokens(model.config).to(next(model.parameters()).device)

    def logits() -> torch.Tensor:
        found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
        return found

    for scale in _SCALES:
        store = _Store(1 << 40, lambda: 0)
        shortcut = _Shortcut(decoder, lower, store)
        with remote.connected(low_rank(groups, scale)), torch.no_grad():
            expected = logits()
            with shortcut.placed():
                both = logits(), logits()
        if not expected.isfinite().all():
            continue
        if store.counts.passes == 1 and all(torch.equal(each, expected) for each in both):
            return
        break
    raise CannotKeepError(
        f"the activations of {type(model).__name__} cannot be kept: its upper layers take more "
        "from the lower ones than what the lowest adapted layer is given"
    )
