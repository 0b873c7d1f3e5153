"""Sessions, training clients and samplers of Tinker's client; what each route does.

Routes run in threads of the server and only check, remember and queue. What is computed is computed
by whoever calls `Queue.work`, in the order in which it came.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scenarios.endpoint import requests
from scenarios.endpoint.clients import Client, Clients, Sampling
from scenarios.endpoint.fields import Fields, RequestError
from scenarios.endpoint.futures import Answer, Queue
from scenarios.endpoint.learner import Learner
from scenarios.endpoint.proto import write_outputs, write_samples
from scenarios.endpoint.requests import Limits, StatePath
from scenarios.endpoint.sampler import Sampler
from scenarios.endpoint.states import Kept, States

_WAIT_S = 20.0
"""How long an answer to whoever asks for a result may take; after 45 s the client asks again."""

Reply = tuple[int, Answer]
Route = Callable[["Service", bytes], Reply]


@dataclass(frozen=True)
class About:
    """What is served.

    name       of the base, as recipes name it
    tokenizer  directory or hub id that the client loads its tokenizer from
    clients    training clients at once
    """

    name: str
    tokenizer: str
    architecture: str
    clients: int
    limits: Limits


class Service:
    """The API over one learner.

    check  raises when nothing that was computed may be relied on
    """

    def __init__(
        self, about: About, learner: Learner, sampler: Sampler, states: States,
        check: Callable[[], None],
    ) -> None:  # fmt: skip
        self.about = about
        self.queue = Queue(check)
        self._learner, self._sampler, self._states = learner, sampler, states
        self._here = Clients(self.queue, about.clients, learner.drop)

    def answer(self, method: str, path: str, body: bytes) -> Reply:
        """(status, message). Raises RequestError."""
        route = _ROUTES.get((method, path))
        if route is not None:
            return route(self, body)
        for wanted, pattern, made in _PATTERNS:
            found = pattern.fullmatch(path)
            if found is not None and wanted == method:
                return made(self, found[1])
        raise RequestError(
            "this endpoint does not support that call; docs/endpoint.md lists what it does", 404
        )

    # What is answered at once.

    def health(self, body: bytes) -> Reply:
        """GET healthz."""
        return 200, {"status": "ok"}

    def capabilities(self, body: bytes) -> Reply:
        """GET get_server_capabilities."""
        model = {
            "model_name": self.about.name, "max_context_length": self.about.limits.context,
            "trainable": True, "sampleable": True,
        }  # fmt: skip
        return 200, {"supported_models": [model]}

    def client_config(self, body: bytes) -> Reply:
        """How the client is to behave: chunks in order, plain bodies, few requests at once."""
        return 200, {
            "pjwt_auth_enabled": False, "parallel_fwdbwd_chunks": False,
            "proto_compress_fwdbwd": False, "fwdbwd_max_chunk_len": 128,
            "fwdbwd_max_chunk_bytes_count": 2_000_000, "use_pyqwest_transport": False,
            "sample_use_retrieve_futures": False, "sample_join_sampling_session": False,
            "custom_loss_server_side": False, "sample_max_concurrent_requests": 32,
            "sample_enable_stuck_detection": False,
        }  # fmt: skip

    def dynamic_config(self, body: bytes) -> Reply:
        """What the client asks for again and again."""
        return 200, {"sample_cancel_enabled": False}

    def telemetry(self, body: bytes) -> Reply:
        """What the client tells of itself: it goes nowhere."""
        return 200, {"status": "accepted"}

    def create_session(self, body: bytes) -> Reply:
        """A session; the longest unheard one goes when there are too many."""
        Fields.of(body, "create_session")
        return 200, {"session_id": self._here.begin()}

    def heartbeat(self, body: bytes) -> Reply:
        """The client is alive."""
        self._here.heard(requests.session_of(body))
        return 200, {}

    def finish(self, session: str) -> Reply:
        """The client has ended; its adapters are forgotten, what it saved stays."""
        self._here.finish(session)
        return 200, {}

    def get_info(self, body: bytes) -> Reply:
        """Of a training client."""
        held = Fields.of(body, "get_info")
        name = held.text("model_id", requests.MODEL)
        held.end()
        client = self._here.client(name)
        data = {
            "arch": self.about.architecture, "model_name": self.about.name,
            "tokenizer_id": self.about.tokenizer,
        }  # fmt: skip
        return 200, {
            "model_data": data, "model_id": name, "is_lora": True,
            "lora_rank": client.lora.rank, "model_name": self.about.name,
        }  # fmt: skip

    def get_sampler(self, name: str) -> Reply:
        """Of a sampling session."""
        path = self._here.sampling(name).path
        told = {} if path is None else {"model_path": str(path)}
        return 200, {"sampler_id": name, "base_model": self.about.name, **told}

    def create_sampling_session(self, body: bytes) -> Reply:
        """For the base, or for what was saved."""
        session, place, path = requests.sampling_session_of(body, self.about.name)
        if path is not None:
            self._states.about(path)
        name = f"{session}:sample:{place}"
        self._here.new_sampler(session, name, path)
        return 200, {"sampling_session_id": name}

    def retrieve(self, body: bytes) -> Reply:
        """A result, for which it waits a while."""
        name = requests.request_id_of(body)
        job = self.queue.find(name)
        if job.done.wait(_WAIT_S):
            return 200, job.answer
        return 408, {"type": "try_again", "request_id": name, "queue_state": "active"}

    # What is queued.

    def create_model(self, body: bytes) -> Reply:
        """A training client with a new adapter."""
        request = requests.create_of(body, self.about.limits, self.about.name)

        def work(slot: str) -> Answer:
            self._learner.create(slot, request.lora, request.seed)
            return {"model_id": request.model_id, "type": "create_model"}

        made = self._here.new_client(request.session, request.model_id, request.lora, work)
        return _asked(made, request.model_id)

    def forward_backward(self, body: bytes) -> Reply:
        """Gradients, or losses alone."""

        def work(client: Client, lost: bool) -> Answer:
            self._states.require_trusted(client.rests_on)
            logprobs, loss = self._learner.run(client.slot, request)
            return write_outputs(logprobs, loss)

        with self._here.asking(body, binary=True):
            request = requests.pass_of(body, self.about.limits)
            name = self._here.in_turn(request.model_id, request.seq, work, len(body))
        return _asked(name, request.model_id)

    def optim_step(self, body: bytes) -> Reply:
        """A step with the gradients since the last."""

        def work(client: Client, lost: bool) -> Answer:
            self._states.require_trusted(client.rests_on)
            if lost:
                self._learner.spoil(client.slot)
            self._learner.step(client.slot, request)
            return {"metrics": {}}

        with self._here.asking(body):
            request = requests.step_of(body)
            name = self._here.in_turn(request.model_id, request.seq, work, settles=True)
        return _asked(name, request.model_id)

    def save_weights(self, body: bytes) -> Reply:
        """Adapter and optimiser, to go on from."""
        return self._save(body, for_sampler=False)

    def save_for_sampler(self, body: bytes) -> Reply:
        """An adapter to sample from: on disk by a name, else in memory."""
        return self._save(body, for_sampler=True)

    def _save(self, body: bytes, for_sampler: bool) -> Reply:
        def work(client: Client, lost: bool) -> Answer:
            self._states.require_trusted(client.rests_on)
            lora = self._learner.lora(client.slot)
            moments = self._learner.moments(client.slot) if request.kind == "weights" else {}
            workers = client.rests_on | self._states.served
            kept = Kept(lora, self._learner.weights(client.slot), moments, workers)
            if request.name is None:
                session = request.model_id.partition(":")[0]
                name = f"{session}:sample:{request.sampler}"
                self._here.remember(name, Sampling(kept=kept))
                return {"sampling_session_id": name, "type": "save_weights_for_sampler"}
            path = StatePath(request.model_id, request.kind, request.name)
            self._states.save(path, kept, self._learner.config(lora), request.overwrite)
            return {"path": str(path)}

        with self._here.asking(body):
            request = requests.save_of(body, for_sampler)
            asked = self._here.in_turn(request.model_id, request.seq, work)
        return _asked(asked, request.model_id)

    def load_weights(self, body: bytes) -> Reply:
        """What was saved, into a training client or a new one."""

        def work(slot: str) -> Answer:
            if request.session is not None:
                self._learner.create(slot, lora, None)
            elif self._learner.lora(slot) != lora:
                raise RequestError(f"{request.path} has another rank, or adapts other parts")
            kept = self._states.load(request.path, self._learner.shapes(lora), request.optimizer)
            self._learner.restore(slot, kept.weights, kept.moments)
            self._here.client(request.model_id).rests_on = kept.workers
            return {"path": str(request.path), "model_id": request.model_id, "type": "load_weights"}

        with self._here.asking(body):
            request = requests.load_of(body, self.about.name)
            lora, _ = self._states.about(request.path)
            if request.session is not None:
                name = self._here.new_client(request.session, request.model_id, lora, work)
            else:
                name = self._here.in_turn(
                    request.model_id, request.seq, lambda client, lost: work(client.slot),
                    settles=True,
                )  # fmt: skip
        return _asked(name, request.model_id)

    def sample(self, body: bytes) -> Reply:
        """Completions."""
        request = requests.sample_of(body, self.about.limits)
        name = f"{request.sampler}:{request.seq}"
        ids = [f"{name}:{place}" for place in range(request.count)]
        sampling = self._here.sampling(request.sampler)

        def work() -> Answer:
            kept = sampling.kept
            if kept is None and sampling.path is not None:
                shapes = self._learner.shapes(self._states.about(sampling.path)[0])
                kept = self._states.load(sampling.path, shapes)
                self._here.remember(request.sampler, Sampling(sampling.path, kept))
            if kept is not None:
                self._states.require_trusted(kept.workers)
            lora, weights = (None, {}) if kept is None else (kept.lora, kept.weights)
            return write_samples(*self._sampler.run(request, lora, weights))

        return self._queued(name, work, len(body), sample_sequence_ids=ids)

    def _queued(self, name: str, work: Callable[[], Answer], size: int = 0, **more: Any) -> Reply:
        self.queue.add(name, work, size)
        return 200, {"request_id": name, **more}


def _asked(name: str, model_id: str) -> Reply:
    """Of a training client's request, whose result is to be asked for by its name."""
    return 200, {"request_id": name, "model_id": model_id}


