"""What 64 to 1,024 GPUs would do, reckoned from what benchmarks/scaling.py measured; prints docs/scaling.md.

    python tools/scaling_model.py
    python tools/scaling_model.py --network_gb_s 25 --gpu_hours_between_failures 20000

Nothing here was run on more GPUs than the measurement names. Every assumption is an option and stands on the page.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import run_cli

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "benchmarks/results/scaling.json"
GPUS = (64, 128, 256, 512, 1024)
GRADIENT_BYTES = 4 * 610_856_096  # of XL/2, summed in float32
BUCKETS = math.ceil(GRADIENT_BYTES / (100 * 2**20))
BACKWARD_SHARE = 2 / 3  # of a step's arithmetic; communication hides behind it
# Stage, px, optimiser steps, global batch (arXiv:2310.00426, appendix, table of training stages)
STAGES = (
    ("1 pixel dependency", 256, 300_000, 128 * 8),
    ("2 alignment", 256, 150_000, 178 * 64),
    ("3 aesthetics", 256, 90_000, 178 * 64),
    ("4 aesthetics", 512, 100_000, 40 * 64),
    ("5 multi-scale", 1024, 16_000, 12 * 32),
)


@dataclass(frozen=True)
class Assumptions:
    """What one host cannot tell."""

    gpus_a_host: int = 8
    network_gb_s: float = 40.0
    hop_latency_us: float = 10.0
    gpu_hours_between_failures: float = 50_000.0
    detect_s: float = 300.0
    start_s: float = 180.0

    HELP: ClassVar[dict[str, str]] = {
        "gpus_a_host": "GPUs that share the fast links",
        "network_gb_s": "GB/s between hosts that each GPU gets; a port of 400 Gb/s a GPU carries about 40",
        "hop_latency_us": "microseconds that an all-reduce of one bucket takes a level of its tree between hosts",
        "gpu_hours_between_failures": "GPU hours between failures that end a run; 419 in 54 days on 16,384 GPUs "
        "(arXiv:2407.21783, Sec. 3.3.4) are 50,000",
        "detect_s": "seconds until a failure ends the run: health.hang_timeout_s, since a hang is the worst",
        "start_s": "seconds until the scheduler has replaced the host and all processes have imported and connected",
    }


@dataclass(frozen=True)
class Host:
    """What was measured on one host.

    fixed_s, image_s: a step of one GPU takes fixed_s + image_s a sample, by px. fitting: samples that were on a GPU at
    once. bus_gb_s: of an all-reduce among `gpus`. drag: seconds that a second of hidden communication costs. spread_s:
    standard deviation of a step, which hardly depends on the batch. wait_s, write_s, first_step_s: of a save, and of a
    start from it.
    """

    gpus: int
    fixed_s: dict[int, float]
    image_s: dict[int, float]
    fitting: dict[int, int]
    bus_gb_s: float
    drag: float
    spread_s: float
    wait_s: float
    write_s: float
    first_step_s: float

    @classmethod
    def of(cls, figures: dict[str, Any]) -> Host:
        """From the sections training and saving of scaling.json."""
        rows = figures["training"]
        fixed, image, fitting = {}, {}, {}
        for px in sorted({row["px"] for row in rows}):
            points = sorted((r["batch"], r["ms_a_step"] / 1000) for r in rows if r["processes"] == 1 and r["px"] == px)
            (few, quick), (many, slow) = points[0], points[-1]
            image[px] = (slow - quick) / (many - few)
            fixed[px] = max(0.0, slow - many * image[px])
            fitting[px] = many
        link = max(figures["all_reduce"], key=lambda row: row["processes"])
        most = link["processes"]
        drags = []
        for row in rows:
            if row["processes"] == most and row["strategy"] == "ddp":
                apart = (r["ms_a_step"] for r in rows if r["strategy"] == "apart" and r["px"] == row["px"])
                alone = next(apart, 1000 * (fixed[row["px"]] + row["batch"] * image[row["px"]]))
                talking = ring_s(most, GRADIENT_BYTES, link["bus_gb_s"])
                drags.append(max(0.0, row["ms_a_step"] - alone) / 1000 / talking)
        save = max(figures["saving"], key=lambda row: (row["processes"], row["strategy"] == "ddp"))
        return cls(
            most,
            fixed,
            image,
            fitting,
            link["bus_gb_s"],
            statistics.median(drags),
            statistics.median(row["spread"] * row["ms_a_step"] / 1000 for row in rows if row["processes"] == 1),
            save["wait_s"],
            save["on_disk_after_s"],
            save["first_step_after_s"],
        )


def ring_s(gpus: int, num_bytes: float, gb_s: float) -> float:
    """Seconds of an all-reduce at a bus bandwidth: every link carries 2 (n - 1) / n of the bytes."""
    return 2 * (gpus - 1) / gpus * num_bytes / gb_s / 1e9


def all_reduce_s(host: Host, assumed: Assumptions, gpus: int) -> float:
    """Seconds that the gradients of a step take: summed within hosts, between them (a GPU's share each), and back."""
    within = min(gpus, assumed.gpus_a_host)
    hosts = math.ceil(gpus / within)
    latency = BUCKETS * 2 * math.log2(hosts) * assumed.hop_latency_us * 1e-6
    between = ring_s(hosts, GRADIENT_BYTES / within, assumed.network_gb_s)
    return ring_s(within, GRADIENT_BYTES, host.bus_gb_s) + between + latency


def step_s(host: Host, assumed: Assumptions, gpus: int, px: int, batch: int) -> float:
    """Seconds of a step of DDP with `batch` samples a GPU, accumulated where they do not fit.

    Communication drags on the backward pass that hides it, what does not fit behind it is waited for, and all wait for
    the slowest: of n normal draws the largest lies about sqrt(2 ln n) deviations above the mean.
    """
    parts = math.ceil(batch / host.fitting[px])
    micro = host.fixed_s[px] + host.image_s[px] * batch / parts
    hidden_by, talking = BACKWARD_SHARE * micro, all_reduce_s(host, assumed, gpus)
    exposed = host.drag * min(talking, hidden_by) + max(0.0, talking - hidden_by)
    slowest = math.sqrt(2 * math.log(gpus)) - math.sqrt(2 * math.log(max(host.gpus, 2)))
    return parts * micro + exposed + max(0.0, slowest) * host.spread_s


def share_lost(host: Host, assumed: Assumptions, gpus: int) -> tuple[float, float]:
    """Share of the time that saves and failures take, and the seconds between saves at which it is least.

    Young's interval sqrt(2 wait x time between failures), but never less than a save takes to be written. A failure
    costs half an interval, its detection, and a start.
    """
    between = assumed.gpu_hours_between_failures * 3600 / gpus
    interval = max(math.sqrt(2 * host.wait_s * between), host.write_s)
    restart = assumed.detect_s + assumed.start_s + host.first_step_s
    return min(1.0, host.wait_s / interval + (interval / 2 + restart) / between), interval


def reckoned(host: Host, assumed: Assumptions) -> list[dict[str, Any]]:
    """A row for every stage and number of GPUs."""
    rows = []
    for stage, px, steps, global_batch in (stage for stage in STAGES if stage[1] in host.fitting):
        best = host.fitting[px] / (host.fixed_s[px] + host.image_s[px] * host.fitting[px])  # images/s of one GPU
        for gpus in GPUS:
            batch = math.ceil(global_batch / gpus)
            seconds = step_s(host, assumed, gpus, px, batch)
            lost, _ = share_lost(host, assumed, gpus)
            # Steps that are larger than the paper's, since a GPU has one sample at least, are fewer.
            wanted = steps * global_batch / (batch * gpus)
            days = wanted * seconds / (1 - lost) / 86400
            rows.append(
                {
                    "stage": stage,
                    "px": px,
                    "GPUs": gpus,
                    "batch a GPU": batch,
                    "global batch": batch * gpus,
                    "step, s": f"{seconds:.3f}",
                    "scaling": f"{batch / seconds / best:.1%}",
                    "days": f"{days:.2f}",
                    "GPU days": f"{days * gpus:.0f}",
                    "lost to saves and failures": f"{lost:.2%}",
                }
            )
    return rows


def table(rows: list[dict[str, Any]], names: list[str] | None = None) -> str:
    """Markdown."""
    names = names or list(rows[0])
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(str(row.get(name, '')) for name in names)} |" for row in rows]
    return "\n".join(lines) + "\n"


