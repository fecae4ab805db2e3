"""Which model a page draws with: what was asked for, else its official one, else the bundled one."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from diffusion.config.sampling_cli import BUNDLED, BUNDLED_LCM_LORA, HED
from diffusion.devices import choose_device, choose_dtype
from diffusion.errors import CheckpointError, ConfigError
from diffusion.inference.batch import load_pipeline
from diffusion.inference.folders import published_file, published_pipeline
from diffusion.inference.lora import fuse_into
from diffusion.inference.memory import Workload, check_plan_name
from diffusion.inference.previews import LatentPreview
from diffusion.web.artist import Artist
from diffusion.web.loras import Loras
from diffusion.web.settings import WebSettings

_logger = logging.getLogger("pixart.web")
ROOT = Path("output/pretrained_models")


@dataclass(frozen=True)
class Variant:
    """One page: its title, the official models it is for (the first that is there), and where its controls begin.

    guidance_scale: None = the model's usual one.
    controlnets: official ControlNet files; a page that has some offers edges.
    """

    title: str
    models: tuple[str, ...]
    solver: str = "dpm-solver"
    steps: int = 14
    guidance_scale: float | None = None
    pictures: int = 1
    control_strength: float = 1.0
    controlnets: tuple[str, ...] = ()
    image_size: int | None = None


VARIANTS = {
    "1024": Variant("PixArt-α", ("PixArt-XL-2-1024-MS", "PixArt-XL-2-1024-MS.pth")),
    "512": Variant("PixArt-α 512", ("PixArt-XL-2-512x512", "PixArt-XL-2-512x512.pth"), steps=20, pictures=2),
    "LCM": Variant("PixArt-δ LCM", ("PixArt-LCM-XL-2-1024-MS",), solver="lcm", steps=4, guidance_scale=1.0),
    "CONTROLNET": Variant(
        "PixArt-δ ControlNet",
        ("PixArt-XL-2-1024-MS", "PixArt-XL-2-1024-MS.pth"),
        controlnets=("PixArt-XL-2-1024-ControlNet.pth",),
    ),
}


@dataclass(frozen=True)
class Chosen:
    """Where the parts of the model are, and what the page says, in Markdown, when it is not the official one."""

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    notice: str = ""
    lora: str | None = None


def choose(args: argparse.Namespace, variant: Variant, *, fetch: bool = False) -> tuple[Chosen, Variant]:
    """The model of a page, and the page's beginning settings as that model needs them.

    Args:
        fetch: ask the hub for official files that are not on this machine.
    """
    options: dict[str, Any] = {"text_encoder": args.t5_path, "vae": args.tokenizer_path}
    if args.model_path is not None:
        return _with_control(Chosen(args.model_path, options), args, variant, fetch), variant
    for name in variant.models:
        path = ROOT / name
        if path.is_dir():
            return _with_control(Chosen(str(path), options), args, variant, fetch), variant
        parts = {"text_encoder": ROOT / "t5_ckpts", "vae": ROOT / "sd-vae-ft-ema"}
        if path.is_file() and all(part.is_dir() for part in parts.values()):
            found = {part: options[part] or str(default) for part, default in parts.items()}
            return _with_control(Chosen(str(path), found), args, variant, fetch), variant
    cached, problem = _from_hub(published_pipeline, variant.models[0], fetch)
    if cached is not None:
        return _with_control(Chosen(cached, options), args, variant, fetch), variant
    command = f"`python tools/download.py --model_names {variant.models[0]}`"
    notice = f"{problem}This is the small bundled model, which knows emoji. For the official one: {command}"
    if variant.solver == "lcm" and Path(BUNDLED_LCM_LORA).is_dir():
        return Chosen(BUNDLED, options, notice, lora=BUNDLED_LCM_LORA), variant
    beginning = replace(variant, solver="dpm-solver", steps=14, guidance_scale=None)
    return _with_control(Chosen(BUNDLED, options, notice), args, beginning, fetch=False), beginning


def _from_hub(find: Callable[..., Path | None], name: str, fetch: bool) -> tuple[str | None, str]:
    """Where a published model lies in the hub's cache, and what the page says if it could not be fetched."""
    try:
        found = find(name)
        if found is None and fetch:
            _logger.info("fetching %s from the hub", name)
            found = find(name, fetch=True)
    except CheckpointError as error:
        return None, f"{error}. "
    return None if found is None else str(found), ""


