"""Fast sampling on one CUDA card, lever by lever: that graphs draw the loop's pictures, and what each lever gains.

    python benchmarks/check_fast_sampling.py --out benchmarks/results/fast_sampling.json
    python benchmarks/check_fast_sampling.py --tiny --device cpu --out /tmp/fast.json

PixArt XL/2 and the VAE of Stable Diffusion with random weights, prompts of 120 tokens as embeddings. Times are medians
of whole calls, the device's work included. What is random here has no quality: PSNR of lossy levers on a trained model
is measured by bench_lossy_sampling.py.
"""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import write_report

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import first_line, run_cli

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """One size and solver."""

    pixels: int
    algorithm: str = "dpm-solver"
    steps: int = 20
    guidance: float = 4.5


ROWS = {
    "256": Row(256),
    "512": Row(512),
    "1024": Row(1024),
    "1024-lcm": Row(1024, "lcm", 4, 1.0),
}
# Lever by lever; None = the pipeline as it comes.
ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "loop": {"graph": False, "compile": False},
    "graph": {"compile": False},
    "compiled loop": {"graph": False, "compile": True},
    "compiled graph": {"compile": True},
    "compiled graph, bf16 VAE": {"compile": True, "vae_bfloat16": True},
    "autotuned graph, bf16 VAE": {"compile": True, "autotune": True, "vae_bfloat16": True},
    "fp8 (lossy)": {"compile": True, "vae_bfloat16": True, "fp8": True},
    "guidance in half the steps (lossy)": {"compile": True, "vae_bfloat16": True, "guidance_until": 0.5},
    "blocks in every 2nd step (lossy)": {"compile": True, "vae_bfloat16": True, "reuse_every": 2},
}
# A graph and the loop it was recorded from.
PAIRS = (("loop", "graph"), ("compiled loop", "compiled graph"))


