"""Speed and memory of fine-tuning PixArt XL/2: steps/s and the card's peak, at 512 and 1024 px.

    python benchmarks/bench_finetuning.py                          # one GPU
    python benchmarks/bench_finetuning.py --rows full lora --sizes 512 --batch_size 4
    python benchmarks/bench_finetuning.py --tiny --device cpu      # to see that it runs

Weights are random, features are made up, and T5 and the VAE are absent, as in training. A row is a function that gives
config keys; ROWS is the list of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import write_report

from diffusion.errors import run_cli

Keys = dict[str, Any]
_ADAPTER = {"rank": 16, "alpha": 16.0}
ROWS: dict[str, Callable[[], Keys]] = {
    "full": lambda: {},
    "lora": lambda: {"lora": _ADAPTER},
    "dora": lambda: {"lora": {**_ADAPTER, "use_dora": True}},
    "lora int8 base": lambda: {"lora": {**_ADAPTER, "base_dtype": "int8"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="what is measured (default: all)")
    add("--sizes", nargs="+", type=int, default=[512, 1024], help="px (default: 512 1024)")
    add("--batch_size", type=int, default=1, help="(default: %(default)s)")
    add("--tokens", type=int, default=120, help="tokens a caption (default: %(default)s)")
    add("--steps", type=int, default=20, help="measured, after 5 that are not (default: %(default)s)")
    add("--no_checkpointing", action="store_true", help="keep activations: faster, more memory")
    add("--device", default="cuda")
    add("--tiny", action="store_true", help="a network of 2 blocks at 64 px, 2 steps")
    add("--output", type=Path, default=Path("benchmarks/results/finetuning.json"))
    args = parser.parse_args()
    if args.tiny:
        args.sizes, args.steps, args.tokens = [64], 2, 8
    rows = [measure(args, name, size) for size in args.sizes for name in args.rows]
    write_report(args.output, {"benchmark": "fine-tuning, PixArt XL/2, bf16, AdamW", "rows": rows})


def measure(args: argparse.Namespace, name: str, size: int) -> dict[str, Any]:
    """One row at one size."""
    import torch

    from diffusion.models import build_model
    from diffusion.training.building import denoising_objective, model_options
    from diffusion.training.lora import adapt
    from diffusion.training.optimization import build_optimizer

    config = config_of(args, ROWS[name](), size)
    device = torch.device(args.device)
    torch.manual_seed(0)
    with device:
        network = build_model(config.model, **model_options(config))
    network.enable_gradient_checkpointing(1 if config.grad_checkpointing else 0)
    if config.lora is not None:
        adapt(network, config)
    network.to(device).train()
    optimizer = build_optimizer(network, config, args.batch_size)
    objective = denoising_objective(config, None)
    batch = made_up_batch(args, config, size).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = objective.loss(network, batch, config.seed).loss
        loss.backward()
        optimizer.step()

    for _ in range(1 if args.tiny else 5):
        step()
    finish(device)
    started = time.perf_counter()
    for _ in range(args.steps):
        step()
    finish(device)
    seconds = (time.perf_counter() - started) / args.steps
    row: dict[str, Any] = {"row": name, "size_px": size, "batch": args.batch_size, "steps_per_s": round(1 / seconds, 3)}
    row["trained_parameters_m"] = round(sum(p.numel() for p in network.parameters() if p.requires_grad) / 1e6, 2)
    if device.type == "cuda":
        row["device"] = torch.cuda.get_device_name()
        row["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        del network, optimizer, batch
        torch.cuda.empty_cache()
    print(row, flush=True)
    return row


def config_of(args: argparse.Namespace, keys: Keys, size: int) -> Any:
    """A training config of XL/2, which no file holds."""
    from diffusion.config import TrainConfig

    shape = {"hidden_size": 48, "num_heads": 4, "depth": 2, "caption_channels": 32} if args.tiny else {}
    return TrainConfig.model_validate(
        {
            "data": {"type": "Store", "root": "none"},
            "model": "PixArt_XL_2" if size <= 512 else "PixArtMS_XL_2",
            "image_size": size,
            "lewei_scale": size / 512,
            "mixed_precision": "bf16",
            "grad_checkpointing": not args.no_checkpointing,
            "class_dropout_prob": 0.0,
            "auto_lr": None,
            **shape,
            **keys,
        }
    )


def made_up_batch(args: argparse.Namespace, config: Any, size: int) -> Any:
    """Features of the right shapes."""
    import torch

    from diffusion.data.batch import TrainBatch

    count, side = args.batch_size, size // 8
    return TrainBatch(
        latents_mean=torch.randn(count, 4, side, side),
        latents_std=torch.full((count, 4, side, side), 0.1),
        caption_embeds=torch.randn(count, args.tokens, config.caption_channels, dtype=torch.bfloat16),
        caption_mask=torch.ones(count, args.tokens, dtype=torch.bool),
        img_hw=torch.full((count, 2), float(size)),
        aspect_ratio=torch.ones(count),
        sample_numbers=torch.arange(count),
        keys=[str(index) for index in range(count)],
    )


def finish(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_cli(main)
