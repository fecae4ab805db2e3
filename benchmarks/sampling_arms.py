"""Arms of the sampling rows: from a prompt to pixels on the device, all with the same parts, prompts and noise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from abab import Setting
from flops import counted_flops, forward_flops
from random_parts import Size, as_diffusers, make_text_encoder, make_transformer, make_vae, relative_error
from torch import Tensor

from diffusion.checkpoints import load_transformer
from diffusion.errors import PromptError
from diffusion.images import vae_folder
from diffusion.images.upsampling import fold_upsampling
from diffusion.inference import PixArtPipeline, make_scheduler
from diffusion.inference.conditions import size_conditions
from diffusion.models.cpu_linear import use_onednn

# Arguments of `enable_fast_sampling` by arm; None = the plain path. On a CPU "ours" is what people get there without
# asking for more.
OUR_ARMS: dict[str, dict[str, Any] | None] = {
    "ours": {},
    "ours-autotune": {"autotune": True},
    "ours-without-graph": {"graph": False},
    "ours-without-compile": {"compile": False},
    "ours-compile": {"compile": True},
    "ours-fp8": {"fp8": True},
    "ours-reuse-2": {"reuse_every": 2},
    "ours-guide-half": {"guidance_until": 0.5},
    "ours-bfloat16": None,
    "ours-plain-decoder": None,
    "ours-eager": None,
}


@dataclass(frozen=True)
class Task:
    """What is drawn: size in px, prompt, solver, steps and guidance; 1 = none."""

    pixels: int
    prompt: str
    algorithm: str = "dpm-solver"
    steps: int = 20
    guidance: float = 4.5

    @property
    def passes(self) -> int:
        """Rows of the network's batch a picture and step."""
        return 2 if self.guidance > 1 else 1


@dataclass(frozen=True)
class Parts:
    """Random or trained networks: T5 lies on the device and is shared; arms copy the others there from host memory."""

    tokenizer: Any
    text_encoder: Any
    vae: Any
    transformer: Any

    @classmethod
    def random(cls, size: Size, pixels: int, device: Any, dtype: Any) -> Parts:
        transformer, vae = make_transformer(size, pixels, device, dtype), make_vae(size, pixels, device, dtype)
        return cls(*make_text_encoder(size, device, dtype), vae.cpu(), transformer.cpu())

    @classmethod
    def of_folder(cls, folder: str, device: Any, dtype: Any) -> Parts:
        """A pipeline folder, such as the bundled model. Its VAE has the layers of diffusers, for the peers."""
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(str(vae_folder(folder)), torch_dtype=dtype).eval().requires_grad_(False)
        pipe = PixArtPipeline.from_pretrained(folder, torch_dtype=dtype, vae=vae, transformer=None)
        return cls(pipe.tokenizer, pipe.text_encoder.to(device), vae, load_transformer(folder, dtype=dtype))

    @property
    def device(self) -> torch.device:
        return self.text_encoder.device  # type: ignore[no-any-return]

    def scheduler(self, algorithm: str) -> Any:
        """A fresh solver for what the transformer predicts."""
        return make_scheduler(algorithm, prediction_type=self.transformer.config.prediction_type)


