"""The end of a step in one pass: where it is taken, and on a card that it is torch's step. See also test_kernels.py."""

from __future__ import annotations

import pytest
import torch

from diffusion.training.fused_update import FusedUpdate
from diffusion.training.optimization import WeightAverage
from tests.training.update_cases import difference, network

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@pytest.mark.parametrize(("clip", "skipped"), [(20.0, 3), (None, None)])
def test_on_a_card_a_step_is_torchs(clip: float | None, skipped: int | None) -> None:
    assert difference("cuda", clip=clip, skipped=skipped) < 1e-5  # of which torch's first step on a card is the most


def test_the_average_is_brought_up_to_date_once() -> None:
    module = network("cpu")
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    one, other = WeightAverage(module, 0.5), WeightAverage(module, 0.5)
    averaged = FusedUpdate(module, optimizer, one).averaged
    assert averaged == {name for name, _ in module.named_parameters()}
    for tensor in module.state_dict().values():
        tensor.add_(1)
    weight = one.next_weight
    for name, parameter in module.named_parameters():
        one.tensors[name].lerp_(parameter.detach(), weight)
    one.update(module, done=averaged)
    other.update(module)
    assert one.num_updates == other.num_updates == 1
    for name, tensor in other.tensors.items():
        torch.testing.assert_close(one.tensors[name], tensor)


@pytest.mark.parametrize("kind", ["no Triton", "another optimiser", "half precision", "no gradient", "maximize"])
def test_what_the_kernel_is_not_made_for_is_left_to_torch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = network("cpu").bfloat16() if kind == "half precision" else network("cpu")
    cls = torch.optim.Adam if kind == "another optimiser" else torch.optim.AdamW
    optimizer = cls(module.parameters(), fused=True, maximize=kind == "maximize")
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    if kind == "no gradient":
        module[0].bias.grad = None
    if kind != "no Triton":
        monkeypatch.setattr("diffusion.training.fused_update.can_run", lambda device: True)
    zero = torch.zeros(())
    assert not FusedUpdate(module, optimizer, None)(zero, zero, 1.0)
    assert all(torch.equal(parameter, old) for parameter, old in zip(module.parameters(), before))
