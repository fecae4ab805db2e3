"""Memory plans at full size on one CUDA card: peak, time a prompt, and whether plans agree, with random weights.

    python benchmarks/bench_memory_plans.py --out benchmarks/results/memory_plans.json
    python benchmarks/bench_memory_plans.py --tiny --device cpu --out /tmp/plans.json

T5-XXL (4.76 B), PixArt XL/2 1024-MS and the VAE of Stable Diffusion, each row in a process of its own. A capped row may
not take more of the card than its cap, the CUDA context included (1 GB = 1e9 bytes).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from random_parts import FULL, TINY, make_text_encoder, make_transformer, make_vae
from report import write_report

from diffusion.errors import run_cli

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = (
    "a small cactus with a happy face in the Sahara desert",
    "an old lighthouse on a cliff in heavy rain, oil painting",
    "a red fox reading a newspaper in a cafe",
    "portrait of an astronaut, studio light, 85 mm",
)
CONTEXT_GB = 0.9  # kept free below a cap for the CUDA context, which grows while kernels are loaded (0.83 were seen)


@dataclass(frozen=True)
class Row:
    """One line of the table; plan None = all parts stay on the card; "offload" = diffusers' model offload."""

    plan: str | None
    cap_gb: float | None = None
    batch: int = 1
    dtype: str = "bfloat16"


ROWS = {
    "full": Row("full", cap_gb=13.0),
    "full x4": Row("full", cap_gb=11.0, batch=4),
    "4gb": Row("4gb", cap_gb=4.0),
    "8gb": Row("8gb", cap_gb=7.5),
    "resident": Row(None),
    "offload": Row("offload"),
    "full-fp16": Row("full", dtype="float16"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "benchmarks/results/memory_plans.json")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="rows of the table; 'full' is what others equal")
    add("--size", type=int, help="px (default 1024; 64 with --tiny)")
    add("--steps", type=int, default=20, help="of DPM-Solver++ (default 20)")
    add("--repeats", type=int, default=3, help="timed prompts after the first (default 3)")
    add("--device", default="cuda")
    add("--tiny", action="store_true", help="networks of a few thousand weights, to try this program")
    add("--timeout_s", type=int, default=150, help="of one row (default 150)")
    add("--child", help=argparse.SUPPRESS)  # the row that this process runs; --out is then its folder
    return parser


def build_pipeline(args: argparse.Namespace, row: Row) -> Any:
    """Random full-size (or tiny) parts: made on the device, kept on the CPU."""
    import torch

    from diffusion.inference import PixArtPipeline, make_scheduler
    from diffusion.text import make_float16_safe

    size, dtype = TINY if args.tiny else FULL, getattr(torch, row.dtype)
    torch.manual_seed(1)  # for the initial weights of T5
    tokenizer, text_encoder = make_text_encoder(size, args.device, dtype)
    text_encoder = make_float16_safe(text_encoder.cpu())
    if not args.tiny:
        assert sum(p.numel() for p in text_encoder.parameters()) == 4_762_310_656
    transformer = make_transformer(size, args.size, args.device, dtype).cpu()
    vae = make_vae(size, args.size, args.device, torch.float32).cpu()
    return PixArtPipeline(tokenizer, text_encoder, vae, transformer, make_scheduler("dpm-solver"))


def place(pipeline: Any, row: Row, device: Any) -> dict[str, float]:
    """Put the parts where the row wants them; returns the expected peak of each stage in GB."""
    if row.plan is None:
        pipeline.to(device)
    elif row.plan == "offload":
        if device.type == "cuda":
            pipeline.enable_model_cpu_offload(device=device)
    else:
        from diffusion.inference.memory import PLANS, Workload

        size = pipeline.default_size
        work = Workload(size, size, pictures=row.batch, num_captions=row.batch + 1)
        stages = pipeline.expected_peak(PLANS[row.plan], device, work)
        pipeline.set_memory_plan(row.plan, device, work)
        return {stage: round(num_bytes / 1e9, 2) for stage, num_bytes in stages.items()}
    return {}


