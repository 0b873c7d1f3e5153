"""What took most of a real training step, and what would lower it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scenarios.estimate import spoken

BLOCK_TOKENS = 256
"""The cipher costs as much for a block that is not full (`backends.he.params.RING_DEGREE`)."""
_WORDS = {
    "model": "the owner's own layers", "cipher": "the owner's cipher", "worker": "the worker",
    "line": "the line",
}  # fmt: skip


def costs(
    step_s: float, waited_s: float, cipher_s: float, worker_s: float, lanes: int
) -> dict[str, float]:
    """Seconds of a step by what they went to. All but the first are of all lanes together."""
    rest_s = max(0.0, waited_s - cipher_s - worker_s)
    return {
        "model": max(0.0, step_s - waited_s / lanes), "cipher": cipher_s / lanes,
        "worker": worker_s / lanes, "line": rest_s / lanes,
    }  # fmt: skip


def largest_line(found: Mapping[str, float], f: Mapping[str, Any]) -> str:
    """The largest cost and what would lower it, in a line.

    found  by `costs`
    f      lm_head, preset, micro_batch_tokens, elsewhere (whether workers are), head_share (of the
           own layers, simulated; None when that is not known)
    """
    most = max(found, key=lambda part: found[part])
    whole = sum(found.values())
    words = _WORDS[most] if most != "line" or f["elsewhere"] else "the hand-over between threads"
    text = f"largest cost           {words}: {spoken(found[most])} of {spoken(whole)} a step"
    share = f.get("head_share")
    if most == "model" and share is not None:
        text += f", of it {100 * share:.0f} % head and loss (simulated)"
    return f"{text}; {_remedy(most, f)}"


def _remedy(most: str, f: Mapping[str, Any]) -> str:
    small = f["micro_batch_tokens"] < BLOCK_TOKENS
    if most == "model":
        if f["lm_head"] == "local" and (f.get("head_share") or 0.0) > 0.25:
            return "--lm-head remote gives the head to the worker"
        return "a GPU or more cores on this side would lower it"
    if most == "cipher":
        if small:
            return f"micro-batches of {BLOCK_TOKENS} tokens cost it no more than smaller ones"
        return "more cores on this side would lower it"
    if most == "worker":
        if f["elsewhere"]:
            return "one more --worker would share it"
        return "a worker with a GPU (--worker) would lower it"
    if f["elsewhere"]:
        return "more --lanes hide the round trip" + (
            "" if f["preset"].startswith("thin") else ", and --preset thin sends less"
        )
    return "larger micro-batches would lower it" if small else "fewer --lanes would lower it"
