"""The network: official keys and shapes, initial statistics, padding, sizes, equality with diffusers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion.checkpoints import config_to_diffusers, native_to_diffusers
from diffusion.errors import ConfigError
from diffusion.models import PixArt, PixArtMS, build_model, latent_transformer
from diffusion.models.embeddings import sincos_position_embedding, sinusoid

SMALL = {"hidden_size": 96, "num_heads": 2, "depth": 3, "caption_channels": 24, "input_size": 8}


def randomized(model: PixArt, seed: int = 0) -> PixArt:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def inputs(height: int = 8, width: int = 8, length: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, 3:] = False
    return {
        "latents": torch.randn(2, 4, height, width, generator=generator),
        "timesteps": torch.tensor([3.7, 801.0]),
        "caption_embeds": torch.randn(2, length, 24, generator=generator),
        "caption_mask": mask,
    }


def expected_shapes(pos_tokens: int, max_length: int, micro: bool) -> dict[str, tuple[int, ...]]:
    d = 1152
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, pos_tokens, d), "y_embedder.y_embedding": (max_length, 4096)}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    shapes["x_embedder.proj.weight"], shapes["x_embedder.proj.bias"] = (d, 4, 2, 2), (d,)
    linear("t_embedder.mlp.0", d, 256)
    linear("t_embedder.mlp.2", d, d)
    linear("t_block.1", 6 * d, d)
    linear("y_embedder.y_proj.fc1", d, 4096)
    linear("y_embedder.y_proj.fc2", d, d)
    for name in ("csize_embedder", "ar_embedder") if micro else ():
        linear(f"{name}.mlp.0", 384, 256)
        linear(f"{name}.mlp.2", 384, 384)
    for i in range(28):
        shapes[f"blocks.{i}.scale_shift_table"] = (6, d)
        linear(f"blocks.{i}.attn.qkv", 3 * d, d)
        linear(f"blocks.{i}.attn.proj", d, d)
        linear(f"blocks.{i}.cross_attn.q_linear", d, d)
        linear(f"blocks.{i}.cross_attn.kv_linear", 2 * d, d)
        linear(f"blocks.{i}.cross_attn.proj", d, d)
        linear(f"blocks.{i}.mlp.fc1", 4 * d, d)
        linear(f"blocks.{i}.mlp.fc2", d, 4 * d)
    shapes["final_layer.scale_shift_table"] = (2, d)
    linear("final_layer.linear", 32, d)
    return shapes


@pytest.mark.parametrize(
    ("name", "options", "tokens", "parameters"),
    [
        ("PixArt_XL_2", {"input_size": 32}, 256, 610_856_096),
        ("PixArt_XL_2", {"input_size": 64}, 1024, 610_856_096),
        ("PixArtMS_XL_2", {"input_size": 128, "pe_interpolation": 2.0}, 4096, 611_349_152),
    ],
)
def test_official_keys_and_shapes(name: str, options: dict, tokens: int, parameters: int) -> None:
    with torch.device("meta"):
        model = build_model(name, **options)
    found = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert found == expected_shapes(tokens, 120, name.startswith("PixArtMS"))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_sigma_keys() -> None:
    compress = {"sampling": "conv", "scale_factor": 2, "layers": tuple(range(14, 28))}
    with torch.device("meta"):
        options = {"micro_condition": False, "qk_norm": True, "kv_compress": compress, "model_max_length": 300}
        model = build_model("PixArtMS_XL_2", **options)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert len(shapes) == 605
    assert shapes["blocks.14.attn.sr.weight"] == (1152, 1, 2, 2)
    assert shapes["blocks.27.attn.norm.weight"] == (1152,)
    assert shapes["blocks.0.attn.q_norm.weight"] == (1152,)
    assert "blocks.13.attn.sr.weight" not in shapes
    assert sum(p.numel() for p in model.parameters()) == 611_098_016


def test_initial_statistics() -> None:
    torch.manual_seed(0)
    model = PixArtMS(hidden_size=1152, depth=2, num_heads=16, caption_channels=512)
    block = model.blocks[1]
    for linear in (block.attn.qkv, block.mlp.fc1, block.cross_attn.q_linear):
        bound = (6 / (linear.in_features + linear.out_features)) ** 0.5
        assert linear.weight.abs().max() <= bound
        assert linear.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert linear.bias.abs().max() == 0
    for linear in (model.t_embedder.mlp[0], model.t_block[1], model.y_embedder.y_proj.fc2, model.csize_embedder.mlp[2]):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert block.scale_shift_table.std().item() == pytest.approx(1152**-0.5, rel=0.05)
    assert model.y_embedder.y_embedding.std().item() == pytest.approx(512**-0.5, rel=0.05)
    assert block.cross_attn.proj.weight.abs().max() == 0
    assert block.attn.proj.weight.abs().max() > 0
    assert model.x_embedder.proj.bias.abs().max() <= 0.25


def test_fresh_model_predicts_zero() -> None:
    output = PixArt(**SMALL)(**inputs())
    assert output.shape == (2, 8, 8, 8)
    assert output.abs().max() == 0


def test_tokens_lie_one_after_another() -> None:
    """A view of the convolution's output would be transposed again by every block."""
    model = PixArt(input_size=8, hidden_size=48, depth=1, num_heads=4, caption_channels=24)
    assert model.embed_latents(torch.randn(2, 4, 8, 8)).is_contiguous()