def measure(pipeline: Any, args: argparse.Namespace, batch: int, folder: Path) -> dict[str, Any]:
    """Peak since the last reset, and seconds a call, of `batch` pictures of one prompt each."""
    import torch

    cuda = args.device.startswith("cuda")
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for repeat in range(args.repeats + 1):
        started = time.perf_counter()
        prompts = [PROMPTS[(repeat + index) % len(PROMPTS)] for index in range(batch)]
        images = pipeline(prompts, seed=repeat, num_inference_steps=args.steps, output_type="pt").images
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    result = {
        "first_s": round(times[0], 2),
        "seconds": round(sorted(times[1:])[len(times[1:]) // 2], 3),
        "finite": bool(torch.isfinite(images).all()),
    }
    if cuda:
        free, total = torch.cuda.mem_get_info()
        context = total - free - torch.cuda.memory_reserved()
        result |= {
            "context_gb": round(context / 1e9, 2),
            "peak_gb": round((torch.cuda.max_memory_reserved() + context) / 1e9, 2),
            "peak_allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        }
    if batch == 1:
        latents = pipeline(PROMPTS[0], seed=0, num_inference_steps=args.steps, output_type="latent").images
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        embeds = pipeline.encode_captions([PROMPTS[0]])[0]
        if cuda:
            result["text_allocated_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        torch.save({"latents": latents.cpu(), "embeds": embeds.float().cpu()}, folder / f"{args.child}.pt")
    return result


def run_row(args: argparse.Namespace) -> None:
    """The work of one process: results into `args.out`/ROW.json."""
    import logging

    import torch

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    row, device = ROWS[args.child], torch.device(args.device)
    started = time.perf_counter()
    pipeline = build_pipeline(args, row)
    pipeline.set_progress_bar_config(disable=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the parts were made in
        free, total = torch.cuda.mem_get_info()
        print(f"{args.child}: {(total - free) / 1e9:.2f} GB of the card are taken before the first allocation")
        if row.cap_gb is not None:
            torch.cuda.set_per_process_memory_fraction((row.cap_gb - CONTEXT_GB) * 1e9 / total)
    built = time.perf_counter()
    expected = place(pipeline, row, device)
    facts = {
        "cap_gb": row.cap_gb,
        "expected_peak_gb": expected,
        "build_s": round(built - started, 1),
        "place_s": round(time.perf_counter() - built, 1),
    }
    result = {**facts, **measure(pipeline, args, row.batch, args.out)}
    if row.cap_gb is not None and "peak_gb" in result:
        result["within_cap"] = result["peak_gb"] <= row.cap_gb
    (args.out / f"{args.child}.json").write_text(json.dumps(result))


def compare(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Latents and caption embeddings of each row against those of `full`."""
    import torch

    saved = {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}
    if "full" not in saved:
        return {}
    result = {}
    for name in [name for name in names if name in saved and name != "full"]:
        entry: dict[str, Any] = {}
        for key in ("latents", "embeds"):
            ours, theirs = saved[name][key].float(), saved["full"][key].float()
            entry[f"{key}_equal"] = torch.equal(ours, theirs)
            entry[f"{key}_error"] = float(f"{((ours - theirs).norm() / theirs.norm()).item():.3g}")
        result[name] = entry
    return result


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The figures as aligned text."""
    columns = ("completes", "peak_gb", "cap_gb", "within_cap", "seconds", "first_s", "latents_equal", "embeds_error")
    lines = [f"{'row':12}" + "".join(f"{column:>15}" for column in columns)]
    lines += [f"{name:12}" + "".join(f"{row.get(column)!s:>15}" for column in columns) for name, row in rows.items()]
    return "\n".join(lines)


def bars(rows: dict[str, dict[str, Any]]) -> dict[str, bool | None]:
    """What is promised, checked; None = not measured."""

    def figure(name: str, key: str) -> Any:
        return rows.get(name, {}).get(key)

    def at_most(name: str, limit: float) -> bool | None:
        if figure(name, "completes") is False:
            return False
        peak = figure(name, "peak_gb")
        return None if peak is None else peak <= limit

    both = figure("4gb", "seconds"), figure("full", "seconds")
    return {
        "4gb completes within 4.0 GB": at_most("4gb", 4.0),
        "8gb completes within 7.5 GB": at_most("8gb", 7.5),
        "full takes at most 13 GB": at_most("full", 13.0),
        "batch of 4 takes at most 11 GB": at_most("full x4", 11.0),
        "4gb is at most 1.5 s slower a prompt than full": None if None in both else both[0] - both[1] <= 1.5,
        "latents of full and 4gb are bit-equal": figure("4gb", "latents_equal"),
    }


def main() -> None:
    args = build_parser().parse_args()
    args.size = args.size or (64 if args.tiny else 1024)
    if args.child:
        run_row(args)
        return
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = ["--size", args.size, "--steps", args.steps, "--repeats", args.repeats, "--device", args.device]
        options += ["--tiny"] if args.tiny else []
        for row in args.rows:
            command = [sys.executable, __file__, "--child", row, "--out", folder, *options]
            try:
                done = subprocess.run([str(part) for part in command], timeout=args.timeout_s)
                failure = f"exit code {done.returncode}" if done.returncode else None
            except subprocess.TimeoutExpired:
                failure = f"took over {args.timeout_s} s"
            if failure is None:
                rows[row] = {"completes": True, **json.loads((folder / f"{row}.json").read_text())}
            else:
                rows[row] = {"completes": False, "failure": failure}
            print(json.dumps({row: rows[row]}), flush=True)
            for key, comparison in compare(folder, args.rows).items():
                rows[key] |= comparison
            report(args, rows)  # after every row: a call that is cut off leaves those it has
    print(table(rows))


def report(args: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    """Write the rows measured so far, and what they say of the bars."""
    sizes = "tiny networks" if args.tiny else "T5-XXL, PixArt XL/2 1024-MS, SD VAE"
    figures = {"benchmark": f"memory plans, {sizes}, random weights, {args.size} px, {args.steps} steps"}
    write_report(args.out, {**figures, "device": device_name(args.device), "bars": bars(rows), "rows": rows})


def device_name(device: str) -> str:
    """The card's name, or the device's."""
    import torch

    try:
        return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    except (RuntimeError, AssertionError):
        return f"{device}: {traceback.format_exc(limit=0).strip()}"


if __name__ == "__main__":
    run_cli(main)
