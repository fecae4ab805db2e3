"""What "auto" takes, and what is said of packages that are missing, fail or compute something wrong."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from diffusion.models.kernels import Kernels, choice, use_kernels
from diffusion.models.kernels.flash4 import mend
from tests.models.test_kernels import network


def test_a_package_that_is_missing_or_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda")
    monkeypatch.setitem(choice._PACKAGES, "quack", ("no_such_package", "quack-kernels"))
    with pytest.raises(RuntimeError, match="mlp='quack' needs the package quack-kernels; install it, or use 'torch'"):
        use_kernels(network(), Kernels(mlp="quack"), card)
    monkeypatch.setitem(choice._PACKAGES, "quack", ("json", "quack-kernels"))
    monkeypatch.setitem(sys.modules, "diffusion.models.kernels.epilogues", None)
    with pytest.raises(RuntimeError, match=r"quack-kernels is installed, but fails \(Module.*the extra `flash`"):
        use_kernels(network(), Kernels(mlp="quack"), card)


def test_auto_passes_over_a_package_that_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def activate(name: str) -> None:
        raise ValueError("too many values to unpack")

    monkeypatch.setitem(choice._PACKAGES, "fa4", ("json", "flash-attn-4"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(choice, "mend", lambda: None)
    with pytest.raises(RuntimeError, match=r"attention='fa4': .* fails \(ValueError: too many values"):
        use_kernels(network(), Kernels(attention="fa4"), torch.device("cuda"))
    assert choice.decide(Kernels(attention="auto"), torch.device("cuda"), 4096).attention == "cudnn"
    assert "attention='auto': attention='fa4': the package flash-attn-4" in caplog.text


def test_sums_of_gradients_are_read_as_they_are_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Postprocess:
        def __init__(self, dtype: str, head_dim: int, arch: int, tile_m: int = 128) -> None:
            self.tile_hdim, self.tile_m = -(-head_dim // 32) * 32, tile_m
            self.check_hdim_oob = head_dim != self.tile_hdim

    interface = ModuleType("flash_attn.cute.interface")
    interface.FlashAttentionBackwardPostprocess = Postprocess  # type: ignore[attr-defined]
    package = ModuleType("flash_attn.cute")
    package.interface = interface  # type: ignore[attr-defined]
    for name, module in {"flash_attn": ModuleType("flash_attn"), "flash_attn.cute": package}.items():
        monkeypatch.setitem(sys.modules, name, module)
    mend()
    mended = interface.FlashAttentionBackwardPostprocess  # type: ignore[attr-defined]
    mend()
    assert interface.FlashAttentionBackwardPostprocess is mended  # type: ignore[attr-defined]
    for width, arch, wanted in (
        (72, 90, (80, True)),
        (80, 90, (80, False)),
        (96, 90, (96, False)),
        (72, 100, (96, True)),
    ):
        made = mended("bf16", width, arch, tile_m=64)
        assert (made.tile_hdim, made.check_hdim_oob, made.tile_m) == (*wanted, 64)
    del interface.FlashAttentionBackwardPostprocess  # type: ignore[attr-defined]
    mend()  # a version that has none


def test_a_flash_kernel_whose_gradients_are_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, plain = torch.device("cpu"), choice.F.scaled_dot_product_attention
    with torch.inference_mode():
        choice._check_flash(96, cpu, True)

    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(q if q.dtype == torch.float64 else q.detach() + 0 * q, k, v)

    monkeypatch.setattr(choice.F, "scaled_dot_product_attention", wrong)
    with pytest.raises(ArithmeticError, match="wrong gradients of queries at head width 96, relative error 1; "):
        choice._check_flash(96, cpu, True)
    choice._check_flash(96, cpu, False)  # for drawing it would do


@pytest.mark.parametrize(
    ("gradients", "text", "side", "taken"),
    [
        (True, "packed", 32, ("fa4", None)),
        (False, "direct", 32, ("fa4", None)),
        (False, "direct", 16, ("cudnn", None)),  # compiling its kernels would take longer than they save
        (False, "packed", 64, ("cudnn", None)),
    ],
)
def test_auto_takes_packages_where_they_are_right_and_pay(
    monkeypatch: pytest.MonkeyPatch, gradients: bool, text: str, side: int, taken: tuple[str, int | None]
) -> None:
    monkeypatch.setitem(choice._PACKAGES, "fa4", ("json", "flash-attn-4"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(choice, "_activate", lambda *arguments: None)
    given = Kernels(attention="auto", text=text)
    decided = choice.decide(given, torch.device("cuda"), side**2, gradients=gradients)
    assert (decided.attention, decided.head_width) == taken


@pytest.mark.parametrize(
    ("gradients", "side", "major", "taken"),
    [
        (True, 16, 9, "quack"),
        (False, 32, 9, "quack"),
        (False, 16, 9, "cublas"),  # compiling its kernel would take longer than it saves
        (True, 32, 8, "torch"),
    ],
)
def test_auto_takes_the_feed_forward_layer_that_pays(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gradients: bool,
    side: int,
    major: int,
    taken: str,
) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("it fails")

    monkeypatch.setitem(choice._PACKAGES, "quack", ("json", "quack-kernels"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(choice, "_activate_quack", lambda device: None)
    given, card = Kernels(mlp="auto"), torch.device("cuda")
    assert choice.decide(given, card, side**2, gradients=gradients).mlp == taken
    assert choice.decide(given, torch.device("cpu"), side**2, gradients=gradients).mlp == "torch"
    monkeypatch.setattr(choice, "_activate_quack", fail)
    assert choice.decide(given, card, side**2, gradients=gradients).mlp == ("torch" if gradients else "cublas")
    assert ("mlp='auto': it fails" in caplog.text) == (taken == "quack")


def test_an_unknown_choice_is_named() -> None:
    with pytest.raises(ValueError, match="attention='fast' is unknown; choose one of torch, auto"):
        Kernels(attention="fast")
    with pytest.raises(ValueError, match="text='none' is unknown; choose one of mask, spare, packed"):
        Kernels(text="none")
    with pytest.raises(ValueError, match="mlp='fast' is unknown; choose one of torch, auto, cublas"):
        Kernels(mlp="fast")
