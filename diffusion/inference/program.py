"""What the programs in scripts/ do, from parsed arguments to a folder of pictures."""

from __future__ import annotations

import argparse
import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.devices import choose_device, choose_dtype
from diffusion.errors import PromptError, first_line
from diffusion.images import decode_image
from diffusion.inference.batch import load_pipeline, read_prompts, require_at_least_1, sample_to_folder
from diffusion.inference.lora import fuse_into
from diffusion.inference.memory import ENCODE_BATCH, Workload, check_plan_name
from diffusion.inference.parallel import processes_of_start
from diffusion.inference.pipeline import PixArtPipeline
from diffusion.inference.previews import LatentPreview
from diffusion.inference.recipe import save_png
from diffusion.inference.requests import require_numbers
from diffusion.inference.shortcuts import Shortcuts
from diffusion.inference.sizes import parse_directives, read_directives
from diffusion.inference.solvers import DEFAULT_STEPS, algorithm_name
from diffusion.inference.styles import apply_style


def draw(args: argparse.Namespace) -> None:
    """Run scripts/inference.py or scripts/inference_lcm.py: arguments of `sampling_parser`.

    Raises:
        PixArtError: an argument, file or model that cannot be used, or too little memory.
    """
    ranks = processes_of_start(args.device)
    is_main = ranks is None or ranks.is_main
    if is_main:
        show_notices()
    check_plan_name(args.memory)
    lcm = hasattr(args, "sample_steps")
    algorithm = "lcm" if lcm else algorithm_name(args.sampling_algo)
    steps = args.sample_steps if lcm else DEFAULT_STEPS[algorithm] if args.step == -1 else args.step
    prompts = args.prompt or read_prompts(args.txt_file)
    settings = {"num_inference_steps": steps, "guidance_scale": args.cfg_scale, **picture_settings(args)}
    check_before_loading(args, prompts, settings)
    prompts, settings["negative_prompt"] = styled(args, prompts)
    pipeline = loaded(args, algorithm)
    usual = 1.0 if algorithm == "lcm" else pipeline.usual_guidance
    scale = settings["guidance_scale"] = usual if args.cfg_scale is None else args.cfg_scale
    pipeline.recipes(prompts[:1], seed=[0], **settings)  # refuses wrong settings before anything moves
    speed_up(pipeline, args)
    if ranks is not None:  # one plan for all: int8 and tiles change the numbers that processes share
        args.memory = ranks.on_main(lambda: set_plan(pipeline, args, scale > 1))
    if ranks is None or not is_main:
        set_plan(pipeline, args, scale > 1)
    if ranks is not None:
        pipeline.share_work(ranks, row_groups=None if scale > 1 else 1)
    date = time.strftime("%Y-%m-%d")
    name = args.save_name or f"{date}_{args.dataset}_{algorithm}_step{steps}_scale{scale:g}_seed{args.seed}"
    folder = Path(args.output or f"output/samples/{name}")
    started = time.perf_counter()
    with explained_memory(args.memory), previews(pipeline, args.preview if is_main else None, folder) as callback:
        paths, grid = sample_to_folder(
            pipeline,
            prompts,
            folder,
            model=args.model_path,
            seed=args.seed,
            batch_size=args.bs,
            num_images=args.num_images,
            grid=args.grid,
            settings=settings,
            callback_on_step_end=callback,
            free_text_encoder=True,
            ranks=ranks,
        )
    seconds = time.perf_counter() - started
    if ranks is not None:
        pipeline.end_sharing()
        ranks.close()
    if not is_main:
        return
    count = f"{len(paths)} pictures in" if len(paths) != 1 else "1 picture in"
    print(f"{count} {seconds:.1f} s ({seconds / len(paths):.2f} s each): {folder}")
    if grid is not None:
        print(f"grid: {grid}")


def check_before_loading(args: argparse.Namespace, prompts: list[str], settings: Mapping[str, Any]) -> None:
    """Refuse what needs no model to be refused, so that nobody waits for one in vain.

    Args:
        settings: of the pipeline's call.
    Raises:
        PromptError: a number that no model takes, a directive in a prompt that cannot be read, or an option without
            effect.
    """
    require_at_least_1({"--bs": args.bs, "--num_images": args.num_images, "--preview": args.preview})
    for prompt in prompts:
        read_directives(prompt)
    _require_effect(args)
    require_numbers(settings)
    lossy = {name: value for name, value in _speed_options(args).items() if name in ("guidance_until", "reuse_every")}
    Shortcuts(**lossy)


def show_notices() -> None:
    """Let notices and warnings of this package reach stderr."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("diffusion").setLevel(logging.INFO)


def picture_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline's call that shape the picture; pictures to begin from are read here."""
    image, mask, control = (
        None if path is None else decode_image(path) for path in (args.image, args.mask, args.control_image)
    )
    usual = 0.6 if args.mask is None else 1.0
    return {
        "height": args.image_size if args.height is None else args.height,
        "width": args.image_size if args.width is None else args.width,
        "use_resolution_binning": args.binning,
        "null_caption": args.null_caption,
        "clean_caption": args.clean_caption,
        "guidance_channels": args.guidance_channels,
        "image": image,
        "mask_image": mask,
        "strength": 1.0 if image is None else usual if args.strength is None else args.strength,
        "control_image": control,
        "controlnet_conditioning_scale": 1.0 if args.condition_strength is None else args.condition_strength,
    }


