"""Activations that do not change are asked for once, and nothing else is left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from backends.he.interface import Values
from backends.nn.adapters import trainable
from backends.nn.kept import CannotKeepError, Kept, kept_activations
from backends.nn.losses import token_losses
from backends.nn.selfcheck import exact_linear
from backends.nn.skeleton import Skeleton
from tests.nn.conftest import Tiny, tokens

PLENTY = 1 << 30


class Asked:
    """A model with adapters in some layers, and which products were asked for."""

    def __init__(self, tiny: Tiny, layers: list[int]) -> None:
        self.skeleton: Skeleton = tiny.skeleton()
        leaves = sorted({name.rpartition(".")[2] for name in self.skeleton.shapes})
        torch.manual_seed(1)
        self.model: PeftModel = get_peft_model(
            self.skeleton.model,
            LoraConfig(
                r=4, target_modules=leaves, layers_to_transform=layers, task_type="CAUSAL_LM",
                fan_in_fan_out=False, init_lora_weights=False,
            ),
        )  # fmt: skip
        self._exact, self._seen = exact_linear(self.skeleton), set[int]()

    def _linear(self, matrix: int, x: Values) -> Values:
        self._seen.add(matrix)
        return self._exact(matrix, x)

    @contextmanager
    def keeping(self, most: int = PLENTY, caught: Any = lambda: 0) -> Iterator[Kept]:
        parts = self.skeleton.model, self.skeleton.remote, self.skeleton.groups
        with (
            kept_activations(*parts, most, caught) as kept,
            self.skeleton.remote.connected(self._linear),
        ):
            yield kept

    def lower(self, call: Any) -> bool:
        """Whether a call asks for the lower layer's products."""
        self._seen.clear()
        call()
        assert max(self._seen) >= len(self.skeleton.groups), "the upper layer's are always"
        return 0 in self._seen

    def gradients(self, ids: torch.Tensor) -> list[torch.Tensor]:
        loss = token_losses(self.model, ids)
        return list(torch.autograd.grad(loss, list(trainable(self.model).values())))

    def logits(self, ids: torch.Tensor, **more: Any) -> torch.Tensor:
        found: torch.Tensor = self.model(input_ids=ids, **more).logits
        return found


def test_the_second_epoch_asks_only_for_the_upper_layer(tiny: Tiny) -> None:
    """In any order and company, evaluated or trained; gradients are what they are without."""
    asked = Asked(tiny, [1])
    ids = tokens(6, 8)
    with asked.skeleton.remote.connected(exact_linear(asked.skeleton)):
        wanted = asked.gradients(ids[[5, 0, 3]])
    with asked.keeping() as kept:
        assert asked.lower(lambda: asked.gradients(ids[:4]))
        assert asked.lower(lambda: asked.gradients(ids[2:])), "two of these are new"
        assert (kept.sequences, kept.bytes, kept.passes) == (6, 6 * 8 * 48 * 4, 0)
        assert not asked.lower(lambda: asked.gradients(ids[[5, 0, 3]]))
        for found, right in zip(asked.gradients(ids[[5, 0, 3]]), wanted, strict=True):
            torch.testing.assert_close(found, right)
        with torch.no_grad():
            assert not asked.lower(lambda: asked.logits(ids[1:2], use_cache=False))
        assert kept.passes == 3
    assert (kept.sequences, kept.bytes) == (0, 0)
    with asked.skeleton.remote.connected(asked._linear):
        assert asked.lower(lambda: asked.gradients(ids)), "nothing stays after it"


ONES, PLACES = torch.ones(2, 8, dtype=torch.long), torch.arange(8).expand(2, 8)
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ones": {"attention_mask": ONES},
    "padded": {"attention_mask": torch.cat((ONES[:, :6], 0 * ONES[:, 6:]), 1)},
    "places": {"position_ids": PLACES},
    "later": {"position_ids": PLACES + 1},
    "two documents": {"position_ids": torch.cat((PLACES[:, :4], PLACES[:, :4]), 1)},
}


def test_only_the_same_call_is_left_out(tiny: Tiny) -> None:
    """Another token, length, mask or position makes another sequence of it."""
    asked = Asked(tiny, [1])
    ids = tokens(2, 8)
    texts = {"ids": ids, "shorter": ids[:, :7], "other": (ids + (torch.arange(8) == 7)) % 96}
    with asked.keeping():
        first = {}
        for text, row in texts.items():
            for name, more in CALLS.items():
                if text == "shorter":
                    more = {key: value[:, :7] for key, value in more.items()}
                call = partial(asked.logits, row, use_cache=False, **more)
                assert asked.lower(call), (text, name)
                first[text, name] = call
                assert not asked.lower(call), (text, name)
        kept = {key: call() for key, call in first.items()}
    with asked.skeleton.remote.connected(asked._linear):
        for key, call in first.items():
            torch.testing.assert_close(kept[key], call())


