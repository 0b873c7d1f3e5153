"""Tinker's own client, unchanged, against the endpoint. Skipped where it is not installed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from scenarios.endpoint import proto
from tests.scenarios.endpoint_here import (
    NAME,
    RATE,
    TEXTS,
    Here,
    clear_losses,
    clear_model,
    here,
    logprobs_of,
    theirs,
)

tinker: Any = pytest.importorskip("tinker")
types: Any = tinker.types


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """Under `thin`, which is what people run."""
    place = tmp_path_factory.mktemp("endpoint")
    with here(place / "out", place / "cache", "thin") as found:
        yield found


@pytest.fixture
def service(running: Here, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """As a recipe makes it: address and key come from the environment."""
    monkeypatch.setenv("TINKER_BASE_URL", running.server.url)
    monkeypatch.setenv("TINKER_API_KEY", running.key)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with tinker.ServiceClient() as found:
        yield found


def data(texts: Any = TEXTS) -> list[Any]:
    """As recipes make them."""
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(tokens),
            loss_fn_inputs={"target_tokens": targets, "weights": weights},
        )
        for tokens, targets, weights in texts
    ]


def stepped(client: Any, steps: int, batch: list[Any]) -> list[float]:
    """Losses of so many steps; forward_backward and optim_step are sent together."""
    found = []
    for _ in range(steps):
        passed = client.forward_backward(batch, "cross_entropy")
        step = client.optim_step(types.AdamParams(learning_rate=RATE))
        found.append(passed.result().metrics["loss:sum"])
        step.result()
    return found


def test_a_recipe_trains_saves_goes_on_and_samples(running: Here, service: Any) -> None:
    """The losses are those of clear within the noise of `thin`; so is what it samples."""
    client = service.create_lora_training_client(base_model=NAME, rank=4, seed=7).result()
    info = client.get_info()
    assert (info.model_data.model_name, info.lora_rank) == (NAME, 4)
    assert client.get_tokenizer().encode("def")
    losses = stepped(client, 3, data())
    state = client.save_state("after-three").result().path

    other = service.create_training_client_from_state_with_optimizer(state).result()
    losses += stepped(other, 2, data())
    passed = other.forward(data(), "cross_entropy").result()
    losses.append(passed.metrics["loss:sum"])
    model = clear_model(running.public)
    assert losses == pytest.approx(clear_losses(model, 5), rel=0.02)
    for output, (tokens, targets, _) in zip(passed.loss_fn_outputs, TEXTS, strict=True):
        with torch.no_grad():
            clear = logprobs_of(model, tokens, targets)
        assert output["logprobs"].tolist() == pytest.approx(clear.tolist(), abs=0.15)

    sampler = other.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints([5, 17, 42])
    params = types.SamplingParams(max_tokens=3, temperature=0.0, stop=[])
    answer = sampler.sample(prompt, 2, params).result()
    assert [each.stop_reason for each in answer.sequences] == ["length"] * 2
    assert answer.sequences[0].tokens == answer.sequences[1].tokens
    first = answer.sequences[0]
    known = sampler.compute_logprobs(types.ModelInput.from_ints([5, 17, 42, *first.tokens]))
    assert known.result()[3:] == pytest.approx(first.logprobs, abs=0.15)

    path = other.save_weights_for_sampler("sampler").result().path
    kept = service.create_sampling_client(model_path=path).result()
    assert kept.sample(prompt, 1, params).result().sequences[0].tokens == first.tokens
    plain = service.create_sampling_client(base_model=NAME).result()
    assert plain.sample(prompt, 1, params).result().sequences[0].tokens != first.tokens
    # What was saved loads with plain `peft`, and says the same.
    place = next((running.out / "states").rglob("sampler_weights")) / "sampler"
    loaded = PeftModel.from_pretrained(theirs(), str(place)).eval()
    with torch.no_grad():
        found = torch.cat([logprobs_of(loaded, t, y) for t, y, _ in TEXTS])
        wanted = torch.cat([logprobs_of(model, t, y) for t, y, _ in TEXTS])
    assert torch.linalg.norm(found - wanted) < 0.05 * torch.linalg.norm(wanted)


def test_the_pages_recipe_runs(service: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """As docs/endpoint.md shows it, but for the model, its tokens, and how often."""
    page = (Path(__file__).parents[2] / "docs" / "endpoint.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    for shown, instead in (
        ('"tiny-llama"', repr(NAME)), ("range(10)", "range(2)"),
        ('client.get_tokenizer().encode("def shortest_path(G, source, target):")', "[5, 17, 42]"),
    ):  # fmt: skip
        assert shown in code
        code = code.replace(shown, instead)
    exec(code, {})
    said = capsys.readouterr().out.splitlines()
    assert "loss:sum" in said[0]
    assert said[-1].endswith("/weights/ten")


def test_a_loss_of_ones_own_and_reinforcement(service: Any) -> None:
    """forward_backward_custom computes its loss at the client; importance sampling is here."""
    client = service.create_lora_training_client(base_model=NAME, rank=2, seed=1).result()

    def twice(batch: Any, logprobs: Any) -> tuple[torch.Tensor, dict[str, float]]:
        return -2 * torch.cat(logprobs).sum(), {"own": 1.0}

    metrics = client.forward_backward_custom(data(), twice).result().metrics
    plain = [(tokens, targets, [1.0] * len(tokens)) for tokens, targets, _ in TEXTS]
    once = client.forward(data(plain), "cross_entropy").result()
    assert metrics["loss:sum"] == pytest.approx(2 * once.metrics["loss:sum"], rel=0.01)
    batch = [
        types.Datum(
            model_input=types.ModelInput.from_ints(tokens),
            loss_fn_inputs={
                "target_tokens": targets, "advantages": weights,
                "logprobs": output["logprobs"].tolist(),
            },
        )
        for (tokens, targets, weights), output in zip(TEXTS, once.loss_fn_outputs, strict=True)
    ]  # fmt: skip
    passed = client.forward_backward(batch, "importance_sampling").result()
    gain = -sum(sum(weights) for _, _, weights in TEXTS)  # nothing has changed: every ratio is 1
    assert passed.metrics["loss:sum"] == pytest.approx(gain, rel=0.1)
    client.optim_step(types.AdamParams(learning_rate=RATE, grad_clip_norm=1.0)).result()
    after = client.forward(batch, "importance_sampling").result()
    assert after.metrics["loss:sum"] < passed.metrics["loss:sum"]


def test_many_data_are_sent_in_chunks_and_make_one_step(
    running: Here, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the client sends at once: one loss, and gradients of all."""
    texts = [([5 + n], [7], [1.0]) for n in range(5)]
    small = service.holder._client_config.model_copy(update={"fwdbwd_max_chunk_len": 2})
    monkeypatch.setattr(service.holder, "_client_config", small)
    client = service.create_lora_training_client(base_model=NAME, rank=4, seed=7).result()
    passed = client.forward_backward(data(texts), "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=RATE)).result()
    clear = clear_losses(clear_model(running.public), 1, texts)
    assert passed.result().metrics["loss:sum"] == pytest.approx(clear[0], rel=0.02)
    assert len(passed.result().loss_fn_outputs) == 5
    after = client.forward(data(texts), "cross_entropy").result().metrics["loss:sum"]
    assert after == pytest.approx(clear[1], rel=0.02)


def test_what_is_not_supported_is_shown_by_the_client(
    running: Here, service: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """In its own errors, with what to do."""
    caplog.set_level(logging.CRITICAL)
    with pytest.raises(tinker.BadRequestError, match="serves tiny/llama only"):
        service.create_lora_training_client(base_model="Qwen/Qwen3-8B").result()
    client = service.create_lora_training_client(base_model=NAME, rank=2).result()
    with pytest.raises(tinker.BadRequestError, match="there are cross_entropy"):
        client.forward_backward(data(), "cispo").result()
    with pytest.raises(tinker.RequestFailedError, match="not whole"):
        client.optim_step(types.AdamParams()).result()
    with pytest.raises(tinker.BadRequestError, match="only Adam"):
        client.optim_step(types.DimuonParams(learning_rate=0.1)).result()
    with pytest.raises(tinker.AuthenticationError, match="TINKER_API_KEY"):
        tinker.ServiceClient(api_key="tml-" + "x" * 40).create_lora_training_client(NAME)


def test_messages_are_those_of_the_clients_schema() -> None:
    """Its own code writes what is read here, and reads what is written here."""
    from tinker.proto.request_conv import forward_backward_request_to_proto
    from tinker.proto.response_conv import deserialize_proto_response

    inputs = types.ForwardBackwardInput(
        data=data(), loss_fn="ppo", loss_fn_config={"clip_low_threshold": 0.5, "name": "x"}
    )
    request = types.ForwardBackwardRequest(
        forward_backward_input=inputs, model_id="model", seq_id=300
    )
    message = forward_backward_request_to_proto(request)
    message.forward_only = True
    found = proto.read_pass(message.SerializeToString())
    assert (found.model_id, found.seq_id, found.loss_fn, found.forward_only) == (
        "model", 300, "ppo", True,
    )  # fmt: skip
    assert found.config == {"clip_low_threshold": 0.5, "name": "x"}
    for datum, (tokens, targets, weights) in zip(found.data, TEXTS, strict=True):
        assert datum.tokens.tolist() == tokens
        assert datum.inputs["target_tokens"].values.tolist() == targets
        assert datum.inputs["weights"].values.tolist() == weights
    image = types.ModelInput(chunks=[types.ImageChunk(data=b"x", format="png")])
    inputs = types.ForwardBackwardInput(data=[types.Datum(model_input=image)], loss_fn="ppo")
    request = types.ForwardBackwardRequest(forward_backward_input=inputs, model_id="m", seq_id=1)
    body = forward_backward_request_to_proto(request).SerializeToString()
    with pytest.raises(proto.ProtoError, match="text only"):
        proto.read_pass(body)
    assert proto.read_address(body) == ("m", 1, False)

    rows = [np.arange(3, dtype=np.float32), np.zeros(0, np.float32), np.ones(200, np.float32)]
    raw = proto.write_outputs(rows, -1.5)
    output = deserialize_proto_response(raw, types.ForwardBackwardOutput)
    assert output.metrics == {"loss:sum": -1.5}
    assert [o["logprobs"].tolist() for o in output.loss_fn_outputs] == [r.tolist() for r in rows]
    sequence = True, np.array([7, 8], np.int32), np.array([-1, -2], np.float32)
    raw = proto.write_samples([sequence], np.array([np.nan, -3], np.float32))
    answer = deserialize_proto_response(raw, types.SampleResponse)
    assert answer.sequences[0].stop_reason == "stop"
    assert answer.sequences[0].tokens == [7, 8]
    assert answer.sequences[0].logprobs == [-1, -2]
    assert answer.prompt_logprobs == [None, -3]
