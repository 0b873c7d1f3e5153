"""A writer of GGUF files, for tests: float32 tensors, and the few kinds of metadata needed.

The format: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch

_ALIGNMENT = 32
_INT, _FLOAT, _TEXT, _LIST = 4, 6, 8, 9


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Version 3, with every tensor in float32."""
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        kind, content = _value(value)
        out += _text(key) + struct.pack("<I", kind) + content
    data = bytearray()
    for name, tensor in tensors.items():
        dims = tuple(reversed(tensor.shape))
        out += _text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        out += struct.pack("<IQ", 0, len(data))
        data += tensor.detach().to(torch.float32).contiguous().numpy().tobytes()
        data += bytes(-len(data) % _ALIGNMENT)
    path.write_bytes(bytes(out + bytes(-len(out) % _ALIGNMENT) + data))


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> tuple[int, bytes]:
    if isinstance(value, str):
        return _TEXT, _text(value)
    if isinstance(value, int):
        return _INT, struct.pack("<I", value)
    if isinstance(value, float):
        return _FLOAT, struct.pack("<f", value)
    parts = [_value(part) for part in value]
    head = struct.pack("<IQ", parts[0][0], len(parts))
    return _LIST, head + b"".join(content for _, content in parts)