def test_what_needs_the_lower_layers_gets_them(tiny: Tiny) -> None:
    """A cache to generate from, all hidden states, inputs that are no tokens."""
    asked = Asked(tiny, [1])
    ids = tokens(2, 8)
    states = asked.model.get_input_embeddings()(ids)
    with asked.keeping(), torch.no_grad():
        asked.logits(ids, use_cache=False)
        for more in ({}, {"use_cache": True}, {"use_cache": False, "output_hidden_states": True}):
            assert asked.lower(partial(asked.logits, ids, **more))
        for _ in range(2):
            assert asked.lower(partial(asked.model, inputs_embeds=states, use_cache=False))
        new = asked.model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        again = asked.model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        assert torch.equal(new, again)


def test_no_more_memory_than_was_given(tiny: Tiny) -> None:
    """What does not fit is computed; what fitted stays."""
    asked = Asked(tiny, [1])
    ids = tokens(4, 8)
    one = 8 * 48 * 4
    with asked.keeping(2 * one + one // 2) as kept:
        asked.gradients(ids)
        assert (kept.sequences, kept.bytes) == (2, 2 * one)
        assert not asked.lower(lambda: asked.gradients(ids[:2]))
        assert asked.lower(lambda: asked.gradients(ids[2:]))
        assert kept.bytes == 2 * one


def test_nothing_rests_on_a_worker_that_was_caught(tiny: Tiny) -> None:
    """Before it was caught, or while it was: both are asked for again."""
    asked = Asked(tiny, [1])
    ids = tokens(2, 8)
    caught = 0
    with asked.keeping(caught=lambda: caught) as kept:
        asked.gradients(ids)
        caught = 1
        assert asked.lower(lambda: asked.gradients(ids))
        assert not asked.lower(lambda: asked.gradients(ids))
        exact = asked._exact

        def catching(matrix: int, x: Values) -> Values:
            nonlocal caught
            caught += matrix == 0
            return exact(matrix, x)

        asked._exact = catching
        asked.gradients(tokens(2, 9))
        assert kept.sequences == 0


def test_an_adapter_that_comes_later_is_not_left_out(tiny: Tiny) -> None:
    """Nor a lower weight that begins to train."""
    asked = Asked(tiny, [1])
    ids = tokens(2, 8)
    with asked.keeping():
        asked.gradients(ids)
        assert not asked.lower(lambda: asked.gradients(ids))
        norm = next(m for m in asked.skeleton.model.modules() if "Norm" in type(m).__name__)
        norm.weight.requires_grad_(True)
        assert asked.lower(lambda: token_losses(asked.model, ids))
        norm.weight.requires_grad_(False)
        leaf = sorted({n.rpartition(".")[2] for n in asked.skeleton.shapes})
        asked.model.add_adapter("late", LoraConfig(r=4, target_modules=leaf, fan_in_fan_out=False))
        asked.model.set_adapter("late")
        assert asked.lower(lambda: token_losses(asked.model, ids))


@pytest.mark.parametrize("layers", [[0], [0, 1]])
def test_the_lowest_layer_leaves_nothing_to_keep(tiny: Tiny, layers: list[int]) -> None:
    with pytest.raises(CannotKeepError, match="lowest layer has an adapter"):  # noqa: SIM117
        with Asked(tiny, layers).keeping():
            pass


def test_trained_embeddings_leave_nothing_to_keep(llama: Tiny) -> None:
    asked = Asked(llama, [1])
    asked.model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(CannotKeepError, match=r"embed_tokens\.weight is trained"):  # noqa: SIM117
        with asked.keeping():
            pass


def test_a_model_whose_upper_layers_look_below_is_refused(llama: Tiny) -> None:
    """As those that share keys and values between layers do."""
    asked = Asked(llama, [1])
    layers = asked.skeleton.model.model.layers
    below: list[torch.Tensor] = []

    class Looking(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor, **more: Any) -> torch.Tensor:
            found: torch.Tensor = self.inner(x, **more)
            below.append(found)
            return found

    class Taking(Looking):
        def forward(self, x: torch.Tensor, **more: Any) -> torch.Tensor:
            found: torch.Tensor = self.inner(x, **more)
            return found + below.pop() if below else found

    layers[0], layers[1] = Looking(layers[0]), Taking(layers[1])
    with pytest.raises(CannotKeepError, match="take more from the lower ones"):  # noqa: SIM117
        with asked.keeping():
            pass
