"""What a request may say: every field is checked here, before anything is kept or computed.

Messages name fields and bounds, and never what was in them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scenarios.endpoint.fields import Fields, RequestError
from scenarios.endpoint.proto import DatumMessage, ProtoError, read_pass

LOSSES: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("target_tokens", "weights"),
    "importance_sampling": ("target_tokens", "logprobs", "advantages"),
    "ppo": ("target_tokens", "logprobs", "advantages"),
}
"""The losses that are computed here, and the tensors that each takes."""
EPSILON_LEAST = 1e-20
"""Of Adam: less would vanish beside a gradient of zero, and nothing divided by nothing stays."""
CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
"""Bounds of the ratio of probabilities in `ppo`, unless a request names others."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of what is saved."""
SESSION = re.compile(r"session-[0-9a-f]{32}")
MODEL = re.compile(r"session-[0-9a-f]{32}:train:[0-9]{1,6}")
_SAMPLER = re.compile(r"session-[0-9a-f]{32}:sample:[0-9]{1,9}")
_STATE = re.compile(rf"tinker://({MODEL.pattern})/(weights|sampler_weights)/({NAME.pattern})")
_REQUEST = re.compile(r"[a-z0-9:-]{1,100}")

_DATA_MAX = 1024
_SEQ_MAX = 2**62
_STOPS_MAX, _STOP_LETTERS = 32, 256
_LARGEST = 1e6
"""Of weights, advantages and logprobs: more is a mistake, and would drown the gradient."""


@dataclass(frozen=True)
class Limits:
    """What this endpoint takes.

    vocabulary  token ids are below it
    sequence    tokens that every datum and prompt is padded to
    context     tokens of a prompt and what follows it
    rank        of adapters, at most
    """

    vocabulary: int
    sequence: int
    context: int
    rank: int


@dataclass(frozen=True)
class Lora:
    """What an adapter is like."""

    rank: int
    attention: bool
    mlp: bool
    unembed: bool


@dataclass(frozen=True)
class Create:
    """A new training client; seed None is any."""

    session: str
    model_id: str
    lora: Lora
    seed: int | None


@dataclass(frozen=True)
class Datum:
    """tokens int64[n], n from 1 to `Limits.sequence`; targets int64[n]; the rest float32[n]."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    inputs: dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Pass:
    """Forward over some data, and backward unless it is forward only."""

    model_id: str
    seq: int
    data: list[Datum]
    loss: str
    config: dict[str, float]
    forward_only: bool


@dataclass(frozen=True)
class Step:
    """One step of AdamW; clip 0 clips nothing."""

    model_id: str
    seq: int
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float


@dataclass(frozen=True)
class Save:
    """Save a training client's adapter.

    kind     "weights", with the optimiser, or "sampler_weights"
    name     None keeps it in memory, for `sampler`
    sampler  the sampling session that is made, then
    """

    model_id: str
    seq: int
    kind: str
    name: str | None
    overwrite: bool
    sampler: int | None


@dataclass(frozen=True)
class StatePath:
    """Of what was saved: tinker://run/kind/name."""

    run: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.run}/{self.kind}/{self.name}"


@dataclass(frozen=True)
class Load:
    """Load what was saved into a training client; into a new one when `session` is given."""

    model_id: str
    session: str | None
    seq: int
    path: StatePath
    optimizer: bool


@dataclass(frozen=True)
class Sample:
    """Completions of one prompt, int64[n].

    stop        None: where the model ends; otherwise these ids or texts, perhaps none
    prompt_too  logprobs of the prompt's tokens are wanted
    """

    sampler: str
    seq: int
    prompt: NDArray[np.int64]
    count: int
    tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    stop: tuple[int, ...] | tuple[str, ...] | None
    prompt_too: bool


def create_of(body: bytes, limits: Limits, base: str) -> Create:
    """Of create_model. base: the one model that is served."""
    held = Fields.of(body, "create_model")
    session = held.text("session_id", SESSION)
    place = held.whole("model_seq_id", 0, 999_999)
    require_base(held.text("base_model"), base)
    lora = held.inner("lora_config")
    made = Lora(
        lora.whole("rank", 1, limits.rank), lora.flag("train_attn", True),
        lora.flag("train_mlp", True), lora.flag("train_unembed", True),
    )  # fmt: skip
    if not (made.attention or made.mlp or made.unembed):
        raise RequestError("one of train_attn, train_mlp and train_unembed must be true")
    seed = lora.whole("seed", 0, 2**63 - 1, None)
    lora.end()
    _require_adam(held)
    held.end("user_metadata")
    return Create(session, f"{session}:train:{place}", made, seed)


def require_base(named: str, served: str) -> None:
    """Refuse any other model than the one that is served."""
    if named != served:
        raise RequestError(
            f"this endpoint serves {served} only: name it in the recipe, or start the endpoint "
            "with --model, or --name, of what the recipe asks for"
        )


def _require_adam(held: Fields) -> None:
    optimizer = held.any("optimizer_config", {"type": "adamw"})
    if optimizer != {"type": "adamw"}:
        raise RequestError("of the optimisers, only adamw is supported")


