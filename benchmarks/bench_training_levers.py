"""What each lever of the training step gains on this card: kernels of `config.kernels`, compilation, FP8.

    python benchmarks/bench_training_levers.py --pixels 256 512 --minutes 8.5 --out output/levers.json
    python benchmarks/bench_training_levers.py --tiny --device cpu --minutes 3 --out /tmp/levers.json

Parts: `attention`, a table of kernels, widths and shapes; `levers`, one trainer of XL/2 whose blocks change kernels in
turns (A B C A B C), so that all arms share weights, data and the state of the card; `profile`, the time of a step by
kind of kernel. A time limit ends the search for more arms; what is done is written after each part.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from report import write_report

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import first_line, run_cli

PARTS = ("attention", "levers", "profile")
_EXACT = {"attention": "auto", "text": "spare", "bf16_stream": True}
# Arms by name: compiled or not, `Kernels`, FP8 recipe. Exact ones first; "exact" is all that is exact together.
ARMS: dict[str, tuple[bool, dict[str, Any], str | None]] = {
    "eager": (False, {}, None),
    "compile": (True, {}, None),
    "bf16 stream": (True, {"bf16_stream": True}, None),
    "attention": (True, {"attention": "auto"}, None),
    "fa4": (True, {"attention": "fa4", "head_width": 96}, None),
    "spare": (True, {"attention": "auto", "text": "spare"}, None),
    "packed": (True, {"attention": "auto", "text": "packed"}, None),
    "fused, eager": (False, {"fused": True, "bf16_stream": True}, None),
    "fused": (True, {"fused": True}, None),
    "quack": (True, {"mlp": "quack"}, None),
    "exact": (True, _EXACT, None),
    "exact, quack": (True, {**_EXACT, "mlp": "quack"}, None),
    "exact, fused": (True, {**_EXACT, "fused": True}, None),
    "exact, all": (True, {**_EXACT, "fused": True, "mlp": "quack"}, None),
    "exact, packed": (True, {**_EXACT, "text": "packed"}, None),
    "exact, fused, direct": (True, {**_EXACT, "fused": True, "text": "direct"}, None),
    "exact, all, direct": (True, {**_EXACT, "fused": True, "mlp": "quack", "text": "direct"}, None),
    "exact, fused, fa4": (True, {**_EXACT, "fused": True, "attention": "fa4", "head_width": 96}, None),
    "exact, all, fa4": (True, {**_EXACT, "fused": True, "mlp": "quack", "attention": "fa4", "head_width": 96}, None),
    "fp8 rowwise": (True, _EXACT, "rowwise"),
    "fp8 rowwise, fused": (True, {**_EXACT, "fused": True}, "rowwise"),
    "fp8 rowwise, fused, direct": (True, {**_EXACT, "fused": True, "text": "direct"}, "rowwise"),
    "fp8 tensorwise": (True, _EXACT, "tensorwise"),
}
PROFILED = (
    "compile", "exact", "exact, fused", "exact, all", "exact, all, direct", "exact, all, fa4", "fp8 rowwise",
    "fp8 rowwise, fused", "fp8 rowwise, fused, direct",
)  # fmt: skip
BATCHES = {256: 128, 512: 32, 1024: 8}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="what to measure (default: all)")
    parser.add_argument("--pixels", nargs="+", type=int, default=[256, 512], help="picture sides (default: 256 512)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="arms to measure (default: all)")
    parser.add_argument("--batch-size", type=int, help="samples a step (default: 128, 32, 8 at 256, 512, 1024 px)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a window (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=5, help="windows of each arm (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.5, help="no arm is begun later (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a small network, to try the benchmark itself")
    parser.add_argument("--device", default="auto", help="auto takes the GPU (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("output/levers.json"), help="JSON (default: %(default)s)")
    args = parser.parse_args()
    args.until = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


def measure(args: argparse.Namespace, folder: Path) -> None:
    from attention_table import measure_attention
    from timing import compute_dtype

    from diffusion.devices import matmul_rate
    from diffusion.ranks import Ranks

    ranks = Ranks(args.device)
    size = 256 if args.tiny else 8192
    figures: dict[str, Any] = {"benchmark": f"levers of training, {'tiny network' if args.tiny else 'XL/2'}"}
    rate = matmul_rate(ranks.device, size, compute_dtype(ranks.device))
    figures |= {"device": device_name(ranks.device), "matmul_tflops": round(rate / 1e12, 2)}
    if "attention" in args.parts:
        figures["attention"] = measure_attention(ranks.device, repeats=2 if args.tiny else 20, tiny=args.tiny)
        write_report(args.out, figures)
    for pixels in args.pixels:
        if time.monotonic() < args.until and {"levers", "profile"} & set(args.parts):
            measure_levers(args, folder / str(pixels), pixels, ranks, figures)
            write_report(args.out, figures)


def device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def measure_levers(args: argparse.Namespace, folder: Path, pixels: int, ranks: Any, figures: dict[str, Any]) -> None:
    """Windows of all arms in turns, on one trainer; figures of a size are put into `figures` as they come."""
    bench = Bench(args, folder, pixels, ranks)
    result: dict[str, Any] = {"batch": bench.batch_size}
    figures[f"{pixels} px"] = result
    arms: list[str] = []
    for name in args.arms:  # compile and warm up
        if time.monotonic() > args.until and arms:
            result.setdefault("not measured", []).append(name)
            continue
        began = time.monotonic()
        try:
            bench.switch(name)
            loss = [bench.step().item() for _ in range(3)]
        except Exception as error:  # an arm that cannot run must not cost the others their figures
            result[name] = {"error": f"{type(error).__name__}: {first_line(error)[:200]}"}
            print(f"{name}: {result[name]}", flush=True)
            bench.free()
            continue
        arms.append(name)
        result[name] = {"warm_up_s": round(time.monotonic() - began, 1), "loss": round(loss[-1], 4)}
        print(f"{pixels} px, {name}: {result[name]}", flush=True)
    if "levers" in args.parts:
        time_in_turns(bench, arms, args, result)
    if "profile" in args.parts:
        profile_arms(bench, [name for name in PROFILED if name in arms] or arms[:1], result)
    bench.close()


def time_in_turns(bench: Bench, arms: list[str], args: argparse.Namespace, result: dict[str, Any]) -> None:
    import torch
    from timing import timed

    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.windows):
        for name in arms:
            bench.switch(name)
            bench.step()
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds[name].append(timed(bench.device, lambda: [bench.step() for _ in range(args.steps)]) / args.steps)
            if bench.device.type == "cuda":
                result[name]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    for name, values in seconds.items():
        median = statistics.median(values)
        images = round(bench.batch_size / median, 2)
        result[name] |= {
            "images_per_s": images,
            "ms_a_step": round(1e3 * median, 2),
            "spread_ms": round(1e3 * (max(values) - min(values)), 2),
        }
        if "compile" in seconds:
            result[name]["against compile"] = round(statistics.median(seconds["compile"]) / median, 4)


def profile_arms(bench: Bench, arms: list[str], result: dict[str, Any]) -> None:
    from kernel_classes import profile_step

    for name in arms:
        bench.switch(name)
        bench.step()
        result[name]["profile"] = profile_step(bench.step, bench.device)


class Bench:
    """One trainer on batches that lie on the device; its blocks change arms in place."""

    def __init__(self, args: argparse.Namespace, folder: Path, pixels: int, ranks: Any) -> None:
        from timed_training import TINY, make_config, write_features

        from diffusion.training import Reporting, Trainer, denoising_objective
        from diffusion.training.fused_update import FusedUpdate

        self.batch_size = args.batch_size or (2 if args.tiny else BATCHES[pixels])
        channels = TINY["caption_channels"] if args.tiny else 4096
        sizes = {**TINY, "hidden_size": 64, "depth": 1} if args.tiny else {}
        write_features(folder / "store", 2 * self.batch_size, pixels, channels)
        config = make_config(folder / "store", pixels, self.batch_size, 10**6, compile=True, num_workers=0, **sizes)
        self.trainer = Trainer(
            config, denoising_objective, folder / "run", reporting=Reporting(tensorboard=False), ranks=ranks
        )
        state = self.trainer.state
        self.device, self.network = ranks.device, state.network
        self.update = FusedUpdate(state.network, state.optimizer, state.average)
        self.blocks = list(self.network.blocks)
        self.compiled = [block._compiled_call_impl for block in self.blocks]
        self.plain = {
            name: module for name, module in self.network.named_modules() if name.endswith(("qkv", "fc1", "fc2"))
        }
        self.trainer._base_lr, self.trainer._factor = 1e-6, lambda step: 1.0
        self.trainer.started, self.trainer.first_step = time.perf_counter(), 0
        self.trainer.window.begin()
        self.batches = itertools.cycle(self._batches())

    def _batches(self) -> list[Any]:
        from diffusion.data import SampleKey, collate

        dataset, size = self.trainer.dataset, self.batch_size
        groups = [range(start, start + size) for start in (0, size)]
        batches = [collate([dataset[SampleKey(index, index)] for index in group]) for group in groups]
        return [batch.to(self.device) for batch in batches]

    def switch(self, name: str) -> None:
        """Let the blocks compute as an arm does."""
        from diffusion.models.kernels import Kernels, use_fp8, use_kernels

        compiled, kernels, fp8 = ARMS[name]
        for path, module in self.plain.items():
            parent, _, child = path.rpartition(".")
            setattr(self.network.get_submodule(parent), child, module)
        if fp8 is not None:
            use_fp8(self.network, fp8)
        use_kernels(self.network, Kernels(**kernels), self.device)
        self.trainer.state.fused_update = self.update if kernels.get("fused") else None
        for block, call in zip(self.blocks, self.compiled):
            block._compiled_call_impl = call if compiled else None

    def step(self) -> Any:
        """One optimiser step of the trainer; returns its loss on the device."""
        return self.trainer._train_step(self.batches, self.trainer.window).loss

    def free(self) -> None:
        """Give back what a step that failed has left on the card."""
        import gc

        import torch

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Free the card for the next size."""
        import torch

        self.trainer.state.settle()
        self.trainer.lock.release()
        del self.trainer, self.update, self.network, self.blocks, self.compiled, self.plain, self.batches
        torch._dynamo.reset()
        self.free()


if __name__ == "__main__":
    run_cli(main)
