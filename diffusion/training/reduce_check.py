"""One all-reduce: python -m torch.distributed.run --nproc-per-node N -m diffusion.training.reduce_check"""

from __future__ import annotations

import sys
import time

import torch

from diffusion.ranks import Ranks

REDUCE_TIMEOUT_S = 60


def check_reduce(ranks: Ranks) -> tuple[bool, str]:
    """Sum 64 MiB over all ranks: whether the result is right, and how long it took."""
    values = torch.full((16 << 20,), float(ranks.rank + 1), device=ranks.device)
    ranks.total(values[:1])  # connects
    began = time.perf_counter()
    total = ranks.total(values)
    right = bool((total == ranks.world_size * (ranks.world_size + 1) / 2).all().item())
    seconds = time.perf_counter() - began
    backend = "NCCL" if ranks.device.type == "cuda" else "gloo"
    text = f"{backend} sums 64 MiB over {ranks.world_size} processes in {1000 * seconds:.0f} ms"
    return right, text if right else f"{backend} gives a wrong sum"


def main() -> None:
    ranks = Ranks(timeout_s=REDUCE_TIMEOUT_S)
    is_right, text = check_reduce(ranks)
    if ranks.is_main:
        print(text)
    ranks.barrier()
    ranks.close()
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
