"""The same model in clear: remote linears replaced by local ones with the worker's int8 weights.

This is what private training is compared with. It uses the same quantised base, so that the
only difference left is the cipher.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from backends.he.quantise import dequantise
from backends.he.store import PreparedModel
from backends.nn.remote import RemoteLinear
from backends.nn.skeleton import Skeleton


def localise(skeleton: Skeleton, prepared: PreparedModel) -> None:
    """Turn a skeleton's remote linears into nn.Linear with dequantised weights, in place."""
    weights = prepared.worker_weights()
    matrices = prepared.owner_matrices()
    for index, group in enumerate(prepared.groups):
        forward = matrices[2 * index]
        weight = dequantise(weights[index], forward.out_scale, np.reciprocal(forward.in_scale))
        row = 0
        for name, outputs in zip(group.members, group.out_features, strict=True):
            shell = skeleton.model.get_submodule(name)
            assert isinstance(shell, RemoteLinear)
            with torch.device("meta"):
                linear = nn.Linear(group.in_features, outputs, bias=False)
            part = weight[row : row + outputs].to(shell.weight.dtype)
            linear.weight = nn.Parameter(part.clone(), requires_grad=False)
            linear.bias = shell.bias
            skeleton.model.set_submodule(name, linear)
            row += outputs
