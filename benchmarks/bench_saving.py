"""How long training waits for a checkpoint: written while it waits, and written in the background.

    python benchmarks/bench_saving.py

A network with averages and AdamW's moments is saved several times each way; "wait" is what the training loop loses, the
least of all saves. The first save in the background also allocates the copy in host memory and is listed by itself.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from report import write_report

from diffusion.config import load_config
from diffusion.models import PixArt
from diffusion.ranks import Ranks
from diffusion.training.optimization import WeightAverage
from diffusion.training.saving import Saver
from diffusion.training.state import RunState

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768, help="of the network")
    parser.add_argument("--depth", type=int, default=12, help="blocks of the network")
    parser.add_argument("--saves", type=int, default=5, help="saves each way")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the system's temporary folder")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/saving.json")
    return parser.parse_args()


def build_state(width: int, depth: int, device: torch.device) -> RunState:
    """A state whose moments exist."""
    network = PixArt(hidden_size=width, num_heads=width // 64, depth=depth).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return RunState(network, optimizer, torch.amp.GradScaler(device.type, enabled=False), WeightAverage(network, 0.99))


def waits(state: RunState, folder: Path, saves: int, *, in_background: bool) -> list[float]:
    """Seconds that the training loop loses with each save; the next one begins when the disk is done with the last."""
    folder.mkdir(parents=True)
    (folder / "config.py").write_text("data = dict(type='Store', root='x')\ncheckpoints_total_limit = 2\n")
    config = load_config(folder / "config.py", [f"save_async={in_background}"], notify=lambda line: None)
    saver = Saver(config, Ranks("cpu"), state, folder, {}, 1, 1, last_step=0, resumed_from=None)
    lost = []
    for state.step in range(1, saves + 1):
        begin = time.perf_counter()
        saver.save({}, checkpoint=True)
        lost.append(time.perf_counter() - begin)
        saver.settle()
    saver.finish()
    return lost


def main() -> None:
    args = parse_arguments()
    device = Ranks(args.device).device
    state = build_state(args.width, args.depth, device)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        synchronous = waits(state, Path(name) / "waiting", args.saves, in_background=False)
        size = sum(
            path.stat().st_size for path in (Path(name) / f"waiting/checkpoints/checkpoint-{args.saves}").rglob("*")
        )
        background = waits(state, Path(name) / "background", args.saves, in_background=True)
    waiting, copying = min(synchronous), min(background)  # other programs can only make it longer
    figures = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "parameters_m": round(sum(parameter.numel() for parameter in state.network.parameters()) / 1e6, 1),
        "checkpoint_mb": round(size / 1e6),
        "synchronous_wait_s": round(waiting, 3),
        "background_wait_s": round(copying, 3),
        "first_background_wait_s": round(background[0], 3),
        "share_of_the_synchronous_wait": round(copying / waiting, 4),
        "saves": args.saves,
    }
    write_report(args.out, figures)


if __name__ == "__main__":
    main()
