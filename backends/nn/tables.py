"""Tables of which a pass reads a few rows, mapped from files instead of held in memory."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from backends.files import map_array, require_own, write_array

log = logging.getLogger(__name__)

_ROWS = 4096  # compared, or written, at a time


def tensor_over(values: NDArray[Any]) -> torch.Tensor:
    """A tensor in the memory of an array, which is only ever read: a mapped one has no other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it could be written to
        return torch.from_numpy(values)


def table_place(tables: Path, identity: str, dtype: torch.dtype) -> Path:
    """The file of a model's embedding among others."""
    return tables / f"{identity[:16]}-{str(dtype).removeprefix('torch.')}.npy"


def map_input_table(
    model: PreTrainedModel, remote: Collection[str], files: Collection[Path], place: Path
) -> None:
    """Have the rows of the input embedding read from a file; the table in memory goes.

    A table that a local head multiplies by stays where it is.

    files  safetensors files of the checkpoint: mapped where one holds the very table
    place  an .npy file for a table that none of them holds; written unless it does already
    """
    embedding: Any = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    if not isinstance(embedding, nn.Embedding) or weight is None or weight.is_meta:
        return
    sharing = [
        (module, leaf)
        for module in model.modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if not parameter.is_meta and parameter.data_ptr() == weight.data_ptr()
    ]
    away = {id(model.get_submodule(name)) for name in remote}
    if any(module is not embedding and id(module) not in away for module, _ in sharing):
        return
    found = _in_checkpoint(files, weight.detach())
    try:
        mapped = nn.Parameter(
            _written(weight.detach(), place) if found is None else found, requires_grad=False
        )
    except OSError as error:
        directory = place.parent
        log.warning("the embedding stays in memory: %s: %s", directory, error.strerror or error)
        return
    for module, leaf in sharing:
        setattr(module, leaf, mapped)


def _in_checkpoint(files: Collection[Path], table: torch.Tensor) -> torch.Tensor | None:
    """The mapped tensor of the checkpoint with these very values, of the same type."""
    for path in files:
        try:
            require_own(path.parent, path)  # what else is read of it is copied: this is not
            with safe_open(path, framework="pt") as file:
                for name in list(file.keys()):
                    if file.get_slice(name).get_shape() == list(table.shape):
                        found: torch.Tensor = file.get_tensor(name)
                        if _same(found, table):
                            return found
        except (OSError, SafetensorError):
            continue
    return None


def _written(table: torch.Tensor, place: Path) -> torch.Tensor:
    """The table's bytes in a file of their own, mapped. Raises OSError."""
    raw = table.contiguous().view(torch.uint8).numpy()
    place.parent.mkdir(parents=True, exist_ok=True)
    require_own(place.parent, place)
    found = _mapped(place, table)
    if found is None or not _same(found, table):
        parts = (raw[start : start + _ROWS] for start in range(0, len(raw), _ROWS))
        write_array(place, raw.shape, raw.dtype, parts)
        found = _mapped(place, table)
    if found is None:
        raise OSError("it was changed while it was written")
    return found


def _mapped(place: Path, table: torch.Tensor) -> torch.Tensor | None:
    shape = (table.shape[0], table.shape[1] * table.element_size())
    try:
        return tensor_over(map_array(place, shape, "uint8")).view(table.dtype)
    except (FileNotFoundError, ValueError):
        return None


def _same(found: torch.Tensor, table: torch.Tensor) -> bool:
    return found.dtype == table.dtype and all(
        torch.equal(found[start : start + _ROWS], table[start : start + _ROWS])
        for start in range(0, len(table), _ROWS)
    )
