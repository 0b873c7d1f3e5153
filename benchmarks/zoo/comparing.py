"""The same checkpoint through transformers and through our path: logits and adapter gradients."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from backends.defaults import LEAST_REMOTE
from backends.errors import UserError
from backends.nn.adapters import add_lora, trainable
from backends.nn.losses import token_losses
from backends.nn.selfcheck import require_trainable
from benchmarks.zoo.configs import FIRST_PLAIN_TOKEN, LAST_PLAIN_TOKEN
from benchmarks.zoo.ours import open_skeleton, plain_products
from benchmarks.zoo.shaking import noise

EXACT = 2e-5
"""The largest relative error that counts as the same, in float32."""


@dataclass
class Outcome:
    """What became of one checkpoint.

    status      exact, refused, wrong, traceback; not built: transformers itself could not
    why         the refusal, the last line of the traceback, or what differs
    logits      relative error of the logits (2-norm)
    gradients   relative error of all adapters' gradients together
    remote      share of the frozen weights that a worker computes
    causal      whether transformers' model leaves out what comes after
    """

    status: str
    why: str = ""
    logits: float | None = None
    gradients: float | None = None
    remote: float | None = None
    causal: bool | None = None


@dataclass
class Run:
    """What one model said: float32[..., B, S, V], and adapter gradients by name, or why not."""

    logits: torch.Tensor
    gradients: dict[str, torch.Tensor] | None = None
    lacks: str = ""


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    """int64[batch, length] of plain tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(
        FIRST_PLAIN_TOKEN, LAST_PLAIN_TOKEN + 1, (batch, length), generator=generator
    )


def compare(
    directory: Path, reference: PreTrainedModel, least_remote: float = LEAST_REMOTE
) -> Outcome:
    """Our path on a checkpoint, against the model it should be, in clear.

    Theirs is in evaluation mode. Ours is as a trainer has it, told to train.

    reference     float32, in evaluation mode; adapters are added to it, in place
    least_remote  as `open_skeleton` takes it
    """
    try:
        causal = predicts_only(reference)
        theirs = Run(logits_of(reference))
    except Exception as error:
        return Outcome("not built", f"its own pass: {last_line(error)}")
    try:
        skeleton = open_skeleton(directory, least_remote)
        skeleton.model.train()
        linears = list(skeleton.shapes)
        with skeleton.remote.connected(plain_products(skeleton)):
            ours = Run(logits_of(skeleton.model))
        adapted = add_lora(skeleton.model, rank=4, alpha=8, seed=0, linears=linears)
        require_trainable(adapted, skeleton)
        with skeleton.remote.connected(plain_products(skeleton)):
            add_gradients(ours, adapted)
    except UserError as error:
        text = str(error)
        if "\n" in text.strip():
            return Outcome("traceback", f"a refusal of several lines: {text.splitlines()[0]}")
        return Outcome("refused", text)
    except Exception as error:
        return Outcome("traceback", f"{last_line(error)} {place_of(error)}")
    try:
        add_gradients(theirs, add_lora(reference, rank=4, alpha=8, seed=0, linears=linears))
    except Exception as error:
        theirs = Run(theirs.logits, lacks=last_line(error))
    if not causal:
        return Outcome("wrong", "it sees the tokens that it is to predict, and is not refused")
    return judged(ours, theirs, skeleton.remote_share)


def logits_of(model: PreTrainedModel, ids: torch.Tensor | None = None) -> torch.Tensor:
    """float32[B, S, V] of int64[B, S], or of `tokens()`."""
    with torch.no_grad():
        found = model(input_ids=tokens() if ids is None else ids, use_cache=False)
    logits: torch.Tensor = found.logits
    return logits


def predicts_only(model: PreTrainedModel) -> bool:
    """Whether the last token leaves what is predicted before it as it was."""
    ids = tokens()
    other = ids.clone()
    other[:, -1] = FIRST_PLAIN_TOKEN + (ids[:, -1] + 1) % (LAST_PLAIN_TOKEN - FIRST_PLAIN_TOKEN)
    return relative(logits_of(model, other)[:, :-1], logits_of(model, ids)[:, :-1]) < 1e-3


def add_gradients(run: Run, adapted: PeftModel) -> None:
    """One pass of a model with shaken adapters, forward and backward; its logits beside those
    without."""
    found = trainable(adapted)
    with torch.no_grad():
        for name, parameter in found.items():
            parameter.copy_(0.3 * parameter.shape[-1] ** -0.5 * noise(name, parameter, 1))
    token_losses(adapted, tokens()).backward()  # type: ignore[no-untyped-call]
    run.logits = torch.stack([run.logits, logits_of(adapted)])
    run.gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in found.items()}


def judged(ours: Run, theirs: Run, remote: float) -> Outcome:
    """Exact or wrong, with the figures."""
    if theirs.gradients is None:
        return Outcome("wrong", f"adapters where transformers has none: {theirs.lacks}")
    if ours.logits.shape != theirs.logits.shape:
        shapes = f"{list(ours.logits.shape)} for {list(theirs.logits.shape)}"
        return Outcome("wrong", f"logits of shape {shapes}", remote=remote)
    found = Outcome("exact", remote=remote)
    found.logits = relative(ours.logits, theirs.logits)
    reasons = []
    if not found.logits <= EXACT:
        reasons.append(f"logits differ by {found.logits:.2g}")
    mine = ours.gradients or {}
    names = sorted(theirs.gradients)
    lacking = [name for name in names if name not in mine]
    if lacking:
        reasons.append(f"{len(lacking)} adapter tensors fewer, {lacking[0]} among them")
    else:
        found.gradients = relative(_joined(mine, names), _joined(theirs.gradients, names))
        if not found.gradients <= EXACT:
            reasons.append(f"gradients differ by {found.gradients:.2g}")
    if reasons:
        found.status, found.why = "wrong", "; ".join(reasons)
    return found


def _joined(gradients: dict[str, torch.Tensor], names: Sequence[str]) -> torch.Tensor:
    return torch.cat([gradients[name].reshape(-1) for name in names])


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted| in the 2-norm; NaN where either has one."""
    found, wanted = found.double(), wanted.double()
    return float(torch.linalg.norm(found - wanted) / torch.linalg.norm(wanted))


def last_line(error: BaseException) -> str:
    """'ValueError: what it says', on one line, cut short."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}"[:300]


def place_of(error: BaseException) -> str:
    """'(file.py:12)', where an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
