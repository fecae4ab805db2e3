"""Low-rank adapters (LoRA) in a network: put in, switched off, read, written, merged."""

from diffusion.adapters.lora import (
    LORA_FOLDER,
    add_lora,
    load_lora_tensors,
    lora_state_dict,
    merge_lora,
    read_lora,
    save_lora,
    without_lora,
)

__all__ = [
    "LORA_FOLDER",
    "add_lora",
    "load_lora_tensors",
    "lora_state_dict",
    "merge_lora",
    "read_lora",
    "save_lora",
    "without_lora",
]
