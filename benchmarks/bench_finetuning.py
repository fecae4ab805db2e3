"""Speed and memory of fine-tuning PixArt XL/2: steps/s and the card's peak, at 512 and 1024 px.

    python benchmarks/bench_finetuning.py                          # one GPU
    python benchmarks/bench_finetuning.py --no_checkpointing --output benchmarks/results/finetuning_kept.json
    python benchmarks/bench_finetuning.py --no_checkpointing --compile --cuda_graph \
        --output benchmarks/results/finetuning_fast.json
    python benchmarks/bench_finetuning.py --rows full lora --no_checkpointing --compile --cuda_graph --kernels \
        --profile --batch_size 1 --output benchmarks/results/finetuning_small.json
    python benchmarks/bench_finetuning.py --tiny --device cpu      # to see that it runs

Weights are random, features are made up, and T5 and the VAE are absent, as in training. A row is a family: DreamBooth
and train_diffusers.py train as "full" or "lora" do. Bar: a step of "lora" takes at most 0.75 of one of "full".
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from pathlib import Path
from typing import Any

from report import write_report

from diffusion.errors import run_cli

_ADAPTER = {"rank": 16, "alpha": 16.0}
ROWS: dict[str, dict[str, Any]] = {  # config keys of each
    "full": {},
    "lora": {"lora": _ADAPTER},
    "dora": {"lora": {**_ADAPTER, "use_dora": True}},
    "lora int8 base": {"lora": {**_ADAPTER, "base_dtype": "int8"}},
    "lcm": {},
    "lcm lora": {"lora_rank": 16},
    "controlnet": {},
    "dmd": {},
}
LORA_SHARE = 0.75
KERNELS = {"attention": "auto", "bf16_stream": True, "fused": True}  # exact ones that ran in recordings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="what is measured (default: all)")
    add("--sizes", nargs="+", type=int, default=[512, 1024], help="px (default: 512 1024)")
    add("--batch_size", type=int, default=4, help="pictures a step at 512 px, elsewhere as many tokens (%(default)s)")
    add("--tokens", type=int, default=120, help="tokens a caption (default: %(default)s)")
    add("--steps", type=int, default=20, help="measured, after 5 that are not (default: %(default)s)")
    add("--compile", action="store_true", help="torch.compile the blocks, as compile=True of a config")
    add("--cuda_graph", action="store_true", help="launch each pass as one recording, as cuda_graph=True of a config")
    add("--kernels", action="store_true", help=f"the fast exact kernels: {KERNELS}")
    add("--profile", action="store_true", help="milliseconds by kind of kernel, and the largest, of each row")
    add("--no_checkpointing", action="store_true", help="keep activations: faster, more memory")
    add("--device", default="cuda")
    add("--tiny", action="store_true", help="a network of 2 blocks at 64 px, 2 steps")
    add("--output", type=Path, default=Path("benchmarks/results/finetuning.json"))
    args = parser.parse_args()
    if args.tiny:
        args.sizes, args.steps, args.tokens = [64], 2, 8
    rows: list[dict[str, Any]] = []
    for size in args.sizes:
        for name in args.rows:
            rows.append(measure(args, name, size))
            write(args, rows)  # after each, so that none is lost where time runs out


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Rows that are measured so far, and whether they keep the bar."""
    speeds = {(row["row"], row["size_px"]): row["steps_per_s"] for row in rows}
    bars = {
        f"{size} px: a step of lora takes at most {LORA_SHARE} of a full one": speeds["full", size]
        <= LORA_SHARE * speeds["lora", size]
        for size in args.sizes
        if {("full", size), ("lora", size)} <= speeds.keys()
    }
    kept = "all kept" if args.no_checkpointing else "recomputed, block by block"
    write_report(
        args.output,
        {
            "benchmark": "fine-tuning, PixArt XL/2, bf16, AdamW",
            "activations": kept,
            "compiled": args.compile,
            "recorded": args.cuda_graph,
            "kernels": KERNELS if args.kernels else None,
            "rows": rows,
            "bars": bars,
        },
    )


