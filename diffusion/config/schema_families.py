"""Keys that only one training family reads; in other runs they have no effect, as in the original configs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffusion.config.section import Section


class FamilyFields(Section):
    """Flat keys of LCM distillation, LCM-LoRA, ControlNet and online-caption training."""

    # LCM distillation (train_pixart_lcm.py, train_pixart_lcm_lora.py)
    loss_type: Literal["huber", "l2"] = Field(default="huber", description="LCM: distance of the consistency loss.")
    huber_c: float = Field(default=0.001, gt=0, description="LCM: constant of the pseudo-Huber loss.")
    num_ddim_timesteps: int = Field(default=50, gt=0, description="LCM: DDIM steps of the teacher.")
    w_min: float = Field(default=3.0, ge=0, description="LCM: lowest guidance weight drawn in distillation.")
    w_max: float = Field(default=15.0, ge=0, description="LCM: highest guidance weight drawn in distillation.")
    cfg_scale: float = Field(default=4.0, ge=0, description="LCM: fixed guidance weight of the teacher.")
    ema_decay: float = Field(default=0.95, ge=0, lt=1, description="LCM: decay per step of the target network.")
    lora_rank: int = Field(default=4, gt=0, description="LCM-LoRA: rank of the adapters.")
    # ControlNet (train_controlnet.py)
    copy_blocks_num: int = Field(default=13, gt=0, description="ControlNet: number of base blocks that are copied.")
    train_ratio: float = Field(default=1.0, gt=0, le=1, description="ControlNet: fraction of the data used (0, 1].")
    # Captions of two sources (train_diffusers.py and Sigma)
    real_prompt_ratio: float = Field(
        default=1.0, ge=0, le=1, description="Probability of the real caption; otherwise the generated one is used."
    )