def work(parts: Parts, task: Task, tokens: int) -> int:
    """FLOPs of a picture: solver steps with guidance, one caption through T5, the decoder."""
    side = task.pixels // 8
    network = parts.transformer.config
    step = task.passes * forward_flops(network, (side // network.patch_size) ** 2, tokens)
    with torch.device("meta"):
        vae = type(parts.vae).from_config(parts.vae.config).eval()
        encoder = type(parts.text_encoder)(parts.text_encoder.config).eval()
        latents, ids = torch.empty(1, network.in_channels, side, side), torch.ones(1, tokens, dtype=torch.long)
    return task.steps * step + counted_flops(lambda: vae.decode(latents)) + counted_flops(lambda: encoder(ids))


def prompt_of(tokenizer: Any, tokens: int) -> str:
    """A prompt of exactly so many tokens, its end mark among them, that nothing cuts or pads."""
    words = ["red"]
    while len(tokenizer(" ".join([*words, "red"])).input_ids) <= tokens:
        words.append("red")
    prompt = " ".join(words)
    assert len(tokenizer(prompt).input_ids) == tokens
    return prompt


class SamplingArm:
    """One pipeline that draws the task; its first `build` makes what compiles."""

    calls_to_wake = 1

    def __init__(self, name: str, parts: Parts, task: Task, settings: Sequence[Setting]) -> None:
        self.name, self.parts, self.task, self.settings, self.owner = name, parts, task, settings, self

    def build(self, setting: Setting) -> Callable[[], Tensor]:
        pipeline, task = self.pipeline(setting), self.task
        pipeline.set_progress_bar_config(disable=True)
        side = task.pixels // 8
        device, dtype = self.parts.device, self.parts.transformer.dtype
        generator = torch.Generator(device).manual_seed(0)
        noise = torch.randn(setting.batch, 4, side, side, generator=generator, device=device, dtype=dtype)
        options = self.options(setting.batch)

        @torch.no_grad()
        def call() -> Tensor:
            images = pipeline(
                latents=noise.clone(), num_inference_steps=task.steps, height=task.pixels, width=task.pixels,
                output_type="pt", use_resolution_binning=False, clean_caption=False, **options,
            ).images  # fmt: skip
            return self.in_unit_range(images)

        return call

    def rest(self) -> None:
        pass

    def state(self) -> Iterable[Tensor]:
        return ()

    def pipeline(self, setting: Setting) -> Any:
        raise NotImplementedError

    def options(self, batch: int) -> dict[str, Any]:
        raise NotImplementedError

    def in_unit_range(self, images: Tensor) -> Tensor:
        return images


class OurSampling(SamplingArm):
    """`PixArtPipeline` under the options of `OUR_ARMS`."""

    network: Any

    def pipeline(self, setting: Setting) -> PixArtPipeline:
        parts = self.parts
        transformer, vae = (copy.deepcopy(part).to(parts.device) for part in (parts.transformer, parts.vae))
        if self.name == "ours-bfloat16":
            transformer, vae = transformer.bfloat16(), vae.bfloat16()
        elif self.name != "ours-eager" and parts.device.type == "cpu":  # as `from_pretrained` does
            use_onednn(transformer)
        if self.name == "ours-plain-decoder":  # diffusers' layers, in the layout that they have where nobody chose one
            decode = vae.decode
            vae.decode = lambda latents, **options: decode(latents.contiguous(), **options)
        else:
            fold_upsampling(vae)
        self.network = transformer
        scheduler = parts.scheduler(self.task.algorithm)
        pipeline = PixArtPipeline(parts.tokenizer, parts.text_encoder, vae, transformer, scheduler)
        make_fast(pipeline, self.name)
        return pipeline

    def options(self, batch: int) -> dict[str, Any]:
        return {"prompt": [self.task.prompt] * batch, "guidance_scale": self.task.guidance, "seed": 0}

    def in_unit_range(self, images: Tensor) -> Tensor:
        return (images / 2 + 0.5).clamp(0, 1)


def largest_difference(parts: Parts, task: Task) -> float:
    """Relative difference between the networks of the two libraries on one input."""
    network, device = copy.deepcopy(parts.transformer).to(parts.device), parts.device
    config, side = network.config, task.pixels // 8
    latents = torch.randn(1, config.in_channels, side, side, device=device, dtype=network.dtype)
    embeds = torch.randn(1, 8, config.caption_channels, device=device, dtype=network.dtype)
    timesteps, mask = torch.full((1,), 500, device=device), torch.ones(1, 8, device=device)
    sizes = size_conditions(network, 1, task.pixels, task.pixels, device)
    theirs = {"resolution": sizes.get("img_hw"), "aspect_ratio": None}
    if sizes:
        theirs["aspect_ratio"] = sizes["aspect_ratio"][:, None]
    with torch.no_grad():
        ours = network(latents, timesteps.float(), embeds, mask, **sizes)
        given = as_diffusers(network)(
            latents, encoder_hidden_states=embeds, timestep=timesteps, added_cond_kwargs=theirs,
            encoder_attention_mask=mask, return_dict=False,
        )[0]  # fmt: skip
    return float(f"{relative_error(ours, given):.3g}")


def make_fast(pipeline: PixArtPipeline, arm: str) -> None:
    """Switch on what an arm of ours asks for; the one place that knows the pipeline's options for speed.

    Raises:
        PromptError: this version of the pipeline has no such option.
    """
    options = OUR_ARMS[arm]
    if options is None or (arm == "ours" and pipeline.device.type == "cpu"):
        return
    if not hasattr(pipeline, "enable_fast_sampling"):
        raise PromptError(f"arm {arm!r}: this version of the pipeline has no enable_fast_sampling; use ours-eager")
    pipeline.enable_fast_sampling(**options)


class DiffusersSampling(SamplingArm):
    """Stock `PixArtAlphaPipeline`, under a setting with a compile mode as `compile_diffusers` makes it."""

    def pipeline(self, setting: Setting) -> Any:
        from diffusers import PixArtAlphaPipeline

        parts = self.parts
        scheduler = parts.scheduler(self.task.algorithm)
        transformer, vae = as_diffusers(parts.transformer), copy.deepcopy(parts.vae)
        pipeline = PixArtAlphaPipeline(parts.tokenizer, parts.text_encoder, vae, transformer, scheduler)
        pipeline.to(parts.device)
        if setting.compile:
            compile_diffusers(pipeline, setting.compile)
        return pipeline

    def options(self, batch: int) -> dict[str, Any]:
        return {"prompt": [self.task.prompt] * batch, "negative_prompt": "", "guidance_scale": self.task.guidance}


def compile_diffusers(pipeline: Any, mode: str) -> None:
    """Everything that diffusers' documents advise for speed: fused qkv, compiled T5, network and NHWC decoder.

    Args:
        mode: of torch.compile. Shapes are static, and nothing but T5 may break the graph.
    """
    pipeline.transformer.fuse_qkv_projections()
    pipeline.transformer = torch.compile(pipeline.transformer, mode=mode, fullgraph=True, dynamic=False)
    pipeline.text_encoder = torch.compile(pipeline.text_encoder, mode=mode, dynamic=False)
    pipeline.vae.to(memory_format=torch.channels_last)
    pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode=mode, fullgraph=True, dynamic=False)
