"""`scenarios.endpoint` by raw requests: private steps, and whoever asks for what it must not do."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from backends.nn.remote import Remote
from backends.nn.trainer import TaintedError
from scenarios.endpoint.__main__ import parse
from scenarios.endpoint.address import listen_address
from scenarios.endpoint.futures import Queue
from scenarios.endpoint.proto import ProtoError, read_pass
from scenarios.endpoint.requests import Lora, state_path
from scenarios.endpoint.server import EndpointError, api_key
from scenarios.endpoint.states import StateError, States
from tests.scenarios.endpoint_here import (
    ADAM,
    FORWARD_ONLY,
    NAME,
    PPO,
    RECORDED,
    SEQUENCE,
    TEXTS,
    Here,
    Workers,
    addressed,
    clear_losses,
    clear_model,
    datum,
    here,
    logprobs_of,
    loss_of,
    prompt_of,
)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """One for all, with room for two training clients."""
    place = tmp_path_factory.mktemp("endpoint")
    with here(place / "out", place / "cache", "exact", "--clients", "2") as found:
        yield found


@pytest.fixture
def client(running: Here) -> Iterator[str]:
    """A training client of its own."""
    found = running.client()
    yield found
    running.leave(found)


def test_private_steps_are_those_in_clear(running: Here, client: str) -> None:
    """Same adapter, same AdamW, same int8 base: only the cipher's noise differs; a state that is
    saved goes on the same."""
    losses = []
    for turn in range(1, 7, 2):
        losses.append(loss_of(running.post("forward_backward", addressed(client, turn, RECORDED))))
        assert running.post(
            "optim_step", {"model_id": client, "seq_id": turn + 1, "adam_params": ADAM}
        ) == {"metrics": {}}
    look = RECORDED + FORWARD_ONLY
    losses.append(loss_of(running.post("forward_backward", addressed(client, 7, look))))
    clear = clear_losses(clear_model(running.public), 3)
    assert losses == pytest.approx(clear, rel=2e-3)
    assert clear[3] < 0.9 * clear[0]

    path = running.post("save_weights", {"model_id": client, "seq_id": 8, "path": "three"})["path"]
    session = client.partition(":")[0]
    other = running.post("load_weights", {
        "session_id": session, "model_seq_id": 1, "path": path, "optimizer": True
    })["model_id"]  # fmt: skip
    both = []
    for model_id, turn in ((client, 9), (other, 1)):
        running.post("forward_backward", addressed(model_id, turn, RECORDED))
        step = {"model_id": model_id, "seq_id": turn + 1, "adam_params": ADAM}
        assert "error" not in running.post("optim_step", step)
        both.append(loss_of(running.post("forward_backward", addressed(model_id, turn + 2, look))))
    clear = clear_losses(clear_model(running.public), 4)
    assert both == pytest.approx([clear[4]] * 2, rel=2e-3)


def test_ppo_is_its_formula(running: Here, client: str) -> None:
    """Bounds that a request names, the others as usual."""
    found = loss_of(running.post("forward_backward", addressed(client, 1, PPO)))
    with torch.no_grad():
        logprobs = logprobs_of(clear_model(running.public), [5, 17, 42], [17, 42, 8])
    ratio, advantages = (logprobs + 4.5).exp(), torch.tensor([1.0, -1.0, 2.0])
    clipped = ratio.clamp(0.9, 1.2)
    wanted = -torch.minimum(ratio * advantages, clipped * advantages).sum()
    assert found == pytest.approx(wanted.item(), abs=2e-2)
    assert (clipped != ratio).any()


def test_gradients_add_up_until_the_step_and_are_gone_then(running: Here, client: str) -> None:
    """Two requests of one datum each are one of both; without any there is nothing to step by."""
    for turn, (tokens, targets, _) in enumerate(TEXTS, 1):
        running.post("forward_backward", addressed(client, turn, datum(tokens, targets)))
    step = {"model_id": client, "seq_id": 3, "adam_params": ADAM}
    assert "error" not in running.post("optim_step", step)
    plain = [(tokens, targets, [1.0] * len(tokens)) for tokens, targets, _ in TEXTS]
    clear = clear_losses(clear_model(running.public), 1, plain)
    found = sum(
        loss_of(running.post("forward_backward", addressed(client, turn, datum(*text[:2]))))
        for turn, text in enumerate(TEXTS, 4)
    )
    assert found == pytest.approx(clear[1], rel=2e-3)
    assert "error" not in running.post("optim_step", step | {"seq_id": 6})
    assert "nothing to learn" in running.post("optim_step", step | {"seq_id": 7})["error"]


def test_a_request_that_comes_twice_is_computed_once(running: Here, client: str) -> None:
    """The client sends again what it had no answer to; gradients must not double."""
    body = addressed(client, 1, RECORDED)
    first = running.ask("POST", "forward_backward", body)
    assert running.ask("POST", "forward_backward", body) == first
    running.post("forward_backward", body)
    gradient = sum(
        p.grad.square().sum() for p in running.service._learner.model.parameters()
        if p.grad is not None
    )  # fmt: skip
    model = clear_model(running.public)
    loss = -sum((torch.tensor(w) * logprobs_of(model, t, y)).sum() for t, y, w in TEXTS)
    loss.backward()
    wanted = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    assert float(gradient) == pytest.approx(float(wanted), rel=0.02)


def test_a_step_with_refused_data_changes_nothing(running: Here, client: str) -> None:
    """One part of a step's data was refused: stepping with the rest would be another training."""
    running.post("forward_backward", addressed(client, 1, RECORDED))
    status, told = running.ask("POST", "forward_backward", addressed(client, 2, datum([96], [1])))
    assert status == 400
    assert "datum 0 holds ids that are not below 96" in told["error"]
    step = {"model_id": client, "seq_id": 3, "adam_params": ADAM}
    assert "not whole" in running.post("optim_step", step)["error"]
    assert "nothing to learn" in running.post("optim_step", step | {"seq_id": 4})["error"]