def test_position_embedding_values() -> None:
    table = sincos_position_embedding(8, (2, 3), base_size=4)[0]
    torch.testing.assert_close(table[1][:4], torch.tensor([0.9719, 0.0133, 0.2352, 0.9999]), atol=1e-4, rtol=0)
    torch.testing.assert_close(table[3][4:], torch.tensor([0.9093, 0.02, -0.4161, 0.9998]), atol=1e-4, rtol=0)
    torch.testing.assert_close(sincos_position_embedding(8, (4, 4), 4, 2.0)[0, 2, 0], torch.sin(torch.tensor(1.0)))


def test_position_embedding_within_another_device() -> None:
    model = PixArt(**SMALL)
    expected = model.position_embedding()
    latent_transformer._position_embedding.cache_clear()
    with torch.device("meta"):  # as models are built on the device they run on
        table = model.position_embedding()
    assert torch.equal(table, expected)


def test_sinusoid_is_cosine_first_and_keeps_fractions() -> None:
    features = sinusoid(torch.tensor([0.25]))
    assert features[0, 0].item() == pytest.approx(0.968912)
    assert features[0, 128].item() == pytest.approx(0.247404)


@pytest.mark.parametrize("size", [(8, 8), (12, 6)])
@pytest.mark.parametrize("micro", [False, True])
def test_equals_diffusers(size: tuple[int, int], micro: bool) -> None:
    model = randomized(PixArt(**SMALL, micro_condition=micro, pe_interpolation=2.0))
    config = {k: v for k, v in config_to_diffusers(model.config).items() if not k.startswith("_")}
    stock = PixArtTransformer2DModel(**config).eval()
    missing, unexpected = stock.load_state_dict(native_to_diffusers(model.state_dict()), strict=False)
    assert not unexpected
    assert all("pos_embed" in key for key in missing)
    batch = inputs(*size)
    hw, ratio = torch.tensor([[512.0, 700.0], [300.0, 444.0]]), torch.tensor([0.7, 1.3])
    sizes = {"img_hw": hw, "aspect_ratio": ratio} if micro else {}
    extra = {"resolution": hw if micro else None, "aspect_ratio": ratio[:, None] if micro else None}
    with torch.no_grad():
        ours = model(**batch, **sizes)
        theirs = stock(
            batch["latents"],
            encoder_hidden_states=batch["caption_embeds"],
            timestep=batch["timesteps"],
            encoder_attention_mask=batch["caption_mask"].float(),
            added_cond_kwargs=extra,
            return_dict=False,
        )[0]
    assert theirs.norm() > 1
    assert (ours - theirs).norm() / theirs.norm() <= 1e-5