def _require_effect(args: argparse.Namespace) -> None:
    """Refuse options that would do nothing without the one they belong to."""
    for name in ("controlnet", "hed", "condition_strength"):
        if getattr(args, name) is not None and args.control_image is None:
            raise PromptError(f"--{name} is given without --control_image; give the picture to follow")
    if args.strength is not None and args.image is None:
        raise PromptError("--strength is given without --image; give the picture to begin from")
    if args.lora_scale and not args.lora:
        raise PromptError("--lora_scale is given without --lora; give the adapter")
    if not args.fast and (lost := _speed_options(args)):
        raise PromptError(f"--{next(iter(lost))} is given without --fast; add it")


def styled(args: argparse.Namespace, prompts: list[str]) -> tuple[list[str], str | None]:
    """Prompts and negative prompt in the asked style."""
    if args.style is None:
        return prompts, args.negative_prompt
    pairs = [apply_style(args.style, prompt, args.negative_prompt) for prompt in prompts]
    return [prompt for prompt, _ in pairs], pairs[0][1]


def loaded(args: argparse.Namespace, algorithm: str) -> PixArtPipeline:
    """The pipeline of the arguments, on the CPU."""
    pipeline = load_pipeline(
        args.model_path,
        args.pipeline_load_from,
        text_encoder=args.t5_path,
        vae=args.tokenizer_path,
        controlnet=args.controlnet,
        edge_detector=args.hed,
        algorithm=algorithm,
        ema=args.ema,
        image_size=args.image_size,
        torch_dtype=choose_dtype(args.dtype, choose_device(args.device), few_steps=algorithm == "lcm"),
    )
    pipeline.set_progress_bar_config(disable=None, leave=False)
    if args.lora:
        pipeline.fused_loras = fuse_into(pipeline, args.lora, args.lora_scale)
    return pipeline


def speed_up(pipeline: PixArtPipeline, args: argparse.Namespace) -> None:
    """Fast sampling as the arguments ask for it."""
    if args.fast:
        half = pipeline.transformer.dtype == torch.bfloat16 and choose_device(args.device).type == "cuda"
        pipeline.enable_fast_sampling(vae_bfloat16=half, **_speed_options(args))


def _speed_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of fast sampling that were given."""
    options = {name: getattr(args, name) for name in ("autotune", "fp8", "guidance_until", "reuse_every")}
    return {name: value for name, value in options.items() if value is not None and value is not False}


def set_plan(pipeline: PixArtPipeline, args: argparse.Namespace, guided: bool) -> str:
    """Give the pipeline the memory plan of the arguments, which is said on stderr with its expected peak; its name."""
    size = args.image_size or pipeline.default_size
    work = Workload(args.height or size, args.width or size, max(args.bs, 1), guided, num_captions=ENCODE_BATCH)
    return pipeline.set_memory_plan(args.memory, choose_device(args.device), work).name


@contextlib.contextmanager
def explained_memory(plan: str) -> Iterator[None]:
    """Turn a card's lack of memory into one line with what helps."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise PromptError(
            f"the card has too little memory for --memory {plan}; use --memory 4gb, a smaller --bs, or a smaller "
            f"--image_size ({first_line(error)})"
        ) from error


@contextlib.contextmanager
def previews(pipeline: PixArtPipeline, every: int | None, folder: Path) -> Iterator[Any]:
    """A callback that keeps `folder`/preview.png up to date, and removes it at the end; None when not asked for."""
    if every is None:
        yield None
        return
    show = LatentPreview(pipeline.vae)
    path = folder / "preview.png"
    folder.mkdir(parents=True, exist_ok=True)

    def callback(_: PixArtPipeline, step: int, timestep: int, state: dict[str, Tensor]) -> None:
        if (step + 1) % every == 0:
            show(state["latents"])[0].save(path)

    try:
        yield callback
    finally:
        path.unlink(missing_ok=True)


def draw_in_8_bits(args: argparse.Namespace) -> None:
    """Run scripts/infer_pixart_8_bits.py: one picture under plan 8gb, and what it took of the card."""
    show_notices()
    settings = {"num_inference_steps": args.step, "seed": args.seed}
    read_directives(args.prompt)  # what is wrong is refused before a model is loaded
    require_numbers(settings)
    device = choose_device(args.device)
    pipeline = load_pipeline(
        args.model_path, args.pipeline_load_from, algorithm="dpm-solver", torch_dtype=choose_dtype("auto", device)
    )
    pipeline.set_memory_plan("8gb", device)
    sized = parse_directives(args.prompt, pipeline.default_size)
    with explained_memory("8gb"):
        output = pipeline(sized.text, **settings, **sized.settings)
    place = Path(args.output) / "picture.png" if Path(args.output).is_dir() else Path(args.output)
    path = save_png(output.images[0], place, {**output.recipes[0], "memory": "8gb"})
    if device.type == "cuda":
        print(f"peak of allocations on the card: {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB")
    print(f"picture: {path}")
