"""Time and bandwidth of each Triton kernel of training, and with --sweep by which tiles it is fastest on this card.

    python benchmarks/bench_kernels.py                      # one GPU, a minute
    python benchmarks/bench_kernels.py --sweep --output output/kernels.json
    TRITON_INTERPRET=1 python benchmarks/bench_kernels.py --tiny --device cpu --sweep --output /tmp/kernels.json

Activations are those of a block of XL/2 on random data. Bytes are what a kernel must read and write at least; beside
them stands what a copy of the widest activations reaches in the same run. Kernels of LoRA are all those of a block.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import write_report
from timing import timed

from diffusion.devices import choose_device
from diffusion.errors import PixArtError, first_line, run_cli
from diffusion.models.kernels.availability import can_run

SHAPES = {"128 x 256 px": (128, 256), "4 x 512 px": (4, 1024), "1 x 512 px": (1, 1024)}  # samples, tokens
RANK = 16


class Case(NamedTuple):
    """A kernel: what runs it, the bytes it moves, where its tile stands, and other tiles."""

    call: Callable[[], Any]
    moved: int
    place: tuple[Any, str]
    tiles: list[Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="(default: all)")
    add("--kernels", nargs="+", metavar="NAME", help="measure those whose name begins so (default: all)")
    add("--sweep", action="store_true", help="other tiles too")
    add("--repeats", type=int, default=10, help="calls a window; the median of 5 windows counts (%(default)s)")
    add("--device", default="auto")
    add("--tiny", action="store_true", help="narrow activations, to see that it runs")
    add("--output", type=Path, default=Path("benchmarks/results/kernels.json"))
    args = parser.parse_args()
    device = choose_device(args.device)
    if not can_run(device):
        raise PixArtError(f"Triton kernels do not run on {device}; take a CUDA card, or set TRITON_INTERPRET=1")
    torch.manual_seed(0)
    width = 48 if args.tiny else 1152
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        samples, tokens = (2, 20) if args.tiny else SHAPES[shape]
        wide = halves(device, samples * tokens, 4 * width)
        rows.append({"kernel": "copy", "shape": shape, **measured(wide.clone, 2 * wide.nbytes, args.repeats, device)})
        cases = fused_cases(device, samples, tokens, width), lora_cases(device, samples * tokens, width)
        for name, case in itertools.chain(*cases):
            if args.kernels is None or name.startswith(tuple(args.kernels)):
                rows += measure(name, shape, case, args, device)
    write_report(args.output, {"benchmark": "Triton kernels of training, XL/2, bf16", "rows": rows})


def measure(name: str, shape: str, case: Case, args: argparse.Namespace, device: Any) -> Iterator[dict[str, Any]]:
    """A row for the tile that is used, and one for each other; a tile that fails says why."""
    module, constant = case.place
    used = getattr(module, constant)
    for tile in [used, *(other for other in case.tiles if args.sweep and other != used)]:
        row: dict[str, Any] = {"kernel": name, "shape": shape, "tile": tile, "used": tile is used}
        setattr(module, constant, tile)
        try:
            row |= measured(case.call, case.moved, args.repeats, device)
        except Exception as error:  # too much shared memory, say
            row["error"] = first_line(error)[:120]
        finally:
            setattr(module, constant, used)
        print(row, flush=True)
        yield row


def measured(call: Callable[[], Any], moved: int, repeats: int, device: Any) -> dict[str, float]:
    """Microseconds a call, and terabytes a second, with launches recorded on a card."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                call()
        run: Callable[[], Any] = graph.replay
    else:
        run, repeats = call, 1
    seconds = statistics.median(timed(device, run) for _ in range(5)) / repeats
    return {"us": round(1e6 * seconds, 2), "tb_per_s": round(moved / seconds / 1e12, 3)}