METHOD = """# Many GPUs: measured on one host, reckoned beyond

<!-- written by tools/scaling_model.py through tools/write_docs.py; change what they read, not this page -->

    python benchmarks/scaling.py            # one host with 1, 2, 4 and 8 GPUs, or --processes 1 2
    python tools/scaling_model.py --help    # 64 to 1,024 GPUs from it, under assumptions that are its options

## How it is reckoned

A step of one GPU takes a fixed time and a time a sample, from two batch sizes. The gradients of XL/2 (2.44 GB in
float32, in 24 buckets) are summed within each host, where GPUs copy from each other, and between hosts by NCCL, every
GPU its share. The first is taken to last as long as NCCL's all-reduce at its measured bus bandwidth, the second
follows from an assumed one. While the backward pass (two thirds of a step) hides this, it slows the step by the
measured drag: what DDP added on the host to a step of all GPUs "apart" (at once, without communication), for each
second of communication. What the backward pass cannot hide is waited for. All wait for the slowest GPU, by the
measured spread of steps (the median standard deviation of one GPU's rows). Saves are as far apart as costs least
(Young: the root of twice the wait of a save times the time between failures); a failure costs half of that, its
detection, and a start, whose last part is measured. Batches and steps are those of the paper's stages; where a GPU
would have less than one sample the global batch grows and the steps become fewer in proportion, which the paper did
not try. Stage 1 (a DiT) is counted as a PixArt of the same size.

Not in it: the file system, which has to feed all hosts (about 0.5 MB of features a sample at 256 px), networks whose
bandwidth shrinks with distance, and hosts that fail together.
"""


