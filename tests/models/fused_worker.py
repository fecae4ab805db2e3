"""Runs the Triton kernels in Triton's interpreter and prints, as JSON, how far they are from float64 formulas.

Triton decides when it is imported whether it interprets, so this is a process of its own: TRITON_INTERPRET=1.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from timm.layers import Mlp
from torch import Tensor

from diffusion.adapters import adapter_parameters, lean, start_lora
from diffusion.models import PixArt
from diffusion.models.embeddings import ApproxGelu
from diffusion.models.kernels import (
    FP8Linear,
    Kernels,
    attend_text,
    fp8,
    gated_residual,
    gelu_mlp,
    kept_norm,
    low_rank,
    modulated_norm,
    residual_norm,
    to_qkv,
    use_kernels,
)
from diffusion.models.kernels.availability import can_run
from tests.training.update_cases import difference

B, N, D = 2, 19, 24  # no powers of two, and tokens that do not fill the rows of a program


def error(function: Callable[..., Any], inputs: list[Tensor], dtype: torch.dtype) -> float:
    """Largest relative error of outputs and gradients, fused in `dtype` against plain in float64."""
    results = []
    for fused, precision in ((True, dtype), (False, torch.float64)):
        leaves = [value.to(dtype).to(precision).requires_grad_() for value in inputs]
        outputs = function(*leaves, fused=fused)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)
        loss = sum((output.double() * torch.randn(output.shape, dtype=torch.float64)).sum() for output in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    pairs = zip(*results)
    return max(((ours.double() - exact).norm() / exact.norm()).item() for ours, exact in pairs)


class Around(torch.nn.Module):
    """The block's MLP, so that its weights can be given."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp(D, hidden_features=4 * D, act_layer=ApproxGelu)

    def forward(self, tokens: Tensor, fused: bool) -> Tensor:
        return gelu_mlp(tokens, self.mlp, fused=fused)


def mlp(tokens: Tensor, *weights: Tensor, fused: bool) -> Tensor:
    names = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    given = {f"mlp.{name}": weight for name, weight in zip(names, weights)}
    return torch.func.functional_call(Around(), given, (tokens, fused))


class Projecting(torch.nn.Module):
    """The projection of a block to queries, keys and values, so that its weights can be given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.width = torch.nn.Linear(D, 3 * D), width

    def forward(self, tokens: Tensor, fused: bool) -> tuple[Tensor, ...]:
        return to_qkv(self.qkv, tokens, 8, self.width, fused=fused)


def projected(width: int) -> Callable[..., Any]:
    """Heads of 8 channels, padded to `width`."""

    def compute(tokens: Tensor, weight: Tensor, bias: Tensor, fused: bool) -> Any:
        given = {"qkv.weight": weight, "qkv.bias": bias}
        return torch.func.functional_call(Projecting(width), given, (tokens, fused))

    return compute


def of_networks() -> dict[str, float]:
    """Gradients of a network by the fused kernels, launched and compiled: distance to float64 in float32, and under
    autocast, divided by that of plain torch."""
    network = PixArt(input_size=8, hidden_size=48, depth=2, num_heads=2, caption_channels=16, model_max_length=7)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    given = (torch.randn(2, 4, 8, 8), torch.tensor([5.0, 700.0]), torch.randn(2, 7, 16), torch.ones(2, 7))

    def gradients(model: PixArt, dtype: torch.dtype, autocast: bool) -> Tensor:
        leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(*(part.to(dtype) for part in given))
        return torch.cat([g.flatten().double() for g in torch.autograd.grad(output.double().square().mean(), leaves)])

    exact, errors = gradients(copy.deepcopy(network).double(), torch.float64, False), {}

    def distance(autocast: bool) -> float:
        return ((gradients(network, torch.float32, autocast) - exact).norm() / exact.norm()).item()

    plain = distance(autocast=True)
    use_kernels(network, Kernels(fused=True))
    for name in ("launched", "compiled"):
        network.compile_blocks(dynamic=False, fullgraph=True, disable=name == "launched")
        errors[f"{name} network float32"] = distance(autocast=False)
        errors[f"{name} network autocast"] = distance(autocast=True) / plain
    return errors


def of_captions() -> dict[str, float]:
    """Attention to captions by the kernels that read the mask: of a few heads, and of a network, with gradients."""
    errors = {}
    for name, (queries, keys, heads, width, masked) in {
        "one tile": (19, 30, 3, 24, True),
        "no mask": (70, 9, 2, 72, False),
        "tiles": (70, 150, 1, 72, True),
        "narrow": (5, 131, 2, 8, True),
    }.items():
        kept = torch.arange(keys) < torch.tensor([1, keys - 2])[:, None]
        text = kept[:, None, None] if masked else None
        given = torch.randn(B, queries, heads, width), torch.randn(2, B, keys, heads, width)

        def attended(q: Tensor, pair: Tensor, fused: bool, text: Tensor | None = text) -> Tensor:
            return attend_text(q, pair, text, Kernels(text="direct" if fused else "mask"))

        errors[f"captions, {name}, float32"] = error(attended, list(given), torch.float32)
        errors[f"captions, {name}, float16"] = error(attended, list(given), torch.float16)
    network = PixArt(input_size=8, hidden_size=48, depth=2, num_heads=2, caption_channels=16, model_max_length=7)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    mask = torch.arange(7) < torch.tensor([3, 7])[:, None]
    given = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 700.0]), torch.randn(2, 7, 16)

    def gradients(dtype: torch.dtype, text: str) -> Tensor:
        model = copy.deepcopy(network).to(dtype)
        use_kernels(model, Kernels(text=text))
        model.compile_blocks(dynamic=False, fullgraph=True, disable=text == "mask")
        output = model(*(part.to(dtype) for part in given), mask)
        leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.cat([g.flatten().double() for g in torch.autograd.grad(output.double().square().mean(), leaves)])

    exact = gradients(torch.float64, "mask")
    errors["captions, compiled network float32"] = (
        (gradients(torch.float32, "direct") - exact).norm() / exact.norm()
    ).item()
    return errors


def of_updates() -> dict[str, float]:
    """AdamW, clipping and average in one pass beside torch's."""
    cases = {"clipped": {}, "whole": {"clip": None, "skipped": None}}
    return {f"update, {name}, float32": difference("cpu", **options) for name, options in cases.items()}


