"""DiT, and the PixArt that begins from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

from diffusion.checkpoints import build_dit, load_dit, load_transformer, read_weights, save_transformer
from diffusion.errors import CheckpointError
from diffusion.models import DiT, PixArt, PixArtMS, build_model, start_from_dit

SMALL = {"hidden_size": 48, "depth": 3, "num_heads": 2}


def trained(num_classes: int = 7, **options: object) -> DiT:
    """A DiT with no weight left at zero, as training leaves it."""
    torch.manual_seed(0)
    model = DiT(**{**SMALL, "input_size": 8, "num_classes": num_classes, **options})
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def inputs(batch: int = 3, size: tuple[int, int] = (8, 8)) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    captions = torch.randn(batch, 5, 16, generator=generator)
    return torch.randn(batch, 4, *size, generator=generator), captions, torch.ones(batch, 5, dtype=torch.bool)


def test_keys_and_size_are_those_of_the_public_file() -> None:
    """Facts about DiT-XL-2-256x256.pt: 675,129,632 parameters, 1,001 classes with the null class, 256 positions."""
    with torch.device("meta"):
        model = build_model("DiT_XL_2")
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) + model.pos_embed.numel() == 675_129_632
    assert shapes["pos_embed"] == (1, 256, 1152)
    assert shapes["y_embedder.embedding_table.weight"] == (1001, 1152)
    assert shapes["blocks.27.adaLN_modulation.1.weight"] == (6912, 1152)
    assert shapes["final_layer.adaLN_modulation.1.bias"] == (2304,)
    assert shapes["final_layer.linear.weight"] == (32, 1152)
    assert len(shapes) == 1 + 2 + 4 + 1 + 28 * 10 + 4


def test_output_equals_that_of_diffusers() -> None:
    model = trained()
    theirs = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=7, activation_fn="gelu-approximate", norm_eps=1e-6,
    ).eval()  # fmt: skip
    theirs.load_state_dict(to_diffusers(model.state_dict(), theirs))
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # DiT's frequencies; diffusers has 1 here
    latents, times, classes = inputs()[0], torch.tensor([0, 500, 999]), torch.tensor([0, 3, 6])
    with torch.no_grad():
        expected = theirs(latents, times, classes).sample
        found = model(latents, times, classes)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def to_diffusers(state: dict[str, torch.Tensor], model: DiTTransformer2DModel) -> dict[str, torch.Tensor]:
    """diffusers repeats the embedders in every block, and its last layer modulates by one linear layer."""
    result = {key: tensor for key, tensor in model.state_dict().items() if key.startswith("pos_embed.pos_embed")}
    for kind in ("weight", "bias"):
        result[f"pos_embed.proj.{kind}"] = state[f"x_embedder.proj.{kind}"]
        result[f"proj_out_1.{kind}"] = state[f"final_layer.adaLN_modulation.1.{kind}"]
        result[f"proj_out_2.{kind}"] = state[f"final_layer.linear.{kind}"]
        for index in range(3):
            ours, theirs = f"blocks.{index}.", f"transformer_blocks.{index}."
            for number, name in ((0, "linear_1"), (2, "linear_2")):
                result[f"{theirs}norm1.emb.timestep_embedder.{name}.{kind}"] = state[f"t_embedder.mlp.{number}.{kind}"]
            result[f"{theirs}norm1.linear.{kind}"] = state[f"{ours}adaLN_modulation.1.{kind}"]
            parts = state[f"{ours}attn.qkv.{kind}"].chunk(3)
            result |= {f"{theirs}attn1.to_{name}.{kind}": part for name, part in zip("qkv", parts)}
            result[f"{theirs}attn1.to_out.0.{kind}"] = state[f"{ours}attn.proj.{kind}"]
            result[f"{theirs}ff.net.0.proj.{kind}"] = state[f"{ours}mlp.fc1.{kind}"]
            result[f"{theirs}ff.net.2.{kind}"] = state[f"{ours}mlp.fc2.{kind}"]
    labels = state["y_embedder.embedding_table.weight"]
    for index in range(3):
        result[f"transformer_blocks.{index}.norm1.emb.class_embedder.embedding_table.weight"] = labels
    return result


@pytest.mark.parametrize("class_id", [None, 4])
@pytest.mark.parametrize("timestep", [500.0, 120.0])
def test_pixart_begins_as_the_dit(class_id: int | None, timestep: float) -> None:
    dit = trained()
    model = PixArt(**SMALL, input_size=8, caption_channels=16)
    start_from_dit(model, dit, timestep=timestep, class_id=class_id)
    latents, captions, mask = inputs()
    times = torch.full((3,), timestep)
    classes = torch.full((3,), 7 if class_id is None else class_id)
    with torch.no_grad():
        expected, found = dit(latents, times, classes), model.eval()(latents, times, captions, mask)
        other = model(latents, times + 100, captions, mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert expected.abs().max() > 0.1
    assert (other - dit(latents, times + 100, classes)).abs().max() > 1e-3  # one timestep alone is exact


def test_a_pixart_for_many_sizes_begins_as_the_dit_too() -> None:
    dit = trained()
    model = start_from_dit(PixArtMS(**SMALL, input_size=8, caption_channels=16), dit)
    latents, captions, mask = inputs(size=(8, 12))
    sizes = {"img_hw": torch.tensor([[64.0, 96.0]] * 3), "aspect_ratio": torch.full((3,), 0.67)}
    with torch.no_grad():
        found = model.eval()(latents, torch.full((3,), 500.0), captions, mask, **sizes)
        expected = dit(latents, torch.full((3,), 500), torch.full((3,), 7))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_every_weight_learns_after_the_start() -> None:
    model = start_from_dit(PixArtMS(**SMALL, input_size=8, caption_channels=16), trained()).train()
    latents, captions, mask = inputs()
    sizes = {"img_hw": torch.full((3, 2), 64.0), "aspect_ratio": torch.ones(3)}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):  # what lies below a layer of zeros moves from the second step on
        optimizer.zero_grad()
        model(latents, torch.full((3,), 500.0), captions, mask, **sizes).square().mean().backward()
        optimizer.step()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == []


def test_what_does_not_fit_is_named() -> None:
    dit = trained()
    with pytest.raises(ValueError, match=r"depth=2 \(DiT 3\)"):
        start_from_dit(PixArt(**{**SMALL, "depth": 2}, input_size=8, caption_channels=16), dit)
    with pytest.raises(ValueError, match="qk_norm, which no DiT has"):
        start_from_dit(PixArt(**SMALL, input_size=8, caption_channels=16, qk_norm=True), dit)
    with pytest.raises(ValueError, match="class_id=8 must be between 0 and 7"):
        start_from_dit(PixArt(**SMALL, input_size=8, caption_channels=16), dit, class_id=8)


def test_files_and_folders_of_dit(tmp_path: Path) -> None:
    model = trained()
    torch.save(model.state_dict(), tmp_path / "DiT.pt")
    save_transformer(model, tmp_path / "run" / "transformer", stored_null_caption=True)
    for source, options in ((tmp_path / "DiT.pt", {"num_heads": 2}), (tmp_path / "run", {})):
        opened = load_dit(source, **options)  # type: ignore[arg-type]
        assert opened.config == model.config
        assert all(torch.equal(tensor, opened.state_dict()[key]) for key, tensor in model.state_dict().items())
        with pytest.raises(CheckpointError, match="is a class-conditional DiT, which knows no captions"):
            load_transformer(source)
    with pytest.raises(CheckpointError, match="no shape tells the heads of 3 blocks of width 48; give num_heads"):
        load_dit(tmp_path / "DiT.pt")
    save_transformer(PixArt(**SMALL, input_size=8, caption_channels=16), tmp_path / "pixart")
    with pytest.raises(CheckpointError, match="is no class-conditional DiT"):
        build_dit(read_weights(tmp_path / "pixart"))