def build_parser() -> ArgumentParser:
    """Command-line arguments."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "benchmarks/results/fast_sampling.json", help="JSON file of the figures")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="sizes and solvers")
    add("--arms", nargs="+", choices=ARMS, default=[name for name in ARMS if "autotuned" not in name], help="levers")
    add("--repeats", type=int, default=5, help="timed calls an arm")
    add("--stream", type=int, default=6, help="batches of 8 pictures of 512 px for the throughput row; 0 = none")
    add("--device", default="cuda", help="cuda, or cpu with --tiny")
    add("--tiny", action="store_true", help="networks of a few thousand weights and 64 px, to try this program")
    return parser


def make_pipeline(args: Any, row: Row, pixels: int) -> Any:
    """A pipeline without T5, on the device; network in bfloat16, VAE in float32."""
    import torch
    from random_parts import FULL, TINY, make_transformer, make_vae

    from diffusion.inference import PixArtPipeline, make_scheduler

    size = TINY if args.tiny else FULL
    network = make_transformer(size, pixels, args.device, torch.bfloat16)
    vae = make_vae(size, pixels, args.device, torch.float32)
    pipeline = PixArtPipeline(None, None, vae, network, make_scheduler(row.algorithm))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompt(pipeline: Any, seed: int, batch: int = 1) -> dict[str, Any]:
    """Arguments of a call that stand for prompts of 120 tokens and a null caption of one."""
    import torch

    width = pipeline.transformer.config.caption_channels
    embeds = torch.randn(batch, 120, width, generator=torch.Generator().manual_seed(seed))
    return {
        "prompt_embeds": embeds,
        "prompt_attention_mask": torch.ones(batch, 120, dtype=torch.bool),
        "negative_prompt_embeds": embeds[:1, :1],
        "negative_prompt_attention_mask": torch.ones(1, 1, dtype=torch.bool),
        "seed": list(range(seed, seed + batch)),
    }


def measure(args: Any, row: Row, settings: Mapping[str, Any] | None) -> tuple[dict[str, Any], list[Any]]:
    """Figures of one arm, and its latents of three prompts."""
    import torch
    from timing import timed

    device = torch.device(args.device)
    pixels = 64 if args.tiny else row.pixels
    pipeline = make_pipeline(args, row, pixels)
    if settings is not None:
        pipeline.enable_fast_sampling(**settings)
    options = {
        "height": pixels,
        "width": pixels,
        "num_inference_steps": row.steps,
        "guidance_scale": row.guidance,
        "output_type": "pt",
    }
    calls = [prompt(pipeline, seed) for seed in range(3)]
    first = [timed(device, lambda: pipeline(**calls[0], **options)) for _ in range(2)]
    latents = [pipeline(**call, **{**options, "output_type": "latent"}).images.float().cpu() for call in calls]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def median(**changed: Any) -> float:
        times = [timed(device, lambda: pipeline(**calls[1], **{**options, **changed})) for _ in range(args.repeats)]
        return round(1000 * statistics.median(times), 3)

    whole, denoising = median(), median(output_type="latent")
    figures = {
        "picture_ms": whole,
        "denoising_ms": denoising,
        "decoding_ms": round(whole - denoising, 3),
        "first_call_s": round(first[0], 3),
        "second_call_s": round(first[1], 3),
        "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 3) if device.type == "cuda" else None,
        "graphs": 0 if pipeline._fast is None else pipeline._fast.solver_graphs.num_recorded,
    }
    return figures, latents


def reference(args: Any, row: Row) -> Any:
    """Latents of the first prompt by the network in float32."""
    pixels = 64 if args.tiny else row.pixels
    pipeline = make_pipeline(args, row, pixels)
    pipeline.transformer.float()
    options = {"height": pixels, "width": pixels, "num_inference_steps": row.steps, "guidance_scale": row.guidance}
    return pipeline(**prompt(pipeline, 0), **options, output_type="latent").images.cpu()


def throughput(args: Any) -> dict[str, Any]:
    """Pictures a second of 512 px in batches of 8, decoded after each batch or beside the next."""
    import torch
    from timing import timed

    row, batch = ROWS["512"], 2 if args.tiny else 8
    pixels = 64 if args.tiny else row.pixels
    pipeline = make_pipeline(args, row, pixels)
    pipeline.enable_fast_sampling(compile=None, vae_bfloat16=True)
    options = {"height": pixels, "width": pixels, "num_inference_steps": 2 if args.tiny else row.steps}
    calls = [{**prompt(pipeline, index, batch), **options} for index in range(args.stream)]
    for call in calls[:2] * 2:
        pipeline(**call)
    device = torch.device(args.device)

    def after_each() -> None:
        for call in calls:
            pipeline(**call)

    def beside() -> None:
        for _ in pipeline.stream(calls):
            pass

    ways: dict[str, Callable[[], None]] = {"decoded after each batch": after_each, "decoded beside the next": beside}
    return {name: round(batch * len(calls) / timed(device, way), 3) for name, way in ways.items()}


def run_row(args: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each arm's figures; errors are relative, of the latents of a network in float32 without any lever."""
    import torch
    from random_parts import relative_error

    exact = reference(args, ROWS[name])
    drawn: dict[str, list[Any]] = {}
    for arm in args.arms:
        if args.device == "cuda":
            torch.cuda.empty_cache()
        try:
            figures, drawn[arm] = measure(args, ROWS[name], ARMS[arm])
        except (RuntimeError, AssertionError) as error:  # the other arms are worth their time
            traceback.print_exc()
            yield arm, {"failed": first_line(error)}
            continue
        figures["error"] = float(f"{relative_error(drawn[arm][0], exact):.3g}")
        for loop, graph in PAIRS:
            if arm == graph and loop in drawn:
                figures["equals_loop"] = all(torch.equal(*pair) for pair in zip(drawn[graph], drawn[loop]))
        yield arm, figures


def main() -> None:
    args = build_parser().parse_args()
    import torch

    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    result: dict[str, Any] = {"benchmark": "fast sampling, batch 1, random weights", "device": device, "rows": {}}
    equal: list[bool] = []
    for name in args.rows:
        result["rows"][name] = rows = {}
        for arm, figures in run_row(args, name):
            rows[arm] = figures
            equal += [figures["equals_loop"]] if "equals_loop" in figures else []
            print(name, arm, figures, flush=True)
        write_report(args.out, result)  # a program that is cut off leaves what it has
    if args.stream:
        result["pictures a second, 512 px, batch 8"] = throughput(args)
    result["all graphs equal their loops"] = all(equal) if equal else None
    write_report(args.out, result)


if __name__ == "__main__":
    run_cli(main)
