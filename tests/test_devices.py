from __future__ import annotations

import pytest
import torch

from diffusion import devices


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_fastest_that_is_there(
    cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def empty(size: int, device: str) -> torch.Tensor:
        asked.append(device)
        return torch.zeros(size)  # this machine has no such device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "empty", empty)
    devices.choose_device("auto")
    assert asked == [expected]
    assert devices.choose_dtype("auto", torch.device("mps")) == torch.float32
    assert devices.choose_dtype("float16", torch.device("mps")) == torch.float16


@pytest.mark.parametrize(("capability", "expected"), [((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16")])
def test_auto_is_float16_on_cards_without_bfloat16(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V100, T4 and A100, by what their drivers say."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.choose_dtype("auto", torch.device("cuda")) == getattr(torch, expected)
