"""What a model card says of a run's family: what was made, how it relates to its base, and code that draws with it."""

from __future__ import annotations

from diffusion.config import TrainConfig

_RELATIONS = {"LCM": "finetune", "LCMLoRA": "adapter", "ControlNet": "adapter", "DMD": "finetune"}
_TAGS = {
    "LCM": ["lcm"],
    "LCMLoRA": ["lcm", "lora", "peft", "template:sd-lora"],
    "ControlNet": ["controlnet"],
    "DMD": ["one-step"],
}


def kind_of(config: TrainConfig, family: str) -> str:
    """What was made and how it relates to its base, as the beginning of a sentence: "A LoRA of rank 8 for"."""
    if config.lora is not None:
        return f"A {'DoRA' if config.lora.use_dora else 'LoRA'} of rank {config.lora.rank} for"
    return {
        "LCM": "A latent consistency model (1 to 8 steps, no guidance) distilled from",
        "LCMLoRA": f"An LCM-LoRA of rank {config.lora_rank} (1 to 8 steps, no guidance) for",
        "ControlNet": f"A ControlNet of {config.copy_blocks_num} blocks for",
        "DMD": "A generator of one step (DMD) distilled from",
    }.get(family, "A PixArt transformer fine-tuned from")


def relation(config: TrainConfig, family: str) -> str:
    """`base_model_relation` of the hub."""
    return "adapter" if config.lora is not None else _RELATIONS.get(family, "finetune")


def tags(config: TrainConfig, family: str) -> list[str]:
    """Tags of the hub beside those of every run."""
    found = ["lora", "peft", "template:sd-lora"] if config.lora is not None else _TAGS.get(family, [])
    return [*found, "dreambooth"] if config.data.prompt else found


def family_settings(config: TrainConfig, family: str) -> dict[str, str]:
    """Settings that a family has alone, for the card's table."""
    if family in ("LCM", "LCMLoRA"):
        drawn = f"{config.w_min:g} to {config.w_max:g}" if config.w_drawn else f"{config.cfg_scale:g}"
        loss = f"Huber, c = {config.huber_c:g}" if config.loss_type == "huber" else "squared error"
        return {"teacher's guidance": drawn, "loss": loss, "DDIM steps of the teacher": f"{config.num_ddim_timesteps}"}
    if family == "ControlNet":
        made = config.control_condition or "stored with the features"
        return {"condition": made, "control blocks": f"{config.copy_blocks_num}"}
    if family == "DMD":
        regression = f"{config.regression_weight:g}" + (", by LPIPS" if config.lpips_weights else "")
        return {
            "timestep of the one step": f"{config.one_step_timestep}",
            "teacher's guidance": f"{config.dmd_guidance_scale:g}",
            "weight of the regression": regression,
        }
    return {}


def usage(config: TrainConfig, family: str) -> str:
    """Markdown with the code that draws; folders of the card's own repository are written in capitals."""
    base = config.load_from or config.pipeline_load_from or "BASE"
    parts = config.pipeline_load_from or "PIPELINE"
    prompt = (config.data.prompt or config.validation.prompts or ("a prompt",))[0]
    if config.lora is not None:
        return f"{_code(_lora(base, prompt))}\n\nComfyUI loads `comfyui_lora.safetensors`."
    if family == "LCMLoRA":
        return _code(_lcm_lora(base, prompt))
    if family == "ControlNet":
        return _code(_controlnet(base, parts, prompt))
    if family == "DMD":
        return _code(_one_step(config, parts, prompt))
    return _code(_transformer(config, parts, prompt, lcm=family == "LCM"))


def _code(lines: str) -> str:
    return f"```python\n{lines}\n```"


def _lora(base: str, prompt: str) -> str:
    return f"""from diffusion.inference import PixArtPipeline

pipe = PixArtPipeline.from_pretrained({base!r})
pipe.load_lora_weights("THIS_FOLDER_OR_REPOSITORY")
pipe({prompt!r}, seed=0).images[0].save("picture.png")

# or with stock diffusers and peft
from diffusers import PixArtAlphaPipeline
from peft import PeftModel

pipe = PixArtAlphaPipeline.from_pretrained({base!r})
pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "THIS_FOLDER_OR_REPOSITORY")"""


def _lcm_lora(base: str, prompt: str) -> str:
    return f"""from diffusion.inference import PixArtPipeline

pipe = PixArtPipeline.from_pretrained({base!r}, algorithm="lcm")
pipe.load_lora_weights("THIS_REPOSITORY")
pipe({prompt!r}, num_inference_steps=4, guidance_scale=1.0, seed=0).images[0].save("picture.png")"""


def _controlnet(base: str, parts: str, prompt: str) -> str:
    return f"""from PIL import Image

from diffusion.inference import PixArtPipeline

pipe = PixArtPipeline.from_pretrained({parts!r}, transformer={base!r}, controlnet="THIS_FOLDER/controlnet")
pipe({prompt!r}, control_image=Image.open("edges.png"), seed=0).images[0].save("picture.png")"""


def _one_step(config: TrainConfig, parts: str, prompt: str) -> str:
    options = f"{config.one_step_timestep}, {config.process.prediction_type!r}"
    return f"""from diffusion.inference import PixArtPipeline
from diffusion.inference.solvers import make_one_step_scheduler

pipe = PixArtPipeline.from_pretrained({parts!r}, transformer="THIS_REPOSITORY")
pipe.scheduler = make_one_step_scheduler({options})
pipe({prompt!r}, num_inference_steps=1, guidance_scale=1.0, seed=0).images[0].save("picture.png")"""


def _transformer(config: TrainConfig, parts: str, prompt: str, *, lcm: bool) -> str:
    solver, scheduler = _solver(config, lcm=lcm)
    names = ", ".join(sorted(["PixArtAlphaPipeline", "PixArtTransformer2DModel", *solver]))
    options = ", num_inference_steps=4, guidance_scale=0.0" if lcm else ""
    return f"""from diffusers import {names}

transformer = PixArtTransformer2DModel.from_pretrained("THIS_REPOSITORY", subfolder="transformer")
pipe = PixArtAlphaPipeline.from_pretrained({parts!r}, transformer=transformer)
{scheduler}pipe({prompt!r}{options}).images[0].save("picture.png")"""


def _solver(config: TrainConfig, *, lcm: bool) -> tuple[list[str], str]:
    """Class and line of stock diffusers' solver, where that of the parts may not fit the transformer."""
    kind, shift = config.process.prediction_type, config.process.flow_shift
    if lcm:
        name = "FlowMatchLCMScheduler" if kind == "flow" else "LCMScheduler"
        return [name], f'pipe.scheduler = {name}.from_pretrained("THIS_REPOSITORY", subfolder="scheduler")\n'
    if kind == "epsilon":
        return [], ""
    flow = f'"flow_prediction", use_flow_sigmas=True, flow_shift={shift:g}'
    options = flow if kind == "flow" else f'"{kind}"'
    name = "DPMSolverMultistepScheduler"
    return [name], f"pipe.scheduler = {name}.from_config(pipe.scheduler.config, prediction_type={options})\n"