def of_fp8() -> dict[str, float]:
    """Layers in FP8 that round in the pass before, beside those that round by themselves: distance to float64 of the
    one, divided by that of the other. The interpreter cuts off what a card would round."""
    mlp = Mlp(D, hidden_features=4 * D, act_layer=ApproxGelu)
    tokens = torch.randn(B, N, D)
    qkv = {"FP8 qkv": Projecting(8), "FP8 qkv padded": Projecting(16)}
    plain: dict[str, tuple[torch.nn.Module, Callable[..., Any]]] = {"FP8": (mlp, lambda x, module: module(x))}
    plain |= {name: (module, lambda x, module: module(x, False)) for name, module in qkv.items()}
    fused: dict[str, Callable[..., Any]] = {"FP8": gelu_mlp, **dict.fromkeys(qkv, lambda x, module: module(x, True))}

    def results(module: torch.nn.Module, dtype: torch.dtype, compute: Callable[..., Any]) -> list[Tensor]:
        leaf = tokens.to(dtype).requires_grad_()
        outputs = compute(leaf, module)
        outputs = torch.cat(outputs, -1) if isinstance(outputs, tuple) else outputs
        torch.manual_seed(1)
        grad = torch.randn(outputs.shape).to(dtype)
        return [outputs, *torch.autograd.grad(outputs, [leaf, *module.parameters()], grad)]

    def distance(ours: list[Tensor], exact: list[Tensor]) -> Tensor:
        pairs = zip(ours, exact, strict=True)
        return torch.stack([(part.double() - other).norm() / other.norm() for part, other in pairs])

    ratios = {}
    for name, (module, compute) in plain.items():
        exact = results(copy.deepcopy(module).double(), torch.float64, compute)
        for key, part in list(module.named_children()):
            if isinstance(part, torch.nn.Linear):
                setattr(module, key, FP8Linear.of(part, "rowwise"))
        with mock.patch.object(fp8, "can_run", return_value=False):
            apart = distance(results(module, torch.float32, compute), exact)
        ours = distance(results(module, torch.float32, fused[name]), exact)
        assert (ours[1] != apart[1]).item()  # it was taken
        ratios[name] = (ours / apart.clamp(min=1e-3)).max().item()
    return ratios