def choose_lcm(args: argparse.Namespace, variant: Variant, *, fetch: bool = False) -> tuple[Chosen, Variant]:
    """As `choose`, for app/app_lcm.py: a distilled model, or with --is_lora an ordinary one and an LCM-LoRA."""
    if args.repo_id is not None:
        args.model_path = args.repo_id
    if not args.is_lora:
        return choose(args, variant, fetch=fetch)
    chosen, _ = choose(args, replace(variant, models=VARIANTS["1024"].models), fetch=fetch)
    return replace(chosen, lora=args.lora_repo_id), variant


def _with_control(chosen: Chosen, args: argparse.Namespace, variant: Variant, fetch: bool) -> Chosen:
    """The ControlNet and the edge detector of a page that has them; says how to get what is missing."""
    if not variant.controlnets:
        return chosen
    options, notice = dict(chosen.options), chosen.notice
    control = args.controlnet
    if control is None and chosen.model != BUNDLED:  # an official ControlNet fits official models alone
        name = variant.controlnets[0]
        control = str(ROOT / name) if (ROOT / name).is_file() else _from_hub(published_file, name, fetch)[0]
    detector = args.hed or (HED if Path(HED).is_file() else _from_hub(published_file, Path(HED).name, fetch)[0])
    names = [] if control else list(variant.controlnets[:1])
    names += [] if detector else ["ControlNetHED.pth"]
    if names:
        command = f"`python tools/download.py --model_names {' '.join(names)}`"
        without = "edges cannot be followed" if control is None else "pictures must be edges already, white on black"
        notice = "\n\n".join(part for part in (notice, f"Without {' and '.join(names)} {without}: {command}") if part)
    options |= {"controlnet": control, "edge_detector": detector if control else None}
    return replace(chosen, options=options, notice=notice)


def make_artist(args: argparse.Namespace, chosen: Chosen, settings: WebSettings, *, few_steps: bool = False) -> Artist:
    """Load the pipeline where it is to draw.

    Args:
        few_steps: the page is for an LCM, see `choose_dtype`.
    Raises:
        PixArtError: a part is missing or does not fit, an unknown device or memory plan.
    """
    check_plan_name(args.memory)
    device = choose_device(args.device)
    if settings.cpu_offload and device.type != "cuda":
        raise ConfigError("ENABLE_CPU_OFFLOAD=1 needs a CUDA card; leave it out")
    options = dict(chosen.options)
    if settings.consistency_decoder and not options.get("vae"):
        options["vae"] = "openai/consistency-decoder"
    dtype = choose_dtype(args.dtype, device, few_steps=few_steps)
    pipeline = load_pipeline(chosen.model, args.pipeline_load_from, torch_dtype=dtype, **options)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        preview = LatentPreview(pipeline.vae)  # before the parts move to a device
    if chosen.lora is not None:
        fuse_into(pipeline, [chosen.lora], [])
    if settings.compile:
        pipeline.transformer.compile_blocks()
    if settings.cpu_offload:
        pipeline.enable_model_cpu_offload()
    else:
        side = settings.limits.max_side_px if device.type == "cuda" else pipeline.default_size
        side = min(side, pipeline.default_size * 2)
        pipeline.set_memory_plan(args.memory, device, Workload(side, side))
    return Artist(
        pipeline,
        preview,
        model=chosen.model,
        loras=Loras(Path(args.lora_dir)),
        limits=settings.limits,
        output=settings.output,
        keep_pictures=settings.keep_pictures,
    )
