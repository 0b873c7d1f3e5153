"""Remote linears compute what local ones with the same int8 weights compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from backends.net.owner import RemoteLinearError
from backends.nn.adapters import add_lora, trainable
from backends.nn.local import localise
from backends.nn.losses import token_losses
from backends.nn.remote import NotConnectedError, RemoteLinear
from backends.nn.selfcheck import exact_linear
from tests.nn.conftest import Tiny, tokens


def gradients(model: torch.nn.Module, ids: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    loss = token_losses(model, ids) / ids.numel()
    return loss.item(), list(torch.autograd.grad(loss, list(trainable(model).values())))


def lora(model: torch.nn.Module) -> torch.nn.Module:
    """Adapters with a non-zero B, so that every gradient is alive."""
    wrapped = add_lora(model, 4, 8, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in trainable(wrapped).items():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=generator)
    return wrapped


@pytest.mark.parametrize(("backend", "tolerance"), [("clear", 1e-5), ("mlwe", 5e-3)])
def test_loss_and_gradients_match_the_local_model(
    tiny: Tiny, backend: str, tolerance: float
) -> None:
    """Forward and backward through the worker, for Linear and Conv1D models."""
    ids = tokens(2, 12)
    local = tiny.skeleton()
    localise(local, tiny.prepared[backend])
    expected_loss, expected = gradients(lora(local.model), ids)
    remote = tiny.skeleton()
    model = lora(remote.model)
    with tiny.connected(remote, backend):
        loss, found = gradients(model, ids)
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.linalg.norm(ours - theirs) <= 4 * tolerance * torch.linalg.norm(theirs)


def test_shared_inputs_are_encrypted_once(llama: Tiny) -> None:
    """q, k, v make one group, gate and up another; a pass sends one request for each."""
    skeleton = llama.skeleton()
    layer0 = [g.name.rpartition(".")[2] for g in skeleton.groups[:4]]
    assert layer0 == ["q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"]
    model = lora(skeleton.model)
    with llama.connected(skeleton, "clear") as client:
        gradients(model, tokens(1, 8))
        # Forward: 4 groups a layer. Backward: the same, all inputs carry adapters' gradients
        # but the first layer's q, k, v, whose input is the frozen embedding.
        assert client.meter.tasks["Encrypt"] == 2 * 4 + 2 * 4 - 1


def test_groups_are_found_from_the_model_not_its_name(tiny: Tiny) -> None:
    """Every remote module is in exactly one group, with its own output size."""
    skeleton = tiny.skeleton()
    members = [name for group in skeleton.groups for name in group.members]
    assert sorted(members) == sorted(skeleton.shapes)
    for group in skeleton.groups:
        for name, outputs in zip(group.members, group.out_features, strict=True):
            assert tuple(skeleton.shapes[name]) == (outputs, group.in_features)


def test_the_owner_holds_no_frozen_linear_weight(tiny: Tiny) -> None:
    """The skeleton's remote modules are empty, and the head alone is a real linear."""
    skeleton = tiny.skeleton()
    linears = [m for m in skeleton.model.modules() if isinstance(m, torch.nn.Linear)]
    assert {type(m) for m in linears} == {RemoteLinear, torch.nn.Linear}
    assert all(m.weight.numel() == 0 for m in linears if isinstance(m, RemoteLinear))
    assert sum(type(m) is torch.nn.Linear for m in linears) == 1


def test_half_precision_models_stay_in_their_dtype(llama: Tiny) -> None:
    """bfloat16 in, bfloat16 out; the cipher works in float32 between."""
    skeleton = llama.skeleton()
    module = next(m for m in skeleton.model.modules() if isinstance(m, RemoteLinear))
    with llama.connected(skeleton, "mlwe"):
        x = torch.randn(3, module.in_features, dtype=torch.bfloat16)
        assert module(x).dtype == torch.bfloat16
        skeleton.remote.forget_lane()


def test_errors_say_what_where_and_what_to_do(llama: Tiny) -> None:
    """NaN, a wrong shape, and use outside a session."""
    skeleton = llama.skeleton()
    module = next(m for m in skeleton.model.modules() if isinstance(m, RemoteLinear))
    with pytest.raises(NotConnectedError, match="outside"):
        module(torch.ones(1, 48))
    with llama.connected(skeleton, "mlwe"):
        with pytest.raises(ValueError, match=r"q_proj: takes \[\.\.\., 48\]"):
            module(torch.ones(1, 47))
        with pytest.raises(RemoteLinearError, match=r"q_proj.*NaN or infinity in token 0"):
            module(torch.full((1, 48), float("nan")))
        # One bad call does not end the session.
        assert torch.isfinite(module(torch.ones(1, 48))).all()


def test_generation_runs_through_the_worker(llama: Tiny) -> None:
    """Greedy generation with a cache gives the local model's tokens under `clear`."""
    ids = tokens(1, 5)
    local = llama.skeleton()
    localise(local, llama.prepared["clear"])
    expected = local.model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    skeleton = llama.skeleton()
    with llama.connected(skeleton, "clear"), torch.no_grad():
        found = skeleton.model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert np.array_equal(found, expected)


def test_a_group_first_asked_for_without_gradients_still_has_them(llama: Tiny) -> None:
    """As by an indexer that only chooses, before the attention that is trained."""
    skeleton = llama.skeleton()
    attention = skeleton.model.model.layers[1].self_attn
    x = torch.randn(1, 3, 48, requires_grad=True)
    with skeleton.remote.connected(exact_linear(skeleton)):
        with torch.no_grad():
            attention.q_proj(x)
        found = torch.autograd.grad(attention.k_proj(x).square().sum(), x)[0]
        attention.v_proj(x)
    weight = skeleton.load_weight("model.layers.1.self_attn.k_proj")
    expected = 2 * (x @ weight.T) @ weight
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)
