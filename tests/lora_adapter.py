"""A LoRA adapter for the bundled model, of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from workers.bundled import bundled_model

RANK = 8


def adapter(folder: Path, *, seed: int) -> Path:
    """Write an adapter of random weights for the bundled model."""
    config = json.loads((Path(bundled_model()) / "config.json").read_text())
    size = config["hidden_size"]
    noise = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(RANK, size, generator=noise)
        weights[f"{name}.lora_B.weight"] = torch.randn(size, RANK, generator=noise)
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": ["o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder
