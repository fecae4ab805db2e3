"""What a checkpoint costs training: the wait when it is written meanwhile or in the background, and slower steps.

    python benchmarks/bench_saving.py
    python benchmarks/bench_saving.py --device cpu --width 576 --batch 2

A network with averages and AdamW's moments is saved several times each way; "wait" is what the training loop loses, the
least of all saves. Then a run trains on random features and saves as runs do. Its loss a save is the wait and how much
longer than others the steps take that a write falls into, since on a CPU the writer takes a core of the training. The
wait for its first save is listed by itself: the memory that it copies to was allocated during the first steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import write_report
from timed_training import TimedTrainer, make_config, write_features
from timing import finish

from diffusion.config import load_config
from diffusion.devices import cpu_multiplies_bfloat16
from diffusion.models import PixArt
from diffusion.ranks import Ranks
from diffusion.training import Reporting, denoising_objective
from diffusion.training.optimization import WeightAverage
from diffusion.training.saving import Saver
from diffusion.training.state import RunState

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768, help="of the network")
    parser.add_argument("--depth", type=int, default=12, help="blocks of the network")
    parser.add_argument("--saves", type=int, default=5, help="saves each way")
    parser.add_argument("--batch", type=int, default=8, help="pictures a step of the run that trains")
    parser.add_argument(
        "--steps", type=int, help="steps between two saves of it, longer than a write (20; on a GPU 100)"
    )
    parser.add_argument("--image-size", type=int, default=256, help="of its pictures")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the system's temporary folder")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/saving.json, on a CPU saving_cpu.json")
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


@dataclass
class Step:
    """Seconds of a step, and whether a checkpoint was being written at its begin or end."""

    seconds: float
    disturbed: bool


class SavingTrainer(TimedTrainer):
    """Times all steps, too: `steps[n]` are those after n saves, whose waits are in `waits_s`."""

    saves = "last"

    def _build_saver(self) -> Any:
        self.saver = super()._build_saver()
        self.steps: list[list[Step]] = [[]]
        return self.saver

    def _train_step(self, *arguments: Any) -> Any:
        disturbed, begin = self.saver.is_writing(), time.perf_counter()
        verdict = super()._train_step(*arguments)
        finish(self.ranks.device)
        self.steps[-1].append(Step(time.perf_counter() - begin, disturbed or self.saver.is_writing()))
        return verdict

    def _save(self, saver: Any, request: Any) -> None:
        super()._save(saver, request)
        self.steps.append([])


def cost_in_a_run(args: argparse.Namespace, ranks: Ranks, folder: Path) -> dict[str, float]:
    """What a save costs a run that trains; its first save and its last are left out."""
    write_features(folder / "store", args.batch, args.image_size, 64)
    on_card = ranks.device.type == "cuda"
    config = make_config(
        folder / "store",
        args.image_size,
        args.batch,
        args.steps * (args.saves + 2),
        caption_channels=64,
        hidden_size=args.width,
        depth=args.depth,
        num_heads=args.width // 64,
        mixed_precision="bf16" if on_card or cpu_multiplies_bfloat16() else "no",
        kernels={"attention": "auto"},
        num_workers=0,
        save_model_steps=args.steps,
        checkpoints_total_limit=2,
    )
    reporting = Reporting(tensorboard=False)
    trainer = SavingTrainer(config, denoising_objective, folder / "run", reporting=reporting, ranks=ranks)
    trainer.fit()
    quiet = trainer.steps[0][1:]  # before the first save; the first step of all warms up
    first = {"first_wait_s": round(trainer.waits_s[0], 3)}
    return first | summary(quiet, trainer.waits_s[1:-1], trainer.steps[2:-1])


def summary(quiet: list[Step], waits_s: list[float], after: list[list[Step]]) -> dict[str, float]:
    """Medians over saves, with the steps after each; steps that no write disturbed say how long a step takes."""
    undisturbed = [step for steps in after for step in steps if not step.disturbed]
    step = statistics.median(step.seconds for step in quiet + undisturbed)
    disturbed = [[step.seconds for step in steps if step.disturbed] for steps in after]
    slower = statistics.median(sum(seconds) - step * len(seconds) for seconds in disturbed)
    wait = statistics.median(waits_s)
    lost = wait + max(slower, 0.0)
    return {
        "step_s": round(step, 4),
        "steps_during_a_write": statistics.median(map(len, disturbed)),
        "wait_s": round(wait, 3),
        "slower_steps_s": round(slower, 3),
        "lost_a_save_s": round(lost, 3),
        "share_with_a_save_every_10_minutes": round(lost / (600 + lost), 5),
        "seconds_between_saves_that_cost_5_percent": round(lost / 0.05),
    }


def main() -> None:
    args = parse_arguments()
    ranks = Ranks(args.device)
    device = ranks.device
    args.steps = args.steps or (100 if device.type == "cuda" else 20)
    state = build_state(args.width, args.depth, device)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        synchronous = waits(state, Path(name) / "waiting", args.saves, in_background=False)
        size = sum(
            path.stat().st_size for path in (Path(name) / f"waiting/checkpoints/checkpoint-{args.saves}").rglob("*")
        )
        background = waits(state, Path(name) / "background", args.saves, in_background=True)
        count = sum(parameter.numel() for parameter in state.network.parameters())
        del state
        run = cost_in_a_run(args, ranks, Path(name))
    waiting, copying = min(synchronous), min(background)  # other programs can only make it longer
    figures = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "parameters_m": round(count / 1e6, 1),
        "checkpoint_mb": round(size / 1e6),
        "synchronous_wait_s": round(waiting, 3),
        "background_wait_s": round(copying, 3),
        "share_of_the_synchronous_wait": round(copying / waiting, 4),
        "saves": args.saves,
        "in_a_run": {"batch": args.batch, "steps_between_saves": args.steps, **run},
    }
    default = ROOT / f"benchmarks/results/saving{'_cpu' if device.type == 'cpu' else ''}.json"
    write_report(args.out or default, figures)


if __name__ == "__main__":
    main()
