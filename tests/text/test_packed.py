"""The encoder without padding against transformers, caption by caption."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from diffusion.text import make_float16_safe
from diffusion.text.encoder import _calls
from diffusion.text.int8 import quantize_linears
from diffusion.text.packed import encode_packed, encode_padded

ON_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="of a card")


def tiny_t5(feed_forward: str = "gated-gelu") -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = T5EncoderModel(T5Config(**sizes, feed_forward_proj=feed_forward, dropout_rate=0.1)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return model


def captions(lengths: list[int]) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(64) for _ in range(length)] for length in lengths]


LENGTHS = [[1], [3, 3, 3], [1, 2, 7, 8, 9, 40, 120, 120], [120, 1]]


def alone(model: Any, token_ids: list[list[int]]) -> torch.Tensor:
    """(T, D) float32, one caption a call of transformers."""
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([ids], device=model.device)).last_hidden_state[0] for ids in token_ids]
    return torch.cat(rows).float()


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", ["gated-gelu", "gated-silu", "relu", "int8"])
def test_every_caption_is_what_transformers_gives_for_it_alone(lengths: list[int], kind: str) -> None:
    model, token_ids = tiny_t5("gated-gelu" if kind == "int8" else kind), captions(lengths)
    if kind == "int8":
        quantize_linears(model)
    torch.testing.assert_close(encode_packed(model, token_ids), alone(model, token_ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gated-gelu", "relu", "int8"])
@pytest.mark.parametrize("length", [9, 16])
def test_padded_captions_are_what_transformers_gives_for_them(kind: str, length: int) -> None:
    model = tiny_t5("gated-gelu" if kind == "int8" else kind)
    if kind == "int8":
        quantize_linears(model)
    ids = torch.randint(64, (3, length), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(length) < torch.tensor([1, 5, length])[:, None]).long()
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(encode_padded(model, ids, mask), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CARD)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_as_near_to_float32_as_transformers_is(dtype: torch.dtype, device: str) -> None:
    model, token_ids = tiny_t5().to(device), captions(LENGTHS[2])
    exact = alone(model, token_ids)
    model = make_float16_safe(model.to(dtype))
    ours, theirs = encode_packed(model, token_ids), alone(model, token_ids)
    assert ours.dtype == dtype
    assert (ours.float() - exact).norm() <= 1.1 * (theirs - exact).norm() < 0.3 * exact.norm()


def test_calls_fill_the_budget_and_bound_the_padding_of_attention() -> None:
    lengths = [1] * 50 + [10] * 20 + [120] * 3
    order = list(range(len(lengths)))
    calls = list(_calls(order, lengths, 8, 150))
    assert [index for call in calls for index in call] == order
    assert all(sum(lengths[index] for index in call) <= 150 for call in calls)
    assert all(len(call) * max(lengths[index] for index in call) <= 300 for call in calls)
    assert [len(call) for call in calls[-3:]] == [1, 1, 1]
    assert [len(call) for call in _calls(order, lengths, 30, None)] == [30, 30, 13]
    assert list(_calls([0], [120], 8, 100)) == [[0]], "a caption beyond the budget runs alone"
