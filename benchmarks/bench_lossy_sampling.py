"""What lossy sampling options cost: PSNR (and LPIPS) to the exact picture, and retrieval, on a trained model.

    python benchmarks/bench_lossy_sampling.py --limit 16
    python benchmarks/bench_lossy_sampling.py --device cuda --dtype bfloat16 --lpips_weights vgg.pth

Every caption is drawn without and with each option, from the same noise. Retrieval is the share of drawings whose
nearest real picture is the one asked for (picture) or shows the same concept; see docs/bundled-model.md. Where there
are no FP8 products they are emulated, with the same rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from report import write_report

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import run_cli

OPTIONS: dict[str, dict[str, Any]] = {
    "fast, exact": {},
    "fp8": {"fp8": True},
    "VAE in bfloat16": {"vae_bfloat16": True},
    "guidance in 3/4 of the steps": {"guidance_until": 0.75},
    "guidance in half the steps": {"guidance_until": 0.5},
    "all blocks in every 2nd step": {"reuse_every": 2},
    "all blocks in every 3rd step": {"reuse_every": 3},
}


def build_parser() -> ArgumentParser:
    """Command-line arguments."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", default="output/pretrained_models/emoji-256", help="pipeline folder")
    add("--data", default="data/emoji", help="real pictures to find the drawings among")
    add("--split", default="heldout", help="whose captions are drawn")
    add("--limit", type=int, default=32, help="captions, evenly spaced")
    add("--steps", type=int, default=20, help="of DPM-Solver++")
    add("--bs", type=int, default=16, help="pictures at a time")
    add("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS), help="rows of the table")
    add("--lpips_weights", type=Path, help="state dict of lpips.LPIPS(net='vgg'); no LPIPS when absent")
    add("--device", default="auto", help="cpu, cuda or auto")
    add("--dtype", default="auto", help="of the network: auto, float32, bfloat16 or float16")
    add("--out", type=Path, default=Path("benchmarks/results/lossy_sampling.json"), help="JSON file of the figures")
    return parser


def psnr(first: Any, second: Any) -> Any:
    """Decibels between two batches (B, 3, H, W) in [-1, 1], one a picture."""
    return 10 * (4 / (first - second).square().mean((1, 2, 3)).clamp(min=1e-12)).log10()


def load_lpips(path: Path | None, device: Any) -> Any:
    """The network with its weights, or None."""
    if path is None:
        return None
    import torch

    from diffusion.models.lpips import LPIPS

    network = LPIPS().eval().to(device)
    network.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    return network


def main() -> None:
    args = build_parser().parse_args()
    import torch

    from diffusion.devices import choose_device, choose_dtype
    from diffusion.evaluation.drawing import DrawingSettings, caption_of, draw, judge, spread
    from diffusion.evaluation.retrieval import load_gallery, to_pixels
    from diffusion.inference import PixArtPipeline

    device = choose_device(args.device)
    gallery, lpips = load_gallery(args.data), load_lpips(args.lpips_weights, device)
    rows = spread(gallery.split(args.split), args.limit)
    captions = [caption_of(gallery.samples[row], "label") for row in rows]
    settings = DrawingSettings(args.steps, batch_size=args.bs)

    def drawn(options: dict[str, Any] | None) -> list[Any]:
        pipeline = PixArtPipeline.from_pretrained(
            args.model, algorithm="dpm-solver", device=device, torch_dtype=choose_dtype(args.dtype, device)
        )
        pipeline.set_progress_bar_config(disable=True)
        if options is not None:
            pipeline.enable_fast_sampling(**options)
        return draw(pipeline, captions, settings)

    def figures(name: str, pictures: list[Any], exact: Any) -> dict[str, Any]:
        found = judge(gallery, name, rows, captions, pictures).figures
        pixels = to_pixels(pictures).float() * 2 - 1
        line = {key: found[key] for key in ("picture_r1", "picture_r5", "concept_r1", "sharpness")}
        if exact is not None:
            decibels = psnr(pixels, exact)
            line |= {
                "psnr_db_median": round(decibels.median().item(), 2),
                "psnr_db_min": round(decibels.min().item(), 2),
            }
        if exact is not None and lpips is not None:
            with torch.no_grad():
                pairs = zip(pixels.split(args.bs), exact.split(args.bs))
                distances = torch.cat([lpips(*(part.to(device) for part in pair)).cpu() for pair in pairs])
            line["lpips_median"] = round(distances.median().item(), 4)
        return {"name": name, **line}

    pictures = drawn(None)
    lines = [figures("exact", pictures, None)]
    exact = to_pixels(pictures).float() * 2 - 1
    for name in args.options:
        lines.append(figures(name, drawn(OPTIONS[name]), exact))
        print(lines[-1], flush=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    result = {"benchmark": f"{len(rows)} captions of {args.split}, {settings}", "device": name}
    write_report(args.out, {**result, "rows": lines})


if __name__ == "__main__":
    run_cli(main)