def of_rounding() -> dict[str, float]:
    """What a sum of weights shows of a change of a tenth of a bfloat16's spacing, and of none."""
    weight, up, down = torch.randn(300, 300).bfloat16(), 2e-4 * torch.randn(300, 3), torch.randn(3, 300)
    change = 2.0 * up @ down
    other = torch.randn(70, 40).bfloat16(), torch.randn(2, 40), torch.zeros(70, 2)  # behind it, of another shape
    summed = low_rank._summed_weights([weight, other[0]], [down, other[1]], [up, other[2]], [2.0, 1.0])
    seen = summed[: weight.numel()].view_as(weight).float() - weight.float()
    assert torch.equal(summed[weight.numel() :].view_as(other[0]), other[0])
    still = low_rank._summed_weights([weight], [down], [torch.zeros_like(up)], [2.0]).view_as(weight)
    slope = (seen * change).sum() / change.square().sum()
    return {"weight unchanged": (still - weight).abs().max().item(), "mean change": (slope - 1).abs().item()}


def of_adapters() -> dict[str, float]:
    """Gradients of a LoRA in bfloat16 by the sum of weights, launched and compiled, beside those by its own products:
    distance to float64 of the one, divided by that of the other."""
    network = PixArt(input_size=16, hidden_size=48, depth=2, num_heads=2, caption_channels=16, model_max_length=40)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    start_lora(network, 4)
    factors = adapter_parameters(network)
    for parameter in factors.values():
        torch.nn.init.normal_(parameter, std=0.1)
    given = (torch.randn(2, 4, 16, 16), torch.tensor([5.0, 700.0]), torch.randn(2, 40, 16), torch.ones(2, 40))

    def gradients(model: PixArt, dtype: torch.dtype = torch.float32) -> Tensor:
        leaves = list(adapter_parameters(model).values())
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            output = model(*(part.to(dtype) for part in given))
        return torch.cat([g.flatten().double() for g in torch.autograd.grad(output.double().square().mean(), leaves)])

    exact, errors = gradients(copy.deepcopy(network).double(), torch.float64), {}

    def distance() -> float:
        return ((gradients(network) - exact).norm() / exact.norm()).item()

    with mock.patch.object(lean, "takes_sum", return_value=False):
        plain = distance()
    with (
        mock.patch.object(low_rank, "_gradients", wraps=low_rank._gradients) as called,
        mock.patch.object(low_rank, "_summed_weights", wraps=low_rank._summed_weights) as summed,
    ):
        errors["LoRA"] = distance() / plain
    assert called.call_count == 17, called.call_count  # seven a block, two of captions, the last
    assert summed.call_count == 5, summed.call_count  # one a block, two of captions, the last
    network.compile_blocks(dynamic=False, backend="aot_eager", fullgraph=True)
    errors["compiled LoRA"] = distance() / plain
    return errors


def main() -> None:
    if not can_run(torch.device("cpu")):
        raise SystemExit("the kernels are not in use: set TRITON_INTERPRET=1")
    torch.manual_seed(0)
    tokens, update = torch.randn(B, N, D), torch.randn(B, N, D)
    table = torch.randn(B, 6, D)
    shift, scale, gate = table.unsqueeze(2).unbind(1)[:3]  # views with a stride, as a block has them
    weights = [torch.randn(4 * D, D) / D**0.5, torch.randn(4 * D), torch.randn(D, 4 * D) / D**0.5, torch.randn(D)]
    cases: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
        "modulated_norm": (modulated_norm, [tokens, shift, scale]),
        "residual_norm": (residual_norm, [tokens, update, shift, scale]),
        "kept_norm": (kept_norm, [tokens, shift, scale]),
        "gated_residual": (gated_residual, [tokens, update, gate]),
        "modulated_norm, shared": (modulated_norm, [tokens, shift[:1], scale[:1]]),  # a solver's timestep, by all
        "residual_norm, shared": (residual_norm, [tokens, update, shift[:1], scale[:1]]),
        "gated_residual, shared": (gated_residual, [tokens, update, gate[:1]]),
        "gelu_mlp": (mlp, [tokens, *weights]),
        "qkv": (projected(8), [tokens, torch.randn(3 * D, D), torch.randn(3 * D)]),
        "qkv, padded": (projected(12), [tokens, torch.randn(3 * D, D), torch.randn(3 * D)]),
    }
    errors = {
        f"{name} {str(dtype).removeprefix('torch.')}": error(function, inputs, dtype)
        for name, (function, inputs) in cases.items()
        for dtype in (torch.float32, torch.bfloat16)
    }
    print(json.dumps(errors | of_networks() | of_fp8() | of_rounding() | of_adapters() | of_captions() | of_updates()))


if __name__ == "__main__":
    main()
