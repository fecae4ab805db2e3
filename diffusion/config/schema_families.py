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
    w_drawn: bool = Field(
        default=False,
        description="LCM: draw the guidance weight of each sample from w_min..w_max (True), or take cfg_scale, as the "
        "original does whatever w_min and w_max say.",
    )
    w_min: float = Field(default=3.0, ge=0, description="LCM: lowest guidance weight; read when w_drawn is True.")
    w_max: float = Field(default=15.0, ge=0, description="LCM: highest guidance weight; read when w_drawn is True.")
    cfg_scale: float = Field(
        default=4.0, ge=0, description="LCM: weight w of the teacher's guidance, uncond + (1 + w) (cond - uncond)."
    )
    ema_decay: float = Field(default=0.95, ge=0, lt=1, description="LCM: decay per step of the target network.")
    lora_rank: int = Field(default=4, gt=0, description="LCM-LoRA: rank of the adapters.")
    # One-step distillation (train_pixart_dmd.py)
    one_step_timestep: int = Field(
        default=400, ge=1, lt=1000, description="DMD: timestep at which the generator sees pure noise."
    )
    dmd_max_timestep: int = Field(
        default=950, ge=2, le=1000, description="DMD: scores are compared at timesteps 1..dmd_max_timestep - 1."
    )
    dmd_guidance_scale: float = Field(default=3.0, ge=1, description="DMD: guidance of the teacher; 1 = none.")
    regression_weight: float = Field(
        default=0.0,
        ge=0,
        description="DMD: weight of the distance to the teacher's pictures in a store of pairs; 0 = none.",
    )
    lpips_weights: str | None = Field(
        default=None,
        description="DMD: state dict of lpips.LPIPS(net='vgg') for that distance; None = squared error of the latents.",
    )
    # ControlNet (train_controlnet.py)
    copy_blocks_num: int = Field(default=13, gt=0, description="ControlNet: number of base blocks that are copied.")
    control_condition: Literal["canny", "hed"] | None = Field(
        default=None,
        description="ControlNet: edges of the decoded latents, computed in every step; None = the data hold them.",
    )
    hed_path: str = Field(
        default="output/pretrained_models/ControlNetHED.pth",
        description="ControlNet: weights of HED, to compute edges.",
    )
    train_ratio: float = Field(
        default=1.0, gt=0, le=1, description="ControlNet: share of InternalDataHed's list, (0, 1]."
    )
    # Captions of two sources (train_diffusers.py and Sigma)
    real_prompt_ratio: float = Field(
        default=1.0, ge=0, le=1, description="Probability of the real caption; otherwise the generated one is used."
    )
