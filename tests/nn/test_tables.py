"""The input embedding's rows come from a mapped file where no local head needs the table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from backends.nn.base import open_base
from backends.nn.skeleton import Skeleton, build_skeleton
from backends.nn.sources import RandomBase
from tests.nn.conftest import LLAMA


def mapped_from(tensor: torch.Tensor) -> str:
    """The file that a tensor's memory is a mapping of; empty for memory of the process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, *_ = line.split()
        start, end = (int(part, 16) for part in place.split("-"))
        if start <= tensor.data_ptr() < end:
            return line.partition("/")[2]
    return ""


def table(skeleton: Skeleton) -> torch.Tensor:
    return skeleton.model.get_input_embeddings().weight


def untied() -> PretrainedConfig:
    config = type(LLAMA)(**LLAMA.to_dict())
    config.tie_word_embeddings = False
    return config


@pytest.mark.parametrize("remote_head", [True, False])
def test_random_tables_are_written_once(remote_head: bool, tmp_path: Path) -> None:
    """A tied head that is local keeps the table in memory; a changed file is written anew."""
    base = RandomBase(LLAMA, 0)
    expected = table(build_skeleton(base, remote_head))
    found = table(build_skeleton(base, remote_head, tables=tmp_path))
    assert torch.equal(found, expected)
    files = list(tmp_path.iterdir())
    assert len(files) == remote_head
    assert bool(mapped_from(found)) == remote_head
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[:-4] + bytes(4))
        again = table(build_skeleton(base, remote_head, tables=tmp_path))
        assert torch.equal(again, expected)
        assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("tied", "remote_head", "dtype"),
    [(True, True, torch.float32), (False, False, torch.float32), (True, True, torch.bfloat16)],
)
def test_a_checkpoints_own_file_is_mapped(
    tied: bool, remote_head: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Where it holds the model's type; else a table of that type is written."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LLAMA if tied else untied(), dtype=dtype)
    model.save_pretrained(tmp_path / "model")
    base = open_base(tmp_path / "model")
    skeleton = build_skeleton(base, remote_head, torch.float32, tables=tmp_path / "tables")
    found = table(skeleton)
    assert torch.equal(found, model.get_input_embeddings().weight.float())
    kind = ".safetensors" if dtype == torch.float32 else ".npy"
    assert mapped_from(found).endswith(kind)
    if remote_head:
        assert torch.equal(skeleton.load_weight("lm_head"), found)
        assert mapped_from(skeleton.load_weight("lm_head")).endswith(kind)


def test_a_checkpoint_that_anybody_can_change_is_not_mapped(tmp_path: Path) -> None:
    """Its rows are read for as long as a run takes: a file of the owner's own holds them then."""
    AutoModelForCausalLM.from_config(LLAMA, dtype=torch.float32).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").chmod(0o666)
    base = open_base(tmp_path / "model")
    skeleton = build_skeleton(base, True, torch.float32, tables=tmp_path / "tables")
    assert mapped_from(table(skeleton)).endswith(".npy")
