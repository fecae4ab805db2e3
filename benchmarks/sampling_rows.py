"""Latency of one picture drawn by all processes of a start, for `scaling.py`."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from parallel_rows import free_memory
from timing import finish

TOKENS = 60  # of a caption
STEPS = 20  # of DPM-Solver++, with guidance
MODES = ("plain", "fast")  # fast: `enable_fast_sampling`


def sampling_rows(args: argparse.Namespace, ranks: Any) -> list[dict[str, Any]]:
    """A row for every way to share the work and every mode."""
    ways = {"guidance apart": 2, "tokens alone shared": 1} if ranks.world_size > 1 else {"alone": 1}
    rows = []
    pipeline = build_pipeline(args, ranks.device)
    for mode in (mode for mode in MODES if mode in args.modes):  # in this order: fast stays fast
        if mode == "fast":
            pipeline.enable_fast_sampling()
        for way, groups in ways.items():
            if ranks.world_size > 1:
                pipeline.share_work(ranks, row_groups=groups)
            rows.append(
                {"processes": ranks.world_size, "way": way, "mode": mode, **time_pictures(args, pipeline, ranks)}
            )
            if ranks.is_main:
                print(json.dumps(rows[-1]), flush=True)
    pipeline.end_sharing()
    del pipeline
    free_memory(ranks.device)
    return rows


def build_pipeline(args: argparse.Namespace, device: Any) -> Any:
    """XL/2 for 1024 px and the VAE of Stable Diffusion in bf16 with random weights, equal on all processes; no T5."""
    import torch
    from random_parts import FULL, TINY, make_transformer, make_vae
    from timing import compute_dtype

    from diffusion.inference import PixArtPipeline, make_scheduler

    size, pixels, dtype = TINY if args.tiny else FULL, 64 if args.tiny else 1024, compute_dtype(device)
    transformer = make_transformer(size, pixels, device, dtype).requires_grad_(False)
    vae = make_vae(size, pixels, device, dtype)
    if device.type == "cuda":
        vae.to(memory_format=torch.channels_last)
    pipeline = PixArtPipeline(None, None, vae, transformer, make_scheduler("dpm-solver"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def time_pictures(args: argparse.Namespace, pipeline: Any, ranks: Any) -> dict[str, Any]:
    """Milliseconds from caption embeddings to pixels on the host and to latents on the device, medians; peak memory."""
    import torch

    device, width = ranks.device, pipeline.transformer.config.caption_channels
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, TOKENS, width, generator=generator).to(device, pipeline.transformer.dtype)
    mask = torch.ones(1, TOKENS, dtype=torch.bool, device=device)
    conditions = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    conditions |= {"negative_prompt_embeds": embeds[:, :1], "negative_prompt_attention_mask": mask[:, :1]}

    def draw(output_type: str) -> Any:
        return pipeline(**conditions, num_inference_steps=STEPS, seed=0, output_type=output_type).images

    def milliseconds(work: Callable[[], object]) -> float:
        work(), work()
        seconds = []
        for _ in range(args.pictures):
            ranks.barrier()
            finish(device)
            began = time.perf_counter()
            work()
            finish(device)
            seconds.append(time.perf_counter() - began)
        return round(1000 * statistics.median(seconds), 1)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    figures: dict[str, Any] = {
        "picture_ms": milliseconds(lambda: draw("pt").cpu()),
        "latents_ms": milliseconds(lambda: draw("latent")),
    }
    latents = draw("latent").float()
    figures["rms_of_latents"] = round(latents.square().mean().sqrt().item(), 4)  # near those of one process
    if device.type == "cuda":
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return figures