def pass_of(body: bytes, limits: Limits) -> Pass:
    """Of forward_backward, in the client's binary form."""
    try:
        held = read_pass(body)
    except ProtoError as error:
        raise RequestError(f"forward_backward: {error}") from error
    if not MODEL.fullmatch(held.model_id) or not 0 < held.seq_id <= _SEQ_MAX:
        raise RequestError("forward_backward needs the model_id and seq_id of a training client")
    wanted = LOSSES.get(held.loss_fn)
    if wanted is None:
        raise RequestError(f"this loss is not supported; there are {', '.join(LOSSES)}")
    if not 1 <= len(held.data) <= _DATA_MAX:
        raise RequestError(f"forward_backward takes 1 to {_DATA_MAX} data")
    data = [_datum(n, each, wanted, limits) for n, each in enumerate(held.data)]
    config = _config(held.loss_fn, held.config)
    return Pass(held.model_id, held.seq_id, data, held.loss_fn, config, held.forward_only)


def _config(loss: str, given: Mapping[str, float | str]) -> dict[str, float]:
    known = CLIP if loss == "ppo" else {}
    found = dict(known)
    for name, value in given.items():
        if name not in known:
            raise RequestError(f"loss_fn_config of {loss}: {name[:40]!r} is not supported")
        if isinstance(value, str) or not 0 <= value <= 1000:
            raise RequestError(f"{name} is no number from 0 to 1000")
        found[name] = value
    return found


def _datum(place: int, held: DatumMessage, wanted: tuple[str, ...], limits: Limits) -> Datum:
    what = f"datum {place}"
    count = len(held.tokens)
    if not 1 <= count <= limits.sequence:
        raise RequestError(
            f"{what} has {count} tokens; this endpoint takes 1 to {limits.sequence} (--sequence)"
        )
    strange = sorted(held.inputs.keys() - {*wanted})
    if strange:
        raise RequestError(f"{what}: {strange[0][:40]!r} is no input of this loss")
    inputs: dict[str, NDArray[np.float32]] = {}
    for name in wanted:
        tensor = held.inputs.get(name)
        if tensor is None:
            if name != "weights":
                raise RequestError(f"{what} lacks {name}")
            inputs[name] = np.ones(count, np.float32)
            continue
        values = tensor.values
        if len(values) != count:
            raise RequestError(f"{name} of {what} has {len(values)} values for {count} tokens")
        if name == "target_tokens":
            targets = _ids(values, f"target_tokens of {what}", limits)
            continue
        inputs[name] = values.astype(np.float32)
        if not np.all(np.abs(inputs[name]) <= _LARGEST):
            raise RequestError(f"{name} of {what} holds NaN, or numbers beyond {_LARGEST:g}")
    return Datum(_ids(held.tokens, what, limits), targets, inputs)


def _ids(values: NDArray[Any], what: str, limits: Limits) -> NDArray[np.int64]:
    if values.dtype.kind != "i":
        raise RequestError(f"{what} holds no token ids")
    found = values.astype(np.int64)
    if len(found) and not (found.min() >= 0 and found.max() < limits.vocabulary):
        raise RequestError(f"{what} holds ids that are not below {limits.vocabulary}")
    return found


def step_of(body: bytes) -> Step:
    """Of optim_step."""
    held = Fields.of(body, "optim_step")
    adam = held.any("adam_params", None)
    if adam is None:
        raise RequestError("of the optimisers, only Adam (AdamParams) is supported")
    params = Fields(adam, "adam_params")
    found = Step(
        *_addressed(held), params.number("learning_rate", 0, 100),
        (params.number("beta1", 0, 0.999999), params.number("beta2", 0, 0.999999)),
        params.number("eps", EPSILON_LEAST, 1), params.number("weight_decay", 0, 1000, 0.0),
        params.number("grad_clip_norm", 0, 1e9, 0.0),
    )  # fmt: skip
    params.end()
    held.end()
    return found


def _addressed(held: Fields) -> tuple[str, int]:
    return held.text("model_id", MODEL), held.whole("seq_id", 1, _SEQ_MAX)


def save_of(body: bytes, for_sampler: bool) -> Save:
    """Of save_weights, or save_weights_for_sampler."""
    held = Fields.of(body, "save_weights_for_sampler" if for_sampler else "save_weights")
    model_id, seq = _addressed(held)
    name = held.any("path", None)
    if name is not None and not (isinstance(name, str) and NAME.fullmatch(name)):
        raise RequestError(
            "a name has letters, digits, '.', '_' and '-', 64 at most, and begins with a letter or "
            "a digit"
        )
    sampler = held.whole("sampling_session_seq_id", 0, 999_999_999, None) if for_sampler else None
    held.only("kind", "snapshot", "only kind='snapshot' is supported")
    if name is None and sampler is None:
        raise RequestError("what is saved needs a name")
    overwrite = held.flag("overwrite")
    held.end("ttl_seconds", "user_metadata")
    return Save(
        model_id, seq, "sampler_weights" if for_sampler else "weights", name, overwrite, sampler
    )


