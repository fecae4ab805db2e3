from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5EncoderModel

from diffusion.errors import CheckpointError
from diffusion.text import CaptionEncoder, make_float16_safe
from tests.tiny import TINY_TEXT_CHANNELS, tiny_text_encoder, tiny_tokenizer, write_tiny_pipeline_parts

CAPTIONS = ["a red apple", "", "woman astronaut with medium skin tone in the sun", "cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pipeline_parts(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> CaptionEncoder:
    return CaptionEncoder.from_pretrained(folder)


def test_equals_transformers_on_each_caption_alone(folder: Path, encoder: CaptionEncoder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    model = T5EncoderModel.from_pretrained(str(folder / "text_encoder")).eval()
    for caption, embeds in zip(CAPTIONS, encoder.encode_unpadded(CAPTIONS, batch_size=3)):
        ids = tokenizer([caption], return_tensors="pt").input_ids
        with torch.no_grad():
            expected = model(input_ids=ids).last_hidden_state[0]
        assert embeds.shape == expected.shape
        torch.testing.assert_close(embeds, expected, rtol=1e-5, atol=1e-5)


def test_padding_and_neighbours_never_change_a_caption(encoder: CaptionEncoder) -> None:
    together, mask = encoder.encode(CAPTIONS)
    assert together.shape == (4, mask.shape[1], TINY_TEXT_CHANNELS)
    assert mask.dtype == torch.bool
    for index, caption in enumerate(CAPTIONS):
        alone, own_mask = encoder.encode([caption])
        assert own_mask.all()
        assert mask[index].sum() == own_mask.shape[1]
        torch.testing.assert_close(together[index][mask[index]], alone[0], rtol=1e-5, atol=1e-5)


def test_null_caption_is_the_end_token_alone(encoder: CaptionEncoder) -> None:
    embeds, mask = encoder.encode([""])
    assert embeds.shape == (1, 1, encoder.hidden_size)
    assert mask.all()


def test_truncation_keeps_the_end_token_and_is_counted(folder: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(folder, max_length=6)
    embeds, mask = encoder.encode(["cat", "a very long caption of many tokens indeed"])
    assert mask.sum(dim=1).tolist()[1] == 6
    assert embeds.shape[1] == 6
    assert encoder.num_truncated == 1
    (dropped,) = encoder.dropped
    kept = "a very long caption of many tokens indeed".removesuffix(dropped)
    assert dropped.endswith("many tokens indeed")
    assert len(encoder.tokenizer([kept]).input_ids[0]) == 6, "five pieces and the end token"
    encoder.encode(["cat"])
    assert encoder.dropped == []
    ids = encoder.tokenizer(["a very long caption of many tokens"], truncation=True, max_length=6).input_ids[0]
    assert ids[-1] == encoder.tokenizer.eos_token_id


def test_dtype_and_order_of_results(folder: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(folder, dtype=torch.bfloat16)
    results = encoder.encode_unpadded(CAPTIONS, batch_size=2)
    assert [len(embeds) for embeds in results] == encoder.encode(CAPTIONS)[1].sum(dim=1).tolist()
    assert all(embeds.dtype == torch.bfloat16 for embeds in results)
    assert encoder.encode_unpadded([]) == []


def test_plain_t5_folder(tmp_path: Path, encoder: CaptionEncoder) -> None:
    tiny_tokenizer(tmp_path)
    tiny_text_encoder().save_pretrained(str(tmp_path))
    plain = CaptionEncoder.from_pretrained(tmp_path)
    torch.testing.assert_close(plain.encode(["a cat"])[0], encoder.encode(["a cat"])[0])


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder"):
        CaptionEncoder.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"neither text_encoder/ nor config\.json"):
        CaptionEncoder.from_pretrained(tmp_path)
    (tmp_path / "text_encoder").mkdir()
    with pytest.raises(CheckpointError, match="tokenizer: missing"):
        CaptionEncoder.from_pretrained(tmp_path)


def test_damaged_weights_are_a_checkpoint_error(tmp_path: Path) -> None:
    write_tiny_pipeline_parts(tmp_path)
    (tmp_path / "text_encoder" / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        CaptionEncoder.from_pretrained(tmp_path)


def test_pickled_code_in_weights_is_refused(tmp_path: Path) -> None:
    write_tiny_pipeline_parts(tmp_path)
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    torch.save({"x": Path}, tmp_path / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="a pickle of more than tensors"):
        CaptionEncoder.from_pretrained(tmp_path)


def test_missing_weights_are_not_replaced_by_random_ones(tmp_path: Path) -> None:
    write_tiny_pipeline_parts(tmp_path)
    path = tmp_path / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing, the first 'encoder\.final_layer_norm"):
        CaptionEncoder.from_pretrained(tmp_path)


def test_wrong_arguments(encoder: CaptionEncoder) -> None:
    with pytest.raises(ValueError, match="at least one"):
        encoder.encode([])
    with pytest.raises(ValueError, match="not one string"):
        encoder.encode("a cat")


def test_float16_would_overflow_and_is_kept_from_it(folder: Path) -> None:
    """Feed-forward sums beyond 65,504, as T5-XXL has them: float32 where they arise, float16 elsewhere."""
    encoder = CaptionEncoder.from_pretrained(folder)
    for block in encoder.model.encoder.block:
        block.layer[1].DenseReluDense.wo.weight.mul_(3e6)
    expected = encoder.encode(CAPTIONS)[0]
    plain = copy.deepcopy(encoder.model).half()
    mask = encoder.encode(CAPTIONS)[1]
    unsafe = CaptionEncoder(encoder.tokenizer, plain).encode(CAPTIONS)[0]
    cosine = torch.nn.functional.cosine_similarity
    assert not (cosine(unsafe.float(), expected, dim=-1)[mask] > 0.99).all()  # clipped, or not even finite
    for block in plain.encoder.block:  # the weights themselves, without a detour through float16's range
        block.layer[1].DenseReluDense.wo.weight = torch.nn.Parameter(
            torch.empty_like(block.layer[1].DenseReluDense.wo.weight)
        )
    safe = make_float16_safe(plain)
    for block, source in zip(safe.encoder.block, encoder.model.encoder.block):
        block.layer[1].DenseReluDense.wo.weight.data.copy_(source.layer[1].DenseReluDense.wo.weight)
    embeds = CaptionEncoder(encoder.tokenizer, safe).encode(CAPTIONS)[0]
    assert embeds.dtype == torch.float16
    assert (cosine(embeds.float(), expected, dim=-1)[mask] > 0.999).all()


def test_float16_weights_are_loaded_by_these_rules(folder: Path) -> None:
    model = CaptionEncoder.from_pretrained(folder, dtype=torch.float16).model
    float32 = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert float32 == {f"encoder.block.{index}.layer.1.DenseReluDense.wo.weight" for index in range(2)}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16, torch.float32}
