"""Tiles of the Triton kernels for few keys: which are the fastest on this card, beside cuDNN's attention.

    python benchmarks/few_keys_tiles.py --out output/few_keys_tiles.json
    TRITON_INTERPRET=1 python benchmarks/few_keys_tiles.py --tiny --out /tmp/tiles.json    # to see that it runs

Milliseconds a call of kernels recorded as a CUDA graph, so that launches do not count, at the shapes of training XL/2.
The best ones belong into `_TILES` of diffusion/models/kernels/few_keys.py.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from report import write_report

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import first_line, run_cli


class Shape(NamedTuple):
    """Of one attention: `what` is self or text."""

    what: str
    batch: int
    queries: int
    keys: int
    heads: int = 16
    channels: int = 72


SHAPES = (
    Shape("self", 128, 256, 256),
    Shape("text", 128, 256, 120),
    Shape("text", 32, 1024, 120),
    Shape("text", 8, 4096, 120),
)
ROWS, KEYS, WARPS = (32, 64, 128), (32, 64, 128), (4, 8)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=4.0, help="no tile is begun later (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="one small shape and tile, in Triton's interpreter")
    parser.add_argument("--out", type=Path, default=Path("output/few_keys_tiles.json"), help="default: %(default)s")
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    rows: list[dict[str, Any]] = []
    for shape in (Shape("self", 1, 40, 40, 2, 24), Shape("text", 1, 40, 20, 2, 24)) if args.tiny else SHAPES:
        rows += measure(shape, until, args.tiny)
        write_report(args.out, {"benchmark": "tiles of few_keys, ms a call", "rows": rows})


def measure(shape: Shape, until: float, tiny: bool) -> list[dict[str, Any]]:
    """Rows of one shape: cuDNN, then each kernel with each tile, the fastest first."""
    import torch

    device = "cpu" if tiny else "cuda"
    make = {"device": device, "dtype": torch.float32 if tiny else torch.bfloat16}
    q = torch.randn(shape.batch, shape.queries, shape.heads, shape.channels, **make)
    k, v = torch.randn(2, shape.batch, shape.keys, shape.heads, shape.channels, **make)
    lengths = torch.linspace(1, shape.keys, shape.batch, device=device).long()
    keep = None
    if shape.what == "text":
        keep = (torch.arange(shape.keys, device=device) < lengths[:, None]).view(torch.uint8)
    common = shape._asdict()
    rows = [] if tiny else [{**common, "kernel": "cudnn, no mask", **cudnn(q, k, v)}]
    for kernel, tile, work in cases(q, k, v, keep, tiny):
        if time.monotonic() > until and not tiny:
            break
        try:
            rows.append({**common, "kernel": kernel, "tile": tile, "ms": milliseconds(work, tiny)})
        except Exception as error:  # a tile that does not fit must not cost the others their figures
            rows.append({**common, "kernel": kernel, "tile": tile, "error": first_line(error)[:120]})
    rows.sort(key=lambda row: (row["kernel"], row.get("ms", 1e9)))
    for row in rows:
        print(row, flush=True)
    return rows


def cases(
    q: Any, k: Any, v: Any, keep: Any, tiny: bool
) -> Iterator[tuple[str, tuple[int, int, int], Callable[[], Any]]]:
    """Kernel, tile, work; of the backward pass, one of its kernels varies and the other keeps its tile."""
    import torch

    from diffusion.models.kernels import few_keys

    scale, usual = q.shape[-1] ** -0.5, dict(few_keys._TILES)
    is_alone = k.shape[1] <= few_keys._ALONE
    out, lse = few_keys._run_forward(q, k, v, keep, scale)
    grad = torch.randn_like(out)

    def with_tile(kernel: str, tile: tuple[int, int, int], run: Callable[[], Any]) -> Callable[[], Any]:
        def work() -> Any:
            few_keys._TILES[kernel] = tile
            try:
                return run()
            finally:
                few_keys._TILES.update(usual)

        return work

    def forward() -> Any:
        return few_keys._run_forward(q, k, v, keep, scale)

    def backward() -> Any:
        return few_keys._gradients(q, k, v, keep, out, grad, lse, scale)

    tiles = [(32, 32, 4)] if tiny else list(itertools.product(ROWS, KEYS, WARPS))
    for kernel in ("forward", "alone") if is_alone else ("forward", "queries", "keys"):
        for tile in tiles:
            if kernel == "alone" and tile[1] < k.shape[1]:
                continue
            yield kernel, tile, with_tile(kernel, tile, forward if kernel == "forward" else backward)


def cudnn(q: Any, k: Any, v: Any) -> dict[str, float]:
    """Forward alone, and both passes."""
    import torch

    from diffusion.models.kernels import Kernels, attend

    leaves = [part.detach().requires_grad_() for part in (q, k, v)]
    kernels = Kernels(attention="cudnn")
    grad = torch.randn_like(q)

    def forward() -> Any:
        with torch.no_grad():
            return attend(*leaves, kernels)

    def both() -> Any:
        return torch.autograd.grad(attend(*leaves, kernels), leaves, grad)

    ahead, all_of_it = milliseconds(forward, False), milliseconds(both, False)
    return {"ms": ahead, "backward_ms": round(all_of_it - ahead, 4)}


def milliseconds(work: Callable[[], Any], tiny: bool) -> float:
    if tiny:
        work()
        return 0.0
    from triton.testing import do_bench_cudagraph

    return round(do_bench_cudagraph(work, rep=20, return_mode="median"), 4)


if __name__ == "__main__":
    run_cli(main)
