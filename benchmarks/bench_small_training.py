"""Where a step of the bundled model's training goes: host or device, and what other ways to compile gain.

    python benchmarks/bench_small_training.py                                   # on one GPU, about three minutes
    python benchmarks/bench_small_training.py --tiny --device cpu --output /tmp/small.json

configs/emoji/emoji_256.py on a random batch that lies on the device, each arm in a process of its own. "busy" is the
time of all kernels over that of a step; what is missing to 1 is the host, which launches them. Medians of six windows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partialmethod
from pathlib import Path
from typing import Any

from report import write_report

from diffusion.errors import run_cli

CONFIG = Path(__file__).resolve().parents[1] / "configs/emoji/emoji_256.py"
TOKENS = 16  # of a caption
ARMS: dict[str, dict[str, Any]] = {
    "as configured": {},
    "eager": {"compile": False},
    "AdamW": {"optimizer": {"type": "AdamW", "lr": 1e-4}},
    "Muon waits": {"skip_on_host": True},
    "CUDA graphs of blocks": {"mode": "reduce-overhead"},
    "captions packed": {"kernels": {"attention": "auto", "text": "packed", "bf16_stream": True}},
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tiny", action="store_true", help="a small network, to try this program")
    add("--device", default="auto", help="auto takes a GPU (default: %(default)s)")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="(default: all)")
    add("--batch-size", type=int, default=512, help="samples a step (default: %(default)s)")
    add("--steps", type=int, default=60, help="timed steps (default: %(default)s)")
    add("--output", "--out", type=Path, default=Path("benchmarks/results/small_training.json"))
    add("--arm", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.arm:
        print("\n" + json.dumps(run_arm(args)))
        return
    rows = {}
    for arm in args.arms:
        command = [sys.executable, *sys.argv, "--arm", arm]
        done = subprocess.run(command, env={"OMP_NUM_THREADS": "4", **os.environ}, stdout=subprocess.PIPE, text=True)
        failed = {"failed": f"exit {done.returncode}"}
        rows[arm] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else failed
        shown = {name: value for name, value in rows[arm].items() if name != "kernels"}
        print(arm, json.dumps(shown), flush=True)
    device = next((row["device"] for row in rows.values() if "device" in row), None)
    write_report(args.output, {"benchmark": "emoji_256, a step", "device": device, "rows": rows})


def run_arm(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a step, kernels by what they do, peak memory."""
    import torch
    from kernel_classes import profile_step
    from timed_training import write_features
    from timing import timed
    from training_arms import SteppedTrainer, random_batch

    from diffusion.config import TrainConfig, load_config
    from diffusion.models.latent_transformer import LatentTransformer
    from diffusion.ranks import Ranks
    from diffusion.training import Reporting, denoising_objective

    options = dict(ARMS[args.arm])
    waits = options.pop("skip_on_host", False)
    if mode := options.pop("mode", None):
        usual = LatentTransformer.compile_blocks
        LatentTransformer.compile_blocks = partialmethod(usual, mode=mode)  # type: ignore[method-assign,assignment]
    ranks, values = Ranks(args.device), load_config(CONFIG).model_dump()
    on_card, pixels, channels = ranks.device.type == "cuda", values["image_size"], values["caption_channels"]
    batch, repeats, windows = (2, 1, 2) if args.tiny else (args.batch_size, args.steps // 6, 6)
    with tempfile.TemporaryDirectory() as folder:
        write_features(Path(folder) / "store", 2, pixels, channels)
        values |= {"data": {"type": "Store", "root": f"{folder}/store"}, "pipeline_load_from": None, "validation": {}}
        values |= {"train_batch_size": 1, "max_steps": 10**6, "num_workers": 0, **options}
        if args.tiny:
            values |= {"hidden_size": 32, "depth": 2, "num_heads": 2}
        if not on_card:
            values |= {"mixed_precision": "no", "kernels": {**values["kernels"], "bf16_stream": False}}
        trainer = SteppedTrainer(
            TrainConfig.model_validate(values), denoising_objective, Path(folder) / "run",
            reporting=Reporting(tensorboard=False), ranks=ranks,
        )  # fmt: skip
    if waits:  # the host then reads whether the step counts before it launches the update
        trainer.state.optimizer._step_supports_amp_scaling = False
    trainer.begin()
    batches = itertools.repeat(random_batch(batch, pixels, TOKENS, channels, ranks.device))

    def step() -> Any:
        return trainer.step_on(batches)

    first_s = timed(ranks.device, lambda: [step() for _ in range(3)])
    seconds = [timed(ranks.device, lambda: [step() for _ in range(repeats)]) / repeats for _ in range(windows)]
    median = 1000 * statistics.median(seconds)
    kernels = profile_step(step, ranks.device)
    return {
        "ms_a_step": round(median, 2),
        "spread_ms": round(1000 * (max(seconds) - min(seconds)), 2),
        "busy": round(kernels["ms_a_step_all"] / median, 3) if on_card else None,
        "first_three_steps_s": round(first_s, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_card else None,
        "device": torch.cuda.get_device_name() if on_card else "cpu",
        "kernels": kernels,
    }


if __name__ == "__main__":
    run_cli(main)
