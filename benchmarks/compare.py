"""One row of the performance table: ours, diffusers eager and diffusers + torch.compile, in one process, in turns.

    python benchmarks/compare.py train-256
    python benchmarks/compare.py sample-1024 --windows 9
    python benchmarks/compare.py cpu-sample
    python benchmarks/compare.py sample-256 --tiny --device cpu --output /tmp/row.json

Networks have XL/2's shapes and random weights, or in rows `cpu-*` are the bundled model. Each arm first finds its best
setting, then all are timed in turns; prints a table and writes a JSON with device, versions and command. The FLOP
formula is in benchmarks/flops.py; "share" is the part of the rate of a square matrix product measured in the same run.
Cold starts have a program of their own, benchmarks/cold_start.py.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from report import write_report

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import ConfigError, did_you_mean, run_cli

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "output/pretrained_models/emoji-256"
TOKENS = 120
ROOM_FOR_ALL = 120 * 10**9  # bytes of a card on which all training arms' states leave room for the largest step
PEERS = ("diffusers", "diffusers-compile")


@dataclass(frozen=True)
class Row:
    """What is measured: kind ("train" or "sample"), size in px, solver, steps, guidance, batches to choose from.

    float32: the precision of all arms; else a card, and a CPU that has its products, trains in bfloat16.
    fp8: an arm of ours in FP8, which is lossy, takes part.
    """

    kind: str
    pixels: int
    batches: tuple[int, ...]
    algorithm: str = "dpm-solver"
    steps: int = 20
    guidance: float = 4.5
    bundled: bool = False
    float32: bool = False
    fp8: bool = False

    @property
    def arms(self) -> tuple[str, ...]:
        return ("ours", *(["ours-fp8"] if self.fp8 else []), *PEERS)

    @property
    def title(self) -> str:
        if self.kind == "train":
            return f"training step, {self.pixels} px"
        return f"prompt to pixels, {self.pixels} px, {self.steps} steps of {self.algorithm}, guidance {self.guidance:g}"


ROWS = {
    "train-256": Row("train", 256, (64, 96, 128), fp8=True),
    "train-512": Row("train", 512, (16, 24, 32), fp8=True),
    "train-1024": Row("train", 1024, (4, 6, 8), fp8=True),
    "sample-256": Row("sample", 256, (1,)),
    "sample-512": Row("sample", 512, (1,)),
    "sample-1024": Row("sample", 1024, (1,), fp8=True),
    "lcm-1024": Row("sample", 1024, (1,), "lcm", 4, 1.0),
    "throughput-512": Row("sample", 512, (4, 8, 16, 32)),
    "cpu-train": Row("train", 256, (8, 16), bundled=True),
    "cpu-train-float32": Row("train", 256, (8, 16), bundled=True, float32=True),
    "cpu-sample": Row("sample", 256, (1,), bundled=True),
    "cpu-lcm": Row("sample", 256, (1,), "lcm", 4, 1.0, bundled=True),  # an LCM has the shapes of its teacher
    "cpu-throughput": Row("sample", 256, (1, 2, 4), bundled=True),
}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("row", help=f"row of the table: {', '.join(ROWS)}")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/compare_ROW.json; levers_ROW.json with other arms"
    )
    add = parser.add_argument_group("arms").add_argument
    add(
        "--arms",
        nargs="+",
        help="in this order; ours and its variants (ours-eager, ...), diffusers, diffusers-compile (default: the "
        "row's: ours, where FP8 has a bar ours-fp8, and the peers)",
    )
    add("--batches", type=int, nargs="+", help="pictures a call to choose from, for each arm (default: the row's)")
    add(
        "--peer-compile",
        nargs="+",
        help="how diffusers is compiled, the best is kept: block or whole (training), modes of torch.compile "
        "(sampling); default: block whole; reduce-overhead; on a CPU default",
    )
    add = parser.add_argument_group("timing").add_argument
    add("--windows", type=int, default=5, help="timed windows an arm")
    add("--seconds", type=float, default=2.0, help="least length of a window")
    add("--warm-up", type=int, default=3, help="calls before an arm is timed")
    add("--search-s", type=float, default=300.0, help="time for all searches of a setting, compilation included")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto takes the GPU; rows cpu-* the CPU")
    add("--threads", type=int, help="CPU threads; torch's choice when absent")
    add("--tiny", action="store_true", help="networks of some thousand weights at 64 px, to try the program")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.row not in ROWS:
        raise ConfigError(f"row {args.row!r} does not exist; {did_you_mean(args.row, list(ROWS))}")
    if args.tiny and args.output is None:
        raise ConfigError("--tiny measures nothing of worth; give its figures a place with --output")
    row = ROWS[args.row]
    args.arms = args.arms or row.arms
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args, row, Path(folder))
    print(table(figures))
    kind = "compare" if tuple(args.arms) == row.arms else "levers"
    write_report(args.output or ROOT / f"benchmarks/results/{kind}_{args.row}.json", figures)


def measure(args: argparse.Namespace, row: Row, folder: Path) -> dict[str, Any]:
    """The row's figures, as the JSON holds them."""
    import torch
    from abab import compare

    from diffusion.devices import choose_device, matmul_rate

    device = torch.device("cpu") if row.bundled else choose_device(args.device)
    precision = precision_of(row, device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    # One compilation a shape: a second batch must not turn the first one's kernels into slower ones for any batch.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64
    torch.set_float32_matmul_precision("high")
    began = time.monotonic()
    arms, flops, error = (training if row.kind == "train" else sampling)(args, row, folder, device)
    side = 8192 if device.type == "cuda" else 1024
    rates = [matmul_rate(device, side, precision)]
    results = compare(
        arms, device, windows=args.windows, warm_up=args.warm_up, seconds=args.seconds,
        park=row.kind == "train" and memory_of(device) < ROOM_FOR_ALL,
        search_s=args.search_s - (time.monotonic() - began),
    )  # fmt: skip
    rates.append(matmul_rate(device, side, precision))
    rate = max(rates)
    rows = [figures_of(result, flops, rate, row.kind) for result in results]
    return {
        "benchmark": f"{row.title}; {'tiny networks' if args.tiny else 'bundled model' if row.bundled else 'XL/2'}",
        "row": args.row,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(precision).removeprefix("torch."),
        "gflop_a_picture": round(flops / 1e9, 3),
        "matmul_tflops": [round(value / 1e12, 3) for value in rates],
        "matmul_tflops_best": round(rate / 1e12, 3),
        "largest_difference_of_arms": error,
        "kernels": {arm.name: kernels_of(arm.network) for arm in arms if hasattr(arm, "network")},
        "ratios": ratios(rows),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "rows": rows,
    }


def memory_of(device: Any) -> int:
    """Bytes of a card; 0 for a CPU."""
    import torch

    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def precision_of(row: Row, device: Any) -> Any:
    """The precision of matrix products in all arms of a row."""
    import torch
    from timing import compute_dtype

    from diffusion.devices import cpu_multiplies_bfloat16

    if row.float32:
        return torch.float32
    if row.kind == "train" and row.bundled and cpu_multiplies_bfloat16():
        return torch.bfloat16
    return compute_dtype(device)


def kernels_of(network: Any) -> dict[str, Any]:
    """What a network of ours computes with: `Kernels`, in which "auto" has been decided."""
    return next(asdict(module.kernels) for module in network.modules() if hasattr(module, "kernels"))


def figures_of(result: Any, flops: float, rate: float, kind: str) -> dict[str, Any]:
    """One line of the table."""
    per_second = result.setting.batch / result.median
    done = flops * per_second
    return {
        "arm": result.name,
        "setting": str(result.setting),
        "images_per_s": float(f"{per_second:.5g}"),
        "ms_a_call": round(1000 * result.median, 3),
        "spread": round(result.spread, 4),
        "tflops": float(f"{done / 1e12:.4g}"),
        "share": round(done / rate, 4),
        "peak_gib": round(result.peak_bytes / 2**30, 2) if result.peak_bytes else None,
        "warm_up_s": result.warm_up_s,
        "tried": result.tried,
        "seconds": [round(value, 5) for value in result.seconds],
    }


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Pictures a second of the first arm over each other's, and of FP8 over those of the peers."""
    pairs = [(rows[0], other) for other in rows[1:]]
    pairs += [(row, peer) for row in rows[1:] if row["arm"] == "ours-fp8" for peer in rows if peer["arm"] in PEERS]
    return {f"{a['arm']} / {b['arm']}": round(a["images_per_s"] / b["images_per_s"], 4) for a, b in pairs}


def training(args: argparse.Namespace, row: Row, folder: Path, device: Any) -> tuple[list[Any], int, float]:
    """Arms, FLOPs a picture, and how far the networks are apart on one input."""
    from flops import training_flops
    from random_parts import FULL, TINY, Size
    from training_arms import OURS, DiffusersNetwork, DiffusersTraining, OurTraining, disagreement, random_batch

    bundled = Size((384, 0, 0), {"hidden_size": 256, "depth": 10, "num_heads": 4}, (), 0)
    precision = precision_of(row, device)
    size, pixels, tokens = (TINY, 64, 16) if args.tiny else (bundled if row.bundled else FULL, row.pixels, TOKENS)
    batches = args.batches or ((2, 4) if args.tiny else row.batches)
    peer = args.peer_compile or (["block"] if row.bundled or args.tiny else ["block", "whole"])
    if set(peer) - {"block", "whole"}:
        raise ConfigError(f"--peer-compile {' '.join(peer)}: training rows know block and whole")
    arms: list[Any] = []
    shared: Any = None
    network: Any = None
    for name in args.arms:
        if name in OURS:
            arms.append(OurTraining(name, size, pixels, tokens, settings(batches), folder, device, precision))
            network = network or arms[-1].network
        elif name in PEERS:
            if network is None:
                raise ConfigError(f"--arms {' '.join(args.arms)}: an arm of ours must come first; {', '.join(OURS)}")
            shared = shared or DiffusersNetwork(network, device, precision)
            given = settings(batches, peer if name.endswith("compile") else [""])
            arms.append(DiffusersTraining(name, shared, pixels, tokens, given))
        else:
            raise unknown_arm(name, [*OURS, *PEERS])
    batch = random_batch(1, pixels, tokens, size.text[0], device)
    error = disagreement(network, shared.model, batch, device) if shared is not None else 0.0
    flops = training_flops(network.config, (pixels // 16) ** 2, tokens)
    return arms, flops, float(f"{error:.3g}")


def sampling(args: argparse.Namespace, row: Row, folder: Path, device: Any) -> tuple[list[Any], int, float]:
    """Arms, FLOPs a picture, and how far the arms' first pictures are apart."""
    from random_parts import FULL, TINY
    from sampling_arms import OUR_ARMS, DiffusersSampling, OurSampling, Parts, Task, largest_difference, prompt_of, work
    from timing import compute_dtype

    pixels, dtype = (64 if args.tiny else row.pixels), compute_dtype(device)
    if row.bundled and not args.tiny:
        parts, prompt = Parts.of_folder(str(BUNDLED), device, dtype), "grinning face with big eyes"
    else:
        parts = Parts.random(TINY if args.tiny else FULL, pixels, device, dtype)
        prompt = prompt_of(parts.tokenizer, TOKENS)
    task = Task(pixels, prompt, row.algorithm, 2 if args.tiny else row.steps, row.guidance)
    batches = args.batches or row.batches
    peer = args.peer_compile or (["reduce-overhead"] if device.type == "cuda" else ["default"])
    arms: list[Any] = []
    for name in args.arms:
        if name in OUR_ARMS:
            arms.append(OurSampling(name, parts, task, settings(batches)))
        elif name in PEERS:
            modes = peer if name.endswith("compile") else [""]
            arms.append(DiffusersSampling(name, parts, task, settings(batches, modes)))
        else:
            raise unknown_arm(name, [*OUR_ARMS, *PEERS])
    return arms, work(parts, task, TOKENS), largest_difference(parts, task)


def settings(batches: Any, compiled: Any = ("",)) -> list[Any]:
    from abab import Setting

    return [Setting(batch, how) for how in compiled for batch in batches]


def unknown_arm(name: str, known: list[str]) -> ConfigError:
    return ConfigError(f"--arms {name} does not exist; {did_you_mean(name, known)}")


def table(figures: dict[str, Any]) -> str:
    """The rows as aligned text."""
    columns = ("setting", "images_per_s", "ms_a_call", "spread", "tflops", "share", "peak_gib")
    lines = [f"\n{figures['benchmark']}; {figures['device']}, matmul {figures['matmul_tflops_best']} TFLOP/s"]
    lines.append(
        f"{'arm':20}" + "".join(f"{column:>26}" if column == "setting" else f"{column:>14}" for column in columns)
    )
    for row in figures["rows"]:
        cells = (f"{row[c]!s:>26}" if c == "setting" else f"{row[c]!s:>14}" for c in columns)
        lines.append(f"{row['arm']:20}" + "".join(cells))
    lines += [f"{name}: {value:.3f}x" for name, value in figures["ratios"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
