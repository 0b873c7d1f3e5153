"""Stands in for `backends.nn.base` until it is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from backends.nn import skeleton as old
from backends.nn.sources import CheckpointError, WeightSource, source_for


@dataclass
class Base:
    source: WeightSource
    config: PretrainedConfig


def open_base(path: str | Path) -> Base:
    source, directory = source_for(str(path), 0)
    assert directory is not None
    try:
        return Base(source, AutoConfig.from_pretrained(directory))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: no usable config.json ({error})") from error


def build_skeleton(
    base: Base, remote_head: bool = False, dtype: torch.dtype = torch.float32
) -> Any:
    made: Any = old.build_skeleton(base.config, base.source, remote_head, dtype)
    load = made.load_weight
    made.load_weight = lambda module: load(base.source, module)
    made.remote_share = float("nan")
    return made


def require_faithful(skeleton: Any) -> None:
    pass