def test_workers_see_one_size_whatever_is_said(
    running: Here, client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of every request of a step and of a sample, for short and long, one datum and two."""
    seen: list[tuple[int, int]] = []
    compute = Remote.compute

    def spy(self: Remote, matrix: int, rows: torch.Tensor) -> torch.Tensor:
        seen.append((matrix, len(rows)))
        return compute(self, matrix, rows)

    monkeypatch.setattr(Remote, "compute", spy)
    found = []
    long = list(range(1, SEQUENCE))
    for turn, body in enumerate((datum([5], [6]), datum(long, [0] * len(long)), RECORDED), 1):
        running.post("forward_backward", addressed(client, turn, body))
        found.append(seen[:])
        seen.clear()
    assert found[0] == found[1] == found[2]
    assert {rows for _, rows in found[0]} == {2 * SEQUENCE}
    assert {matrix % 2 for matrix, _ in found[0]} == {0, 1}

    session, found = client.partition(":")[0], []
    sampler = running.post("create_sampling_session", {
        "session_id": session, "sampling_session_seq_id": 0, "base_model": NAME
    })["sampling_session_id"]  # fmt: skip
    for turn, (prompt, stop) in enumerate((([5, 17], []), (long[:11], list(range(32))))):
        request = prompt_of(prompt, sampling_session_id=sampler, seq_id=turn, num_samples=2)
        request["sampling_params"]["stop"] = stop
        running.post("asample", request)
        found.append(seen[:])
        seen.clear()
    assert found[0] == found[1]
    assert {rows for _, rows in found[0]} == {2 * SEQUENCE, 2}


def test_samples_are_the_models_own(running: Here, client: str) -> None:
    """Greedy tokens and their logprobs are those of clear; a padded prompt changes neither."""
    session = client.partition(":")[0]
    sampler = running.post("save_weights_for_sampler", {
        "model_id": client, "seq_id": 1, "sampling_session_seq_id": 5
    })["sampling_session_id"]  # fmt: skip
    answer = running.post("asample", prompt_of([5, 17, 42], sampling_session_id=sampler, seq_id=0))
    tokens = np.frombuffer(answer[6:22], "<i4").tolist()
    logprobs = np.frombuffer(answer[24:40], "<f4")
    model, row = clear_model(running.public), [5, 17, 42]
    with torch.no_grad():
        for token, logprob in zip(tokens, logprobs, strict=True):
            clear = torch.log_softmax(model(input_ids=torch.tensor([row])).logits[0, -1], -1)
            assert clear[token] > clear.max() - 0.02
            assert clear[token].item() == pytest.approx(float(logprob), abs=0.02)
            row.append(token)
    _, told = running.ask("GET", f"samplers/{sampler}")
    assert told == {"sampler_id": sampler, "base_model": NAME}
    assert session in sampler


def test_a_stop_ends_an_answer(running: Here, client: str) -> None:
    """At an id, that one included; the passes are made all the same."""
    sampler = running.post("create_sampling_session", {
        "session_id": client.partition(":")[0], "sampling_session_seq_id": 1, "base_model": NAME
    })["sampling_session_id"]  # fmt: skip
    request = prompt_of([5], sampling_session_id=sampler)
    whole = running.post("asample", request | {"seq_id": 0})
    assert (whole[3], whole[5]) == (1, 16)  # by length, four ids
    first = int(np.frombuffer(whole[6:10], "<i4")[0])
    request["sampling_params"]["stop"] = [first]
    short = running.post("asample", request | {"seq_id": 1})
    assert (short[3], short[5], short[6:10]) == (0, 4, whole[6:10])
    text = bytes([first]).decode()  # the tokenizer's letters are bytes
    request["sampling_params"]["stop"] = [text]
    again = running.post("asample", request | {"seq_id": 2})
    assert (again[3], again[5], again[6:10]) == (0, 4, whole[6:10])


def test_a_seed_draws_the_same_again(running: Here, client: str) -> None:
    """And another one another answer."""
    sampler = running.post("create_sampling_session", {
        "session_id": client.partition(":")[0], "sampling_session_seq_id": 2, "base_model": NAME
    })["sampling_session_id"]  # fmt: skip
    request = prompt_of([5], sampling_session_id=sampler)
    drawn = []
    for turn, seed in enumerate((3, 3, 4)):
        request["sampling_params"] |= {"seed": seed, "temperature": 1.0, "max_tokens": 8}
        drawn.append(running.post("asample", request | {"seq_id": turn})[6:38])
    assert drawn[0] == drawn[1] != drawn[2]


BAD = [
    ("create_model", {"base_model": "another/model"}, "serves tiny/llama only"),
    ("create_model", {"lora_config": {"rank": 10**9}}, "rank of lora_config is no whole number"),
    ("create_model", {"lora_config": {"rank": True}}, "rank of lora_config is no whole number"),
    ("create_model", {"optimizer_config": {"type": "dimuon", "version": 1}}, "only adamw"),
    ("create_model", {"session_id": "../../etc"}, "session_id of create_model"),
    ("create_model", {"model_seq_id": -1}, "model_seq_id of create_model"),
    ("create_model", {"surprise": 1}, "'surprise' is not supported"),
    ("optim_step", {"adam_params": ADAM | {"learning_rate": 1e400}}, "no JSON"),
    ("optim_step", {"adam_params": ADAM | {"beta1": 1.0}}, "beta1 of adam_params"),
    ("optim_step", {"adam_params": None, "optimizer_params": {"type": "dimuon"}}, "only Adam"),
    ("save_weights", {"path": "../../../etc/passwd"}, "a name has letters"),
    ("save_weights", {"path": ".hidden"}, "a name has letters"),
    ("save_weights", {"path": "a" * 65}, "a name has letters"),
    ("save_weights", {"path": "x\u0000y"}, "a name has letters"),
    ("save_weights_for_sampler", {"path": "x", "kind": "inflight"}, "only kind='snapshot'"),
    ("load_weights", {"path": "tinker://../weights/x", "optimizer": False}, "no path"),
    ("load_weights", {"path": "/etc/passwd", "optimizer": False}, "no path"),
    ("load_weights", {"path": "tinker://MODEL/weights/none", "optimizer": False}, "not saved here"),
    ("load_weights", {"path": "tinker://MODEL/sampler_weights/x", "optimizer": False}, "weights"),
    ("asample", prompt_of([96]), "ids that are not below 96"),
    ("asample", prompt_of([-1]), "ids that are not below 96"),
    ("asample", prompt_of([10**30]), "no token ids"),
    ("asample", prompt_of([True]), "no token ids"),
    ("asample", prompt_of([1] * 17), "a prompt has 1 to 16 tokens"),
    ("asample", prompt_of([]), "a prompt has 1 to 16 tokens"),
    ("asample", prompt_of([1], num_samples=65), "num_samples of sample"),
    ("asample", prompt_of([1], topk_prompt_logprobs=5), "topk_prompt_logprobs is not supported"),
    ("asample", prompt_of([1], sampling_params={"temperature": 1.0}), "needs max_tokens"),
    ("asample", prompt_of([1], sampling_params={"max_tokens": 64}), "this model takes 64"),
    ("asample", prompt_of([1], sampling_params={"max_tokens": 4, "stop": [97]}), "neither a text"),
    ("asample", {"prompt": {"chunks": [{"type": "image", "data": ""}]}}, "encoded text"),
    ("retrieve_future", {"request_id": "none:1"}, "no such request"),
    ("retrieve_future", {"request_id": ["x"]}, "no short text"),
    ("session_heartbeat", {"session_id": "session-" + "0" * 32}, "no such session"),
    ("create_custom_loss", {}, "does not support that call"),
    ("copy_weights", {}, "does not support that call"),
    ("../../etc/passwd", {}, "does not support that call"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "told"), BAD, ids=[f"{p}-{t[:20]}" for p, _, t in BAD])
def test_what_cannot_be_is_refused_in_a_line(
    running: Here, path: str, body: dict[str, Any], told: str
) -> None:
    """With a status that the client takes for final, in its own form, and without quoting."""
    session = "session-" + "0" * 32
    model = f"{session}:train:0"
    usual: dict[str, dict[str, Any]] = {
        "create_model": {"session_id": session, "model_seq_id": 0, "base_model": NAME,
                         "lora_config": {"rank": 4}},
        "optim_step": {"model_id": model, "seq_id": 1},
        "save_weights": {"model_id": model, "seq_id": 1},
        "save_weights_for_sampler": {"model_id": model, "seq_id": 1},
        "load_weights": {"model_id": model, "seq_id": 1},
        "asample": {"sampling_session_id": f"{session}:sample:0", "seq_id": 0},
    }  # fmt: skip
    sent = usual.get(path, {}) | body
    if "path" in sent:
        sent["path"] = sent["path"].replace("MODEL", model)
    status, found = running.ask("POST", path, sent)
    assert 400 <= status < 500
    assert status not in (402, 408, 409, 429)
    assert told in found["error"]
    assert "\n" not in found["error"]
    assert "passwd" not in found["error"]


BAD_DATA = [
    (datum([1] * 17, [1] * 17), "datum 0 has 17 tokens; this endpoint takes 1 to 16"),
    (datum([1, 2], [1]), "target_tokens of datum 0 has 1 values for 2 tokens"),
    (datum([1], [96]), "target_tokens of datum 0 holds ids"),
    (datum([-1], [1]), "datum 0 holds ids"),
    (datum([1], [1], b"cispo"), "this loss is not supported"),
    (datum([1], [1], b"os.system"), "this loss is not supported"),
    (datum([1], [1], b"ppo"), "datum 0 lacks logprobs"),
    (b"\x22\x0dcross_entropy", "takes 1 to 1024 data"),
    (RECORDED.replace(b"\x00\x00\x00\x3f\x18", b"\x00\x00\xc0\x7f\x18"), "holds NaN"),
    (RECORDED.replace(b"weights", b"weighty"), "no input of this loss"),
    (RECORDED[:-1], "cut"),
    (b"\xff" * 20, "does not end"),
    (PPO.replace(b"clip_low", b"clip_why"), "is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("rest", "told"), BAD_DATA, ids=[t[-24:] for _, t in BAD_DATA])
def test_data_that_cannot_be_is_refused_in_a_line(running: Here, rest: bytes, told: str) -> None:
    """Before anything is computed."""
    body = addressed(f"session-{'0' * 32}:train:0", 1, rest)
    status, found = running.ask("POST", "forward_backward", body)
    assert (status, told in found["error"]) == (400, True), found


def test_bytes_of_any_kind_end_in_an_error_or_a_request() -> None:
    """The reader of binary messages: cut and changed anywhere."""
    draw = np.random.default_rng(0)
    whole = addressed(f"session-{'0' * 32}:train:0", 1, RECORDED)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] = int(draw.integers(256))
        for body in (whole[:place], bytes(changed)):
            with suppress(ProtoError):
                read_pass(body)
    with pytest.raises(ProtoError, match="fields"):
        read_pass(b"\x10\x01" * 100_001)


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (401, {"X_API_Key": None}),
        (401, {"X_API_Key": "tml-" + "x" * 43}),
        (401, {"X_API_Key": "\u00fc"}),
        (403, {"Host": "evil.example"}),
        (403, {"Host": "127.0.0.1"}),
        (403, {"Host": None}),
        (403, {"Origin": "http://127.0.0.1:8420"}),
        (403, {"Sec_Fetch_Site": "same-origin"}),
        (411, {"Content_Length": None}),
        (411, {"Content_Length": "-1"}),
        (411, {"Transfer_Encoding": "chunked"}),
        (413, {"Content_Length": str(1 << 40)}),
        (413, {"Content_Length": "9" * 500}),
        (415, {"Content_Type": "text/plain"}),
        (415, {"Content_Encoding": "zstd"}),
    ],
)
def test_who_may_not_ask_is_turned_away(
    running: Here, status: int, headers: dict[str, str | None]
) -> None:
    """No key, another one; a page that a browser of this machine shows; bodies without bound."""
    found, told = running.ask("POST", "create_session", {"tags": []}, **headers)
    assert (found, set(told)) == (status, {"error", "category"})
    assert running.key not in told["error"]


def test_other_methods_and_no_http_are_turned_away(running: Here) -> None:
    """A preflight of a browser among them; and the server goes on."""
    status, told = running.ask("OPTIONS", "create_session")
    assert status == 501
    assert "error" in told
    with socket.create_connection(("127.0.0.1", running.server.port)) as line:
        line.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        line.recv(4096)
    assert running.ask("GET", "healthz") == (200, {"status": "ok"})
    status, _ = running.ask("POST", "create_session", b"[" * 100_000)
    assert status == 400


def test_clients_are_so_many_and_those_that_ended_make_room(running: Here) -> None:
    """And who names one that has ended is told."""
    first, second = running.client(), running.client()
    session = running.post("create_session", {"tags": []})["session_id"]
    wanted = {"session_id": session, "model_seq_id": 0, "base_model": NAME,
              "lora_config": {"rank": 2}}  # fmt: skip
    status, told = running.ask("POST", "create_model", wanted)
    assert (status, "2 training clients are open" in told["error"]) == (400, True)
    running.leave(first)
    assert running.post("create_model", wanted)["model_id"] == f"{session}:train:0"
    status, told = running.ask("POST", "forward_backward", addressed(first, 1, RECORDED))
    assert (status, "no such training client" in told["error"]) == (404, True)
    running.leave(second)
    running.leave(session)


def test_what_was_saved_is_sampled_from_without_a_training_client(running: Here) -> None:
    """As after a restart; of ranks one after another."""
    paths = []
    for rank in (2, 3):
        client = running.client(rank)
        save = {"model_id": client, "seq_id": 1, "path": "sampled"}
        paths.append(running.post("save_weights_for_sampler", save)["path"])
        running.leave(client)
    session = running.post("create_session", {"tags": []})["session_id"]
    for place, path in enumerate(paths * 2):
        sampler = running.post("create_sampling_session", {
            "session_id": session, "sampling_session_seq_id": place, "model_path": path
        })["sampling_session_id"]  # fmt: skip
        request = prompt_of([5], sampling_session_id=sampler, seq_id=0)
        assert isinstance(running.post("asample", request), bytes)
    running.leave(session)


def test_what_is_saved_is_read_with_care(running: Here, client: str) -> None:
    """Names are not taken twice; files that were changed are refused; nothing is unpickled."""
    save = {"model_id": client, "seq_id": 1, "path": "kept"}
    path = running.post("save_weights", save)["path"]
    again = save | {"seq_id": 2}
    assert "there already" in running.post("save_weights", again)["error"]
    assert running.post("save_weights", save | {"seq_id": 3, "overwrite": True})["path"] == path
    place = next((running.out / "states").rglob("kept"))
    assert {p.name for p in place.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "state.json",
    }  # fmt: skip
    assert place.stat().st_mode & 0o077 == 0
    load = {"model_id": client, "path": path, "optimizer": True}
    assert "error" not in running.post("load_weights", load | {"seq_id": 4})

    file, turn = place / "adapter_model.safetensors", 5
    whole, tensors = file.read_bytes(), load_file(file)
    name = next(iter(tensors))
    for changed in (
        {n: t for n, t in tensors.items() if n != name},
        tensors | {name: torch.full_like(tensors[name], torch.nan)},
        tensors | {name: tensors[name].double()},
        tensors | {name: tensors[name][:1]},
    ):
        save_file({n: t.contiguous() for n, t in changed.items()}, file)
        assert str(file) in running.post("load_weights", load | {"seq_id": turn})["error"]
        turn += 1
    file.write_bytes(whole)
    about = place / "state.json"
    told = about.read_text()
    for changed_text, status in (("{", 400), (told.replace('"rank": 4', '"rank": 10000'), 400)):
        about.write_text(changed_text)
        assert running.ask("POST", "load_weights", load | {"seq_id": turn})[0] == status
        turn += 1
    about.write_text(told)
    assert "error" not in running.post("load_weights", load | {"seq_id": turn})


def test_what_rests_on_a_worker_that_was_caught_is_refused(running: Here, client: str) -> None:
    """Every job from then on, and each state that the worker had a part in, after a restart too."""
    running.post("forward_backward", addressed(client, 1, RECORDED))
    path = running.post("save_weights", {"model_id": client, "seq_id": 2, "path": "x"})["path"]
    here, base = running.out / "states", running.public.identity
    (worker,) = running.service._states.served
    honest = States(here, base, 4096, Workers(frozenset(), {"another": "why"}))
    assert honest.about(state_path(path)) == (Lora(4, True, True, True), {worker})
    with pytest.raises(StateError, match="which gave wrong answers"):
        States(here, base, 4096, Workers(frozenset(), {worker: "why"})).about(state_path(path))
    with pytest.raises(StateError, match="another base model"):
        States(here, "other", 4096, Workers(frozenset(), {})).about(state_path(path))

    caught: list[str] = []

    def check() -> None:
        if caught:
            raise TaintedError("do not use it")

    queue = Queue(check)
    queue.add("before", lambda: {"found": 1})
    queue.add("during", lambda: {"found": caught.append(worker)})
    queue.add("after", lambda: {"found": 3})
    thread = threading.Thread(target=queue.work)
    thread.start()
    answers = []
    for name in ("before", "during", "after"):
        job = queue.find(name)
        assert job.done.wait(10)
        answers.append(job.answer)
    queue.close()
    thread.join(10)
    assert answers == [{"found": 1}, *[{"error": "do not use it", "category": "server"}] * 2]


def test_a_defect_tells_where_and_not_what(capsys: pytest.CaptureFixture[str]) -> None:
    """The text of an unknown error may quote what it was given; the next job goes on."""
    queue = Queue(lambda: None)

    words = " ".join(("private", "words"))

    def broken() -> dict[str, object]:
        raise KeyError(words)

    queue.add("broken", broken)
    queue.add("next", lambda: {"found": 1})
    thread = threading.Thread(target=queue.work)
    thread.start()
    assert queue.find("next").done.wait(10)
    queue.close()
    thread.join(10)
    told = queue.find("broken").answer
    assert isinstance(told, dict)
    printed = capsys.readouterr()
    assert "KeyError" in told["error"]
    assert "in broken" in printed.err
    assert words not in f"{told}{printed}"


def test_only_this_machine_is_listened_on() -> None:
    """Anything else is refused before anything is loaded."""
    assert listen_address("127.0.0.1:8420") == ("127.0.0.1", 8420)
    assert listen_address("[::1]:0") == ("::1", 0)
    for text in ("0.0.0.0:8420", "[::]:8420", "192.168.1.7:8420", "gpu.example:8420"):
        with pytest.raises(EndpointError, match="can be reached from elsewhere"):
            listen_address(text)
    for text in ("8420", "127.0.0.1", "127.0.0.1:99999"):
        with pytest.raises(EndpointError, match=r"looks like 127\.0\.0\.1:8420"):
            listen_address(text)


def test_the_command_line_is_refused_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """As that of every other command; its help teaches."""
    with pytest.raises(SystemExit):
        parse(["--listen", "0.0.0.0:8420"])
    assert "can be reached from elsewhere" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "export TINKER_BASE_URL" in capsys.readouterr().out


def test_recipes_name_the_model_as_people_do(tmp_path: Path) -> None:
    """By the hub's id, or the whole name of its directory; or as they are told to."""
    place = tmp_path / "Llama-3.2-1B"
    place.mkdir()
    found = parse(["--model", str(place), "--out", str(tmp_path)])
    assert (found.name, found.tokenizer) == (place.name, str(place.resolve()))
    found = parse(["--model", "org/model", "--out", str(tmp_path)])
    assert (found.name, found.tokenizer) == ("org/model", "org/model")
    found = parse(["--model", str(place), "--name", "org/model", "--out", str(tmp_path)])
    assert (found.name, found.tokenizer) == ("org/model", str(place.resolve()))


def test_a_key_in_a_file_is_its_owners_alone(tmp_path: Path) -> None:
    """It is made once, of a form that the client takes, and not used where others read it."""
    file = tmp_path / "key"
    made = api_key(file)
    assert made == api_key(file) != api_key(None)
    assert made.startswith("tml-")
    assert len(made) > 40
    assert file.stat().st_mode & 0o777 == 0o600
    os.chmod(file, 0o644)
    with pytest.raises(EndpointError, match="chmod 600"):
        api_key(file)
    os.chmod(file, 0o600)
    file.write_text("tml-short")
    with pytest.raises(EndpointError, match="holds no key"):
        api_key(file)


def test_an_endpoint_under_an_address_in_use_says_so(running: Here) -> None:
    """Whoever listens there would get what the recipe sends."""
    with pytest.raises(EndpointError, match="cannot listen on"):
        type(running.server)(("127.0.0.1", running.server.port), running.service, running.key)


def test_a_name_of_two_addresses_is_one_of_them() -> None:
    """Or somebody else could have the other one, where a client looks first."""
    assert listen_address("localhost:0") == ("127.0.0.1", 0)
