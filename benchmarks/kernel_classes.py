"""Where a step's time on the card goes: kernels summed by what they do."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# The first that matches a kernel's name counts.
CLASSES = (
    ("attention", r"flash|fmha|sdpa|attention|attn|dot_do_o|convert_dq"),
    ("gemm", r"gemm|cutlass|nvjet|xmma|cublas|wgmma|splitk|matmul|addmm|aten::mm|aten::bmm"),
    ("optimiser", r"multi_tensor|adam|foreach|lpnorm|lerp"),
    ("convolution", r"conv|implicit"),
    ("memory", r"memcpy|memset|copy_kernel|aten::copy_"),
    ("elementwise", r"triton|elementwise|reduce|norm|gelu|gate|vectorized|softmax|aten::"),
)


def classify(name: str) -> str:
    return next((kind for kind, pattern in CLASSES if re.search(pattern, name, re.IGNORECASE)), "other")


def profile_step(step: Callable[[], Any], device: Any, steps: int = 3) -> dict[str, Any]:
    """Milliseconds a step by class, and the kernels that take most; of operators on a CPU."""
    on_card = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
        if on_card:
            torch.cuda.synchronize(device)
    by_class: dict[str, float] = defaultdict(float)
    kernels = []
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_card else event.self_cpu_time_total
        if microseconds:
            by_class[classify(event.key)] += microseconds / steps / 1e3
            kernels.append((round(microseconds / steps / 1e3, 3), event.count // steps, event.key[:100]))
    return {
        "ms_a_step": {kind: round(value, 3) for kind, value in sorted(by_class.items(), key=lambda item: -item[1])},
        "ms_a_step_all": round(sum(by_class.values()), 3),
        "largest (ms, calls, name)": sorted(kernels, reverse=True)[:60],
    }
