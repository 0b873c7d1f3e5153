"""What `python -m scenarios.finetune` says at its end."""

from __future__ import annotations

import shlex
from typing import Any

from scenarios.costs import largest_line
from scenarios.dp import dp_line
from scenarios.session import exactness_line
from scenarios.texts import text_line


def print_report(f: dict[str, Any], weights: str) -> None:
    """What has come of it, and how to use it."""
    steps = len(f["losses"])
    if f.get("private_loss") is not None:
        base, tuned = f["base_loss"], f["private_loss"]
        print(
            f"\nheld-out loss {base:.4f} -> {tuned:.4f} nats a token ({tuned / base - 1:+.1%}) "
            f"after {steps} steps"
        )
    else:
        print(f"\nloss {f['losses'][0]:.4f} -> {f['losses'][-1]:.4f} after {steps} steps")
    print(text_line(f))
    if "costs_s" in f:
        print(largest_line(f["costs_s"], {**f, "elsewhere": f["worker_elsewhere"]}))
    if "products" in f:
        print(exactness_line(f["products"]))
    if "dp_epsilon" in f:
        print(dp_line(f))
    model, adapter = shlex.quote(weights), shlex.quote(f["adapter_dir"])
    print(f"report:  {f['page']} (open it in a browser; it holds private text)")
    print(f"adapter: {f['adapter_dir']}; use it")
    both = f"--model {model} --adapter {adapter}"
    print(f"  with peft   PeftModel.from_pretrained(base_model, {f['adapter_dir']!r})")
    print(f"  privately   python -m scenarios.generate {both} --prompt TEXT")
    print(f"  as one      python -m scenarios.merge {both} --into merged")
