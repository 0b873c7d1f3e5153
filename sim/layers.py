"""Traces deep models by a few of their layers, where that is provably the same.

A transformer of 80 equal layers does in each of them what it does in the others, so the trace of
four layers holds all there is to know: the first layer, two in the middle, the last. `trace_deep`
repeats a middle one, and only where three things hold:

    * the whole model, built on the meta device, has one stack of as many modules as its config
      has layers, all alike in modules, shapes and settings, and the config says nothing
      different of any two of them;
    * the short model's pass goes through its layers one after the other and back again;
    * its two middle layers have exactly the same trace.

Any other model is traced through all its layers.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from backends.he.manifest import GroupSpec
from sim.device import Work
from sim.tracing import LaneTrace, Segment

T = TypeVar("T")

SHORT = 4
"""Layers of the short model: first, middle, middle, last."""

_DEPTH = "num_hidden_layers"  # every config's name for it, through its attribute map


def trace_deep(
    config: PretrainedConfig, trace: Callable[[PretrainedConfig], LaneTrace]
) -> LaneTrace:
    """`trace(config)`, got from fewer layers where that gives the same."""
    short = shortened(config)
    if short is not None:
        stack, short_config = short
        found = deepened(trace(short_config), stack, getattr(config.get_text_config(), _DEPTH))
        if found is not None:
            return found
    return trace(config)


def shortened(config: PretrainedConfig) -> tuple[str, PretrainedConfig] | None:
    """(name of the stack of layers, config with SHORT layers); None if layers differ."""
    depth = getattr(config.get_text_config(), _DEPTH, 0)
    if depth <= SHORT:
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if len(stacks) != 1:
        return None
    name, layers = stacks[0]
    first = _form(layers[0])
    if any(_form(layer) != first for layer in layers[1:]):
        return None
    short = copy.deepcopy(config)
    text = short.get_text_config()
    for key, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == depth:
            if any(entry != value[0] for entry in value):
                return None
            setattr(text, key, value[:SHORT])
    setattr(text, _DEPTH, SHORT)
    return name, short


def _form(layer: nn.Module) -> list[Any]:
    """What makes two layers the same: modules, parameters' shapes, settings."""
    return [
        (
            name,
            type(module),
            sorted((n, p.shape, p.dtype) for n, p in module.named_parameters(recurse=False)),
            sorted(
                (key, repr(value))
                for key, value in vars(module).items()
                if isinstance(value, int | float | str | tuple | None) and key != "layer_idx"
            ),
        )
        for name, module in layer.named_modules()
    ]


def deepened(trace: LaneTrace, stack: str, depth: int) -> LaneTrace | None:
    """The trace of `depth` layers from that of SHORT; None when its layers are not in line."""
    pattern = re.compile(rf"((?:.*\.)?{re.escape(stack)}\.)(\d+)(\..*)")

    def layer_of(name: str) -> int | None:
        match = pattern.fullmatch(name)
        return int(match[2]) if match else None

    def moved(name: str, layer: int | None) -> str:
        return name if layer is None else pattern.sub(rf"\g<1>{layer}\g<3>", name)

    def moved_group(group: GroupSpec, layer: int | None) -> GroupSpec:
        members = tuple(moved(member, layer) for member in group.members)
        return replace(group, name=moved(group.name, layer), members=members)

    layers = [layer_of(group.name) for group in trace.groups]
    templates = [moved_group(group, 0) for group in trace.groups]
    groups = _stretched(list(zip(layers, templates, strict=True)), depth)
    places = [layers[:index].count(layer) for index, layer in enumerate(layers)]
    """Where a group comes among those of its layer."""
    steps: list[tuple[int | None, tuple[tuple[Work, ...], int, int]]] = [
        (layers[m // 2], (parts, places[m // 2], m % 2))
        for parts, m in ((s.parts, s.matrix) for s in trace.segments)
        if m is not None
    ]
    forward = _stretched([step for step in steps if step[1][2] == 0], depth)
    backward = _stretched([step for step in steps if step[1][2] == 1], depth)
    if groups is None or forward is None or backward is None:
        return None
    index: dict[tuple[int | None, int], int] = {}
    for number, (layer, _) in enumerate(groups):
        index[layer, sum(key[0] == layer for key in index)] = number
    segments = [
        Segment(parts, 2 * index[layer, place] + direction)
        for layer, (parts, place, direction) in (*forward, *backward)
    ]
    parameters = {
        moved(name, layer): shape
        for name, shape in trace.parameters.items()
        for layer in _copies(layer_of(name), depth)
    }
    return LaneTrace(
        tuple(moved_group(group, layer) for layer, group in groups),
        (*segments, trace.segments[-1]),
        dict(sorted(parameters.items())),
    )


def _copies(layer: int | None, depth: int) -> Iterable[int | None]:
    """The layers that a layer of the short model stands for."""
    if layer is None or layer == 0:
        return (layer,)
    if layer == SHORT - 1:
        return (depth - 1,)
    return range(1, depth - 1) if layer == 1 else ()


def _stretched(items: list[tuple[int | None, T]], depth: int) -> list[tuple[int | None, T]] | None:
    """Items of SHORT layers in order (or in reverse) repeated for `depth` layers.

    None when the layers do not follow each other, or the middle ones are not equal.
    """
    runs = [(layer, [x for _, x in run]) for layer, run in itertools.groupby(items, lambda i: i[0])]
    order = [layer for layer, _ in runs if layer is not None]
    upwards = order == sorted(order)
    if sorted(order) != list(range(SHORT)) or not (upwards or order == sorted(order)[::-1]):
        return None
    content = dict(runs)
    if content[1] != content[2]:
        return None
    stretched = []
    for layer, run in runs:
        copies = list(_copies(layer, depth))
        for copied in copies if upwards else reversed(copies):
            stretched += [(copied, item) for item in run]
    return stretched