def load_of(body: bytes, base: str) -> Load:
    """Of load_weights."""
    held = Fields.of(body, "load_weights")
    path = state_path(held.text("path"))
    optimizer = held.flag("optimizer")
    held.only("weights_access_token", None, "there are no other accounts here")
    named = held.text("base_model", default=None)
    if named is not None:
        require_base(named, base)
    _require_adam(held)
    session = held.text("session_id", SESSION, None)
    if session is None:
        model_id, seq = _addressed(held)
    else:
        model_id, seq = f"{session}:train:{held.whole('model_seq_id', 0, 999_999)}", 0
    held.end("user_metadata")
    if path.kind != "weights":
        raise RequestError("training goes on from tinker://.../weights/..., see save_state")
    return Load(model_id, session, seq, path, optimizer)


def state_path(text: str) -> StatePath:
    """Of a tinker:// path."""
    found = _STATE.fullmatch(text)
    if found is None:
        raise RequestError("no path of this endpoint; they look like tinker://RUN/weights/NAME")
    return StatePath(*found.groups())


def sampling_session_of(body: bytes, base: str) -> tuple[str, int, StatePath | None]:
    """Of create_sampling_session: (session, place in it, what to sample from; None is the base)."""
    held = Fields.of(body, "create_sampling_session")
    session = held.text("session_id", SESSION)
    place = held.whole("sampling_session_seq_id", 0, 999_999_999)
    named, path = held.text("base_model", default=None), held.text("model_path", default=None)
    if named is not None:
        require_base(named, base)
    if named is None and path is None:
        raise RequestError("create_sampling_session needs base_model or model_path")
    held.end()
    return session, place, None if path is None else state_path(path)


def sample_of(body: bytes, limits: Limits) -> Sample:
    """Of asample."""
    held = Fields.of(body, "sample")
    sampler, seq = held.text("sampling_session_id", _SAMPLER), held.whole("seq_id", 0, _SEQ_MAX)
    prompt = _prompt(held.inner("prompt"), limits)
    params = held.inner("sampling_params")
    tokens = params.whole("max_tokens", 1, limits.context, None)
    if tokens is None:
        raise RequestError(
            "sampling_params needs max_tokens: so many passes are made, wherever an answer ends"
        )
    if len(prompt) + tokens > limits.context:
        raise RequestError(
            f"a prompt of {len(prompt)} tokens and {tokens} more; this model takes {limits.context}"
        )
    top_k = params.whole("top_k", -1, limits.vocabulary, -1)
    found = Sample(
        sampler, seq, prompt, held.whole("num_samples", 1, 64, 1), tokens,
        params.number("temperature", 0, 100, 1.0), max(0, top_k),
        params.number("top_p", 1e-6, 1, 1.0), params.whole("seed", 0, 2**63 - 1, None),
        _stop(params.any("stop", None), limits), held.flag("prompt_logprobs"),
    )  # fmt: skip
    params.end()
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
        held.only(name, 0, f"{name} is not supported")
    held.only("record_stability_info", False, "record_stability_info is not supported")
    held.end()
    return found


def _prompt(held: Fields, limits: Limits) -> NDArray[np.int64]:
    chunks = held.any("chunks")
    held.end()
    found: list[int] = []
    for chunk in chunks if isinstance(chunks, list) else [None]:
        kind = chunk.get("type") if isinstance(chunk, dict) else None
        tokens = chunk.get("tokens") if isinstance(chunk, dict) else None
        if kind != "encoded_text" or not isinstance(tokens, list):
            raise RequestError("a prompt is made of chunks of encoded text; nothing else is taken")
        found += tokens
        if len(found) > limits.sequence:
            break
    if not 1 <= len(found) <= limits.sequence:
        raise RequestError(f"a prompt has 1 to {limits.sequence} tokens here (--sequence)")
    if not all(type(token) is int and abs(token) < 2**31 for token in found):
        raise RequestError("the prompt holds no token ids")
    return _ids(np.array(found, np.int64), "the prompt", limits)


def _stop(given: Any, limits: Limits) -> tuple[int, ...] | tuple[str, ...] | None:
    if given is None:
        return None
    rows = [given] if isinstance(given, str) else given
    if not isinstance(rows, list) or len(rows) > _STOPS_MAX:
        raise RequestError(f"stop is a text, or a list of up to {_STOPS_MAX} texts or ids")
    if all(type(each) is int and 0 <= each < limits.vocabulary for each in rows):
        return tuple(rows)
    if all(isinstance(each, str) and 0 < len(each) <= _STOP_LETTERS for each in rows):
        return tuple(rows)
    raise RequestError("stop holds what is neither a text nor a token id")


def request_id_of(body: bytes) -> str:
    """Of retrieve_future."""
    held = Fields.of(body, "retrieve_future")
    found: str = held.text("request_id", _REQUEST)
    held.end("allow_metadata_only", "model_id")
    return found


def session_of(body: bytes) -> str:
    """Of session_heartbeat."""
    held = Fields.of(body, "session_heartbeat")
    found: str = held.text("session_id", SESSION)
    held.end()
    return found