def fused_cases(device: Any, samples: int, tokens: int, width: int) -> Iterator[tuple[str, Case]]:
    """Norms, gates, the GELU and rounding to FP8."""
    from diffusion.models.kernels import fp8_rows, fused

    x, update, grad, grad_summed = (halves(device, samples, tokens, width) for _ in range(4))
    table = torch.randn(samples, 6, width, device=device).unsqueeze(2).unbind(1)
    shift, scale, gate = table[:3]
    _, _, mean, rstd = fused._residual_norm(x, update, shift, scale, torch.bfloat16)
    hidden, grad_hidden = (halves(device, samples * tokens, 4 * width) for _ in range(2))
    row, wide = x.nbytes, hidden.nbytes
    forward = [{"num_warps": warps} for warps in (1, 2, 4, 8)]
    backward = [{"ROWS": rows, "num_warps": warps} for rows, warps in itertools.product((4, 8, 16), (2, 4, 8))]
    place: tuple[Any, str] = (fused, "_NORM")
    yield (
        "norm",
        Case(lambda: fused._modulated_norm(x, shift, scale, torch.bfloat16), 2 * row, place, forward),
    )
    yield (
        "residual norm",
        Case(lambda: fused._residual_norm(x, update, shift, scale, torch.bfloat16), 4 * row, place, forward),
    )

    def norm_backward(*summed: Any) -> Callable[[], Any]:
        return lambda: fused._norm_gradients(grad, *summed, x, mean, rstd, scale, fused._NORM_BACKWARD["ROWS"])

    place = (fused, "_NORM_BACKWARD")
    yield "norm, backward", Case(norm_backward(None), 3 * row, place, backward)
    yield "residual norm, backward", Case(norm_backward(grad_summed), 4 * row, place, backward)
    yield (
        "gate, backward",
        Case(
            lambda: fused._gate_gradients(grad, x, gate, fused._GATE_BACKWARD["ROWS"]),
            3 * row,
            (fused, "_GATE_BACKWARD"),
            backward,
        ),
    )
    tiles = [
        {"ROWS": rows, "BLOCK": block, "num_warps": warps}
        for rows, block, warps in ((32, 128, 4), (32, 128, 8), (64, 128, 8), (32, 64, 4), (64, 64, 4), (16, 256, 4))
    ]
    yield (
        "GELU, backward",
        Case(lambda: fused.gelu_gradients(grad_hidden, hidden), 4 * wide, (fused, "_GELU_BACKWARD"), tiles),
    )
    place = (fp8_rows, "_ROUND")
    flat = x.flatten(0, 1)
    yield "FP8 of a row", Case(lambda: fp8_rows.rounded_rows(flat), row + row // 2, place, forward)
    yield "FP8 of a wide row", Case(lambda: fp8_rows.rounded_rows(hidden), wide + wide // 2, place, forward)
    yield "FP8 of a GELU", Case(lambda: fp8_rows.rounded_rows(hidden, True), wide + wide // 2, place, forward)
    tiles = [{"ROWS": rows, "num_warps": warps} for rows, warps in itertools.product((8, 16, 32), (1, 2, 4, 8, 16))]
    place = (fp8_rows, "_SUM")
    yield "FP8 of a row, and sums", Case(lambda: fp8_rows.rounded_and_summed(flat), row + row // 2, place, tiles)
    channels, place = math.gcd(width, 72), (fp8_rows, "_JOIN")
    q, k, v = (part.flatten(0, 1).unflatten(1, (-1, channels)) for part in (x, update, grad))
    moved = 7 * row + row // 2
    yield "FP8 of q, k, v", Case(lambda: fp8_rows.rounded_join(q, k, v, channels), moved, place, tiles)
    moved, place = 4 * wide + wide // 2, (fp8_rows, "_GELU")
    yield (
        "FP8 of a GELU, backward",
        Case(lambda: fp8_rows.rounded_gelu_gradients(grad_hidden, hidden), moved, place, tiles),
    )


def lora_cases(device: Any, rows: int, width: int) -> Iterator[tuple[str, Case]]:
    """Sums of weights and gradients of factors of the layers on image tokens of a block, q, k and v as one."""
    from diffusion.models.kernels import low_rank

    layers = [(width, width, 3), *[(width, width, 1)] * 3, (width, 4 * width, 1), (4 * width, width, 1)]
    given = [
        (
            [halves(device, outputs, inputs) for _ in range(parts)],
            torch.randn(parts * RANK, inputs, device=device),
            torch.randn(parts * outputs, RANK, device=device),
            halves(device, rows, inputs),
            halves(device, rows, parts * outputs),
        )
        for inputs, outputs, parts in layers
    ]

    weights = [weight for weights, *_ in given for weight in weights]
    downs = [down for weights, downs, *_ in given for down in downs.chunk(len(weights))]
    ups = [up for weights, _, ups, *_ in given for up in ups.chunk(len(weights))]

    def sums() -> None:
        low_rank._summed_weights(weights, downs, ups, [1.0] * len(weights))

    def gradients() -> None:
        for weights, down, up, x, grad in given:
            outputs, inputs = weights[0].shape
            splits = low_rank._splits(rows, inputs, outputs, len(weights))
            low_rank._gradients(x, grad, down, up, len(weights), 1.0, splits).sum(0)

    tiles = [{"OUT": out, "IN": into, "num_warps": 4} for out, into in ((32, 64), (64, 64), (32, 128), (16, 128))]
    yield "LoRA, sums", Case(sums, 2 * sum(weight.nbytes for weight in weights), (low_rank, "_SUM"), tiles)
    moved = 2 * sum(x.nbytes + grad.nbytes for *_, x, grad in given)
    places: list[tuple[str, str, list[Any]]] = [
        ("tile of products", "_GRADIENTS", [
            {"ROWS": tall, "BLOCK": block, "num_warps": 4} for tall, block in ((64, 64), (64, 32), (128, 32), (32, 64))
        ]),
        ("programs", "_PROGRAMS", [132, 264, 396, 528]),
        ("fewest summed", "_FEWEST_SUMMED", [128, 256, 512, 1024, 4096]),
        ("shares", "_MOST_SHARES", [1, 2, 3, 4]),
    ]  # fmt: skip
    for what, constant, others in places:
        yield f"LoRA, gradients by {what}", Case(gradients, moved, (low_rank, constant), others)


def halves(device: Any, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


if __name__ == "__main__":
    run_cli(main)
