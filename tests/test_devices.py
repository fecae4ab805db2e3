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