def measure(args: argparse.Namespace, name: str, size: int) -> dict[str, Any]:
    """One row at one size."""
    import torch
    from kernel_classes import profile_step

    from diffusion.training.optimization import build_optimizer
    from diffusion.training.parallel import choose_kernels, compile_blocks_of
    from diffusion.training.recorded_passes import RecordedPasses

    config = config_of(args, ROWS[name], size)
    device = torch.device(args.device)
    gc.collect()  # recordings and networks refer to each other, and would count towards the next row's peak
    torch.manual_seed(0)
    network, objective = build(name, config, device)
    network.train()
    choose_kernels(network, config, device)
    compile_blocks_of(network, config)
    optimizer = build_optimizer(network, config, batch_of(args, size))
    batch = made_up_batch(args, config, size).to(device)
    count = len(batch.keys)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def compute(given: Any) -> Any:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = objective.loss(network, given, config.seed).loss
        loss.backward()
        return loss.detach()

    passes = RecordedPasses(compute, network.parameters(), args.tokens)
    key = objective.choices(batch) if args.cuda_graph else None

    def step() -> None:
        passes.run(batch, key, is_first=True)
        optimizer.step()

    for _ in range(1 if args.tiny else 5):
        step()
    finish(device)
    started = time.perf_counter()
    for _ in range(args.steps):
        step()
    finish(device)
    seconds = (time.perf_counter() - started) / args.steps
    row: dict[str, Any] = {"row": name, "size_px": size, "batch": count, "steps_per_s": round(1 / seconds, 3)}
    row["trained_parameters_m"] = round(sum(p.numel() for p in network.parameters() if p.requires_grad) / 1e6, 2)
    if device.type == "cuda":
        row["device"] = torch.cuda.get_device_name()
        row["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print(row, flush=True)
    if args.profile:
        row["profile"] = profile_step(step, device)
    return row


def build(name: str, config: Any, device: Any) -> tuple[Any, Any]:
    """Network and objective of a family, on the device, around random weights; teachers are copies of them."""
    from diffusion.adapters import adapters_off, start_lora
    from diffusion.models import ControlPixArt, build_model
    from diffusion.models.kernels import use_kernels
    from diffusion.objectives import ControlObjective, DistributionMatching, OneStepNetworks, Roles
    from diffusion.training.building import denoising_objective, model_options
    from diffusion.training.distillation import consistency_objective
    from diffusion.training.lora import adapt
    from diffusion.training.parallel import compile_blocks_of, kernels_of

    with device:
        network = build_model(config.model, **model_options(config))
    network.enable_gradient_checkpointing(1 if config.grad_checkpointing else 0)
    base = denoising_objective(config, None)

    def frozen() -> Any:
        twin = copy.deepcopy(network).requires_grad_(False).eval()
        use_kernels(twin, kernels_of(config), device)
        compile_blocks_of(twin, config)
        return twin

    if name == "controlnet":
        return ControlPixArt(network, config.copy_blocks_num).to(device), ControlObjective(**vars(base))
    if name == "dmd":
        teacher = frozen()
        objective: Any = DistributionMatching(**vars(base), teacher=teacher)
        return OneStepNetworks(network, copy.deepcopy(network)), objective
    if name == "lcm":
        objective = consistency_objective(config, None)
        objective.roles = Roles(frozen(), frozen())
        return network, objective
    if name == "lcm lora":
        start_lora(network.requires_grad_(False), config.lora_rank, alpha=config.lora_rank)
        objective = consistency_objective(config, None)
        objective.roles = Roles(None, None, adapters_off)
        return network.to(device), objective
    if config.lora is not None:
        adapt(network, config)
    return network.to(device), base


def config_of(args: argparse.Namespace, keys: dict[str, Any], size: int) -> Any:
    """A training config of XL/2, which no file holds."""
    from diffusion.config import TrainConfig

    shape: dict[str, Any] = {}
    if args.tiny:
        shape = {"hidden_size": 48, "num_heads": 4, "depth": 2, "caption_channels": 32, "copy_blocks_num": 1}
    return TrainConfig.model_validate(
        {
            "data": {"type": "Store", "root": "none"},
            "model": "PixArt_XL_2" if size <= 512 else "PixArtMS_XL_2",
            "image_size": size,
            "lewei_scale": size / 512,
            "mixed_precision": "bf16",
            "grad_checkpointing": not args.no_checkpointing,
            "compile": args.compile,
            "kernels": KERNELS if args.kernels else {},
            "class_dropout_prob": 0.0,
            "auto_lr": None,
            **shape,
            **keys,
        }
    )


def batch_of(args: argparse.Namespace, size: int) -> int:
    """Pictures a step."""
    return 1 if args.tiny else max(1, args.batch_size * 512**2 // size**2)


def made_up_batch(args: argparse.Namespace, config: Any, size: int) -> Any:
    """Features of the right shapes."""
    import torch

    from diffusion.data.batch import TrainBatch

    count, side = batch_of(args, size), size // 8
    return TrainBatch(
        latents_mean=torch.randn(count, 4, side, side),
        latents_std=torch.full((count, 4, side, side), 0.1),
        caption_embeds=torch.randn(count, args.tokens, config.caption_channels, dtype=torch.bfloat16),
        caption_mask=torch.ones(count, args.tokens, dtype=torch.bool),
        img_hw=torch.full((count, 2), float(size)),
        aspect_ratio=torch.ones(count),
        sample_numbers=torch.arange(count),
        keys=[str(index) for index in range(count)],
        control_mean=torch.randn(count, 4, side, side),
        control_std=torch.full((count, 4, side, side), 0.1),
    )


def finish(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_cli(main)