_V1 = "/api/v1/"
_ROUTES: dict[tuple[str, str], Route] = {
    ("GET", f"{_V1}healthz"): Service.health,
    ("GET", f"{_V1}get_server_capabilities"): Service.capabilities,
    ("POST", f"{_V1}client/config"): Service.client_config,
    ("POST", f"{_V1}client/dynamic_config"): Service.dynamic_config,
    ("POST", f"{_V1}telemetry"): Service.telemetry,
    ("POST", f"{_V1}create_session"): Service.create_session,
    ("POST", f"{_V1}session_heartbeat"): Service.heartbeat,
    ("POST", f"{_V1}get_info"): Service.get_info,
    ("POST", f"{_V1}create_sampling_session"): Service.create_sampling_session,
    ("POST", f"{_V1}retrieve_future"): Service.retrieve,
    ("POST", f"{_V1}create_model"): Service.create_model,
    ("POST", f"{_V1}forward_backward"): Service.forward_backward,
    ("POST", f"{_V1}optim_step"): Service.optim_step,
    ("POST", f"{_V1}save_weights"): Service.save_weights,
    ("POST", f"{_V1}save_weights_for_sampler"): Service.save_for_sampler,
    ("POST", f"{_V1}load_weights"): Service.load_weights,
    ("POST", f"{_V1}asample"): Service.sample,
}
_PATTERNS: list[tuple[str, re.Pattern[str], Callable[[Service, str], Reply]]] = [
    ("GET", re.compile(rf"{_V1}samplers/([a-z0-9:-]{{1,100}})"), Service.get_sampler),
    ("POST", re.compile(rf"{_V1}sessions/([a-z0-9-]{{1,100}})/finish"), Service.finish),
]
