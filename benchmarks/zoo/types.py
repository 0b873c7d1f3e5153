"""One model type of transformers' causal-LM mapping: built, shaken, saved, and taken our way."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.zoo.comparing import Outcome, compare, last_line, logits_of, relative
from benchmarks.zoo.configs import tiny_config
from benchmarks.zoo.shaking import shaken

TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def row(model_type: str, place: Path) -> dict[str, Any]:
    """What became of one type.

    Any share of remote weights will do; with less than `LEAST_REMOTE` a run refuses it unless it
    is told otherwise.

    saved  how far transformers' own reading of the checkpoint is from what it wrote; where that
           is not 0, the checkpoint does not hold the whole model
    """
    saved = None
    try:
        model = shaken(tiny_config(model_type))
        model.save_pretrained(place)
        reference = clear_model(place)
        saved = relative(logits_of(reference), logits_of(model))
        del model
    except Exception as error:
        outcome = Outcome("not built", last_line(error))
    else:
        outcome = compare(place, reference, least_remote=0.0)
    return {"saved": saved, **asdict(outcome)}


def clear_model(directory: Path) -> PreTrainedModel:
    """The model as transformers reads it, float32, in evaluation mode."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model
