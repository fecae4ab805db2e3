"""Layers whose weights have low-rank factors beside them; what the kernels compute is tested in test_kernels.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from diffusion.models.kernels import low_rank
from diffusion.models.kernels.low_rank import LowRank, takes_sum

ROWS = torch.empty(2, 64, 32)


def part(rank: int = 4, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0, trains: bool = True) -> LowRank:
    factors = torch.empty(rank, 32), torch.empty(48, rank)
    for factor in factors:
        factor.requires_grad_(trains)
    return LowRank(torch.empty(48, 32, dtype=dtype), None, *factors, scale)


def test_a_sum_of_weights_is_for_factors_that_train_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not takes_sum(ROWS, [part()])  # not on a GPU
    monkeypatch.setattr(low_rank, "can_run", lambda device: True)
    assert takes_sum(ROWS, [part(), part()])
    assert takes_sum(ROWS, [part(64)])
    refused = {
        "few rows": (ROWS[:, :30], [part()]),
        "no bfloat16": (ROWS, [part(dtype=torch.float32)]),
        "frozen": (ROWS, [part(trains=False)]),
        "high rank": (ROWS, [part(65)]),
        "high rank of three": (ROWS, [part(17)] * 3),
        "ranks differ": (ROWS, [part(4), part(5)]),
        "strengths differ": (ROWS, [part(), part(scale=0.5)]),
    }
    assert not [why for why, (x, parts) in refused.items() if takes_sum(x, parts)]
    with torch.no_grad():
        assert not takes_sum(ROWS, [part()])


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from diffusion.models.kernels import fp8_triton, low_rank, low_rank_triton

def build(kernel, halves, floats, tile):
    constants = {**tile, **shape}
    warps = constants.pop("num_warps")
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    kinds = dict.fromkeys(halves, "*bf16") | dict.fromkeys(floats, "*fp32") | {"scale": "fp32", "rounded": "*fp8e4nv"}
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    print(made.metadata.shared)

for parts, rank in ((1, 16), (4, 16), (1, 64)):
    shape = {"PARTS": parts, "RANK": rank, "WIDE": False}
    build(low_rank_triton.sum_weight, ["weight", "out"], ["down", "up"], low_rank._SUM)
    build(low_rank_triton.project, ["x", "grad"], ["down", "up", "below", "above"], low_rank._PROJECT)
    build(low_rank_triton.gradients, ["x", "grad"], ["below", "above", "sums"], low_rank._GRADIENTS)
shape = {"BLOCK": 8192, "ROWS": 16, "num_warps": 8}
build(fp8_triton.gelu_forward, ["hidden"], ["scales"], {})
build(fp8_triton.gelu_backward, ["grad_out", "hidden", "out", "grad_hidden"], ["scales", "bias_parts"], {})
"""


@pytest.mark.slow
def test_kernels_compile_for_a_card_and_fit_into_small_ones() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    shared = [int(line) for line in done.stdout.split()]
    assert len(shared) == 11
    assert max(shared) < 99 * 1024  # bytes that a program may have on cards for games, and more on others