@pytest.mark.parametrize("qk_norm", [False, True])
def test_padding_never_changes_a_result(qk_norm: bool) -> None:
    model = randomized(PixArt(**SMALL, qk_norm=qk_norm))
    batch = inputs()
    with torch.no_grad():
        reference = model(**batch)
        batch["caption_embeds"][0, 3:] = 1e3
        changed = model(**batch)
        longer = {
            **batch,
            "caption_embeds": nn.functional.pad(batch["caption_embeds"], (0, 0, 0, 5), value=9.0),
            "caption_mask": nn.functional.pad(batch["caption_mask"], (0, 5)),
        }
        padded = model(**longer)
    torch.testing.assert_close(changed, reference)
    torch.testing.assert_close(padded, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampling", ["conv", "ave", "uniform"])
def test_kv_compression_changes_only_listed_blocks(sampling: str) -> None:
    plain = randomized(PixArt(**SMALL))
    listed = PixArt(**SMALL, kv_compress={"sampling": sampling, "scale_factor": 2, "layers": (2,)})
    listed.load_state_dict(plain.state_dict(), strict=False)
    listed.eval()
    with torch.no_grad():
        difference = (listed(**inputs()) - plain(**inputs())).abs().max()
    assert difference > 1e-6
    assert listed.blocks[2].attn.sr_ratio == 2
    assert listed.blocks[1].attn.sr_ratio == 1


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for every, selective in ((0, False), (1, False), (2, False), (1, True), (2, True)):
        model = randomized(PixArt(**SMALL)).train()
        model.enable_gradient_checkpointing(every, selective=selective)
        model(**inputs()).square().mean().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
    torch.testing.assert_close(gradients[3], gradients[0])
    torch.testing.assert_close(gradients[4], gradients[0])


class OperatorCount(TorchDispatchMode):
    """How often each operator runs; what a checkpoint gives from its cache does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.counts[function.name().split(".")[0].removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


def test_gradient_checkpointing_recomputes_what_the_policy_says() -> None:
    """Selective runs no matrix product and no attention twice, but the norms; the others all of it, by blocks."""
    counts = {}
    for name, every, selective in (("off", 0, False), ("blocks", 1, False), ("half", 2, False), ("selective", 1, True)):
        model = randomized(PixArt(**SMALL)).train()
        model.enable_gradient_checkpointing(every, selective=selective)
        with OperatorCount() as counter:
            model(**inputs()).square().mean().backward()
        counts[name] = counter.counts
    off, depth = counts["off"], SMALL["depth"]
    for operator in ("_scaled_dot_product_flash_attention_for_cpu", "addmm"):
        assert counts["selective"][operator] == off[operator]
    repeated = {name: count["_scaled_dot_product_flash_attention_for_cpu"] for name, count in counts.items()}
    assert repeated == {"off": 2 * depth, "selective": 2 * depth, "blocks": 4 * depth, "half": 2 * depth + 4}
    for name in ("blocks", "selective"):
        assert counts[name]["native_layer_norm"] == off["native_layer_norm"] + 2 * depth
    assert counts["blocks"]["addmm"] > off["addmm"]


def test_fp32_attention_acts_under_autocast() -> None:
    model = randomized(PixArt(**SMALL))
    with torch.no_grad():
        exact = model(**inputs())
        with torch.autocast("cpu", torch.bfloat16):
            low = model(**inputs())
            model.use_fp32_attention()
            high = model(**inputs())
    assert not torch.equal(low, high)
    assert (high - exact).norm() / exact.norm() < 0.05


def test_errors_name_the_remedy() -> None:
    with pytest.raises(ConfigError, match="did you mean 'PixArt_XL_2'"):
        build_model("PixArt_XL2")
    with pytest.raises(ConfigError, match=r"'num_head'.*'num_heads'"):
        build_model("PixArt_Ti_2", num_head=3)
    with pytest.raises(ValueError, match="do not divide"):
        PixArt(**SMALL)(**inputs(7, 8))
    with pytest.raises(ValueError, match="needs img_hw"):
        PixArtMS(**SMALL)(**inputs())
    with pytest.raises(ValueError, match="takes no img_hw"):
        PixArt(**SMALL)(**inputs(), img_hw=torch.ones(2, 2))
