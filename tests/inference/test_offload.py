from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusion.inference.offload import HostWeights, StreamingVisitor, WholeVisitor
from tests.tiny import tiny_text_encoder

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
IDS = torch.tensor([[5, 9, 17, 1], [4, 4, 1, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def run(model: nn.Module, device: str) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS.to(device), attention_mask=MASK.to(device)).last_hidden_state.cpu()


@pytest.mark.parametrize("device", DEVICES)
def test_streamed_blocks_compute_the_same_bits_in_any_number_of_passes(device: str) -> None:
    expected = run(tiny_text_encoder().to(device), device)
    model = tiny_text_encoder()
    visitor = StreamingVisitor(model, list(model.encoder.block), torch.device(device))
    for _ in range(2):
        visitor.enter()
        assert all(torch.equal(run(model, device), expected) for _ in range(3))
        visitor.leave()
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_block_computes_with_the_copy_on_the_device_not_with_the_host() -> None:
    model = tiny_text_encoder()
    visitor = StreamingVisitor(model, list(model.encoder.block), torch.device("cpu"))
    expected = run(model, "cpu")
    visitor.enter()
    for block in visitor._slots:
        block.zero_()  # what was sent is lost, so blocks give the residual alone
    assert not torch.allclose(run(model, "cpu"), expected)
    visitor.leave()
    assert torch.equal(run(model, "cpu"), expected)


def test_blocks_in_another_order_are_noticed() -> None:
    model = tiny_text_encoder()
    visitor = StreamingVisitor(model, list(model.encoder.block)[::-1], torch.device("cpu"))
    visitor.enter()
    with pytest.raises(AssertionError, match="another order"):
        run(model, "cpu")


def test_host_weights_keep_dtypes_values_and_ties() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.Linear(3, 5).half(), "c": nn.BatchNorm1d(7)})
    model["d"] = nn.Linear(3, 5)
    model["d"].weight = model["a"].weight
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = HostWeights(model, torch.device("cpu"), without=[model["b"]])
    assert weights.num_bytes == 8 * 256  # a, d's bias and c, each tensor on a boundary of its own
    other = weights.copy()
    weights.point_at(other)
    other.zero_()
    assert not model["a"].weight.any() and not model["c"].running_var.any() and model["b"].weight.all()
    assert model["d"].weight is model["a"].weight
    weights.point_at(weights.host)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_visits_give_the_memory_back() -> None:
    model = tiny_text_encoder()
    visitor = WholeVisitor(model, torch.device("cuda"), list(model.encoder.block))
    before = torch.cuda.memory_allocated()
    visitor.enter()
    assert model.device.type == "cuda" and torch.cuda.memory_allocated() > before
    visitor.leave()
    assert model.device.type == "cpu" and torch.cuda.memory_allocated() == before