def page(figures: dict[str, Any] | None, assumed: Assumptions) -> str:
    """docs/scaling.md."""
    if figures is None or not {"training", "saving", "all_reduce"} <= figures.keys():
        return (
            f"{METHOD}\n## Measured\n\nNot yet: `benchmarks/results/scaling.json` does not exist, or lacks a section.\n"
        )
    host = Host.of(figures)
    commands = ", ".join(f"`python {command}`" for command in dict.fromkeys(figures["commands"].values()))
    names = ["processes", "strategy", "px", "batch", "images_per_s", "scaling", "communication_share"]
    names += ["exposed_communication_share", "peak_gib"]
    note = f"\n{figures['note']}.\n" if figures.get("note") else ""
    parts = [METHOD, f"## Measured\n\n{figures['device']}; {commands}\n{note}", table(figures["training"], names)]
    parts += [table(figures[section]) for section in ("all_reduce", "saving", "sampling") if figures.get(section)]
    values = [{"assumption": text, "value": getattr(assumed, name)} for name, text in assumed.HELP.items()]
    parts.append(
        f"## Reckoned, not run\n\nFrom {host.gpus} GPUs of one host: drag {host.drag:.2f}, spread of steps "
        f"{1000 * host.spread_s:.1f} ms. A save every {share_lost(host, assumed, 1024)[1] / 60:.0f} minutes on 1,024 "
        f"GPUs, every {share_lost(host, assumed, 64)[1] / 60:.0f} on 64.\n"
    )
    rows = reckoned(host, assumed)
    return "\n".join([*parts, table(values), table(rows) if rows else "No size of a stage was measured.\n"])


def measured(path: Path = MEASURED) -> dict[str, Any] | None:
    """The figures of scaling.py, or None."""
    figures: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return figures


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--measured", type=Path, default=MEASURED, help="result of benchmarks/scaling.py")
    for name, text in Assumptions.HELP.items():
        default = getattr(Assumptions, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    args = parser.parse_args()
    assumed = Assumptions(**{name: getattr(args, name) for name in Assumptions.HELP})
    sys.stdout.write(page(measured(args.measured), assumed))


if __name__ == "__main__":
    run_cli(main)
