"""Conversion there and back is exact, and what is written runs in stock diffusers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion.checkpoints import (
    config_to_diffusers,
    diffusers_to_native,
    native_to_diffusers,
    open_checkpoint,
    read_native,
    save_transformer,
)
from diffusion.checkpoints.conversion import require_flags, write_diffusers, write_native
from diffusion.checkpoints.keys import NATIVE_ONLY
from diffusion.errors import CheckpointError
from diffusion.models import PixArt, PixArt_XL_2, PixArtMS_XL_2
from tests.checkpoints.tiny_files import SIGMA_OPTIONS, control_state, same_tensors, small_model
from tests.doors import Door
from tests.tiny import TINY_TEXT_CHANNELS, write_tiny_pipeline_parts

FULL_SIZE = [
    (PixArt_XL_2, {"input_size": 32}),
    (PixArt_XL_2, {"input_size": 64}),
    (PixArtMS_XL_2, {"input_size": 128, "pe_interpolation": 2.0}),
    (PixArtMS_XL_2, {"input_size": 64, "micro_condition": False, "model_max_length": 300}),
    (PixArtMS_XL_2, {"input_size": 256, "micro_condition": False, "model_max_length": 300, "pe_interpolation": 4.0}),
]


@pytest.mark.parametrize(("factory", "options"), FULL_SIZE)
def test_full_size_keys_and_shapes_are_those_of_diffusers_and_return(factory, options: dict) -> None:  # type: ignore[no-untyped-def]
    with torch.device("meta"):
        model = factory(**options)
        config = {key: value for key, value in config_to_diffusers(model.config).items() if not key.startswith("_")}
        stock = PixArtTransformer2DModel(**config)
    native = model.state_dict()
    converted = native_to_diffusers(native)
    assert {key: tensor.shape for key, tensor in converted.items()} == {
        key: tensor.shape for key, tensor in stock.state_dict().items()
    }
    back = {key: tensor.shape for key, tensor in diffusers_to_native(converted).items()}
    assert back == {key: tensor.shape for key, tensor in native.items() if key not in NATIVE_ONLY}


def outputs(model: PixArt, stock: PixArtTransformer2DModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Both networks on the same noise, captions, padding and sizes."""
    generator = torch.Generator().manual_seed(0)
    side = model.config.input_size
    latents = torch.randn(2, 4, side, side + 4, generator=generator)
    captions = torch.randn(2, 7, model.config.caption_channels, generator=generator)
    mask = torch.ones(2, 7)
    mask[0, 4:] = 0
    times = torch.tensor([999.0, 20.5])
    micro = model.config.micro_condition
    size, ratio = torch.tensor([[64.0, 96.0]] * 2), torch.tensor([0.7, 1.4])
    with torch.no_grad():
        ours = model(latents, times, captions, mask, **({"img_hw": size, "aspect_ratio": ratio} if micro else {}))
        added = {"resolution": size if micro else None, "aspect_ratio": ratio[:, None] if micro else None}
        theirs = stock(
            latents,
            encoder_hidden_states=captions,
            timestep=times,
            encoder_attention_mask=mask,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
    return ours, theirs


@pytest.mark.parametrize(
    "options",
    [{}, {"micro_condition": True, "pe_interpolation": 2.0}, {"model_max_length": 300, "pe_interpolation": 0.125}],
    ids=["alpha", "alpha-MS", "sigma"],
)
def test_there_and_back_is_exact_and_stock_diffusers_computes_the_same(tmp_path: Path, options: dict) -> None:
    model = small_model(**options)
    state = model.state_dict()
    torch.save({"state_dict": state, "optimizer": {}}, tmp_path / "orig.pth")
    checkpoint = open_checkpoint(tmp_path / "orig.pth", num_heads=2)
    dumped = write_diffusers(checkpoint, tmp_path / "dump")
    stock, info = PixArtTransformer2DModel.from_pretrained(str(dumped / "transformer"), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours, theirs = outputs(model, stock.eval())
    assert theirs.norm() > 0.1
    assert (ours - theirs).norm() / theirs.norm() <= 1e-5
    write_native(open_checkpoint(dumped), tmp_path / "back.pth")
    assert same_tensors(read_native(tmp_path / "back.pth"), dict(state))


def test_a_position_table_of_another_making_survives(tmp_path: Path) -> None:
    state = small_model().state_dict()
    state["pos_embed"] = torch.nextafter(state["pos_embed"], torch.tensor(2.0))  # as numpy's sine may round
    torch.save({"state_dict": state}, tmp_path / "orig.pth")
    write_diffusers(open_checkpoint(tmp_path / "orig.pth", num_heads=2), tmp_path / "dump")
    write_native(open_checkpoint(tmp_path / "dump"), tmp_path / "back.pth")
    assert same_tensors(read_native(tmp_path / "back.pth"), dict(state))


def test_a_single_file_tells_what_it_is(tmp_path: Path) -> None:
    model = small_model(**SIGMA_OPTIONS)
    torch.save(model.state_dict(), tmp_path / "sigma.pth")
    checkpoint = open_checkpoint(tmp_path / "sigma.pth", num_heads=2)
    path = write_native(checkpoint, tmp_path / "my-sigma.safetensors", dtype=torch.bfloat16)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["modelspec.architecture"] == "pixart-sigma"
    assert header["modelspec.resolution"] == "64x64"
    assert header["modelspec.title"] == "my-sigma"
    opened = open_checkpoint(path)  # num_heads comes from the header
    assert opened.found.config == model.config
    assert opened.found.dtypes == ("bfloat16",)
    assert torch.equal(opened.state_dict["t_block.1.weight"], model.state_dict()["t_block.1.weight"].bfloat16())
    with pytest.raises(CheckpointError, match="exists"):
        write_native(checkpoint, path)
    with pytest.raises(CheckpointError, match="must end with"):
        write_native(checkpoint, tmp_path / "a.ckpt")


def test_what_diffusers_has_no_place_for_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    torch.save(small_model(**SIGMA_OPTIONS).state_dict(), tmp_path / "sigma.pth")
    torch.save(control_state(small_model()), tmp_path / "control.pth")
    for name, reason in (("sigma.pth", "no qk_norm or kv_compress"), ("control.pth", "is a ControlNet")):
        with pytest.raises(CheckpointError, match=reason):
            write_diffusers(open_checkpoint(tmp_path / name, num_heads=2), tmp_path / "dump")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["control.pth", "sigma.pth"]


def test_flags_are_checked_against_the_file(tmp_path: Path) -> None:
    torch.save(small_model(input_size=128).state_dict(), tmp_path / "a.pth")
    found = open_checkpoint(tmp_path / "a.pth", num_heads=2).found
    require_flags(found, "a.pth", multi_scale_train=False, qk_norm=False)
    with pytest.raises(CheckpointError, match="has no size conditions .*--multi_scale_train=False would say"):
        require_flags(found, "a.pth", multi_scale_train=True)
    with pytest.raises(CheckpointError, match="has no qk_norm; leave --qk_norm out"):
        require_flags(found, "a.pth", qk_norm=True)


def test_the_readme_commands_convert_a_whole_pipeline_and_back(tmp_path: Path, run: Door) -> None:
    model = small_model(caption_channels=TINY_TEXT_CHANNELS)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pth")
    parts = write_tiny_pipeline_parts(tmp_path / "parts")
    (parts / "model_index.json").unlink()
    dump = tmp_path / "dump"
    flags = ["--image_size", 64, "--multi_scale_train", "False", "--orig_ckpt_path", tmp_path / "model.pth"]
    flags += ["--dump_path", dump, "--num_heads", 2]
    whole = ["--only_transformer=False", "--pipeline_load_from", parts]
    done = run("tools/convert_pixart_alpha_to_diffusers.py", *flags, *whole)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {parts} is no pipeline folder (no model_index.json); give a diffusers pipeline\n",
    )
    (parts / "model_index.json").write_text(
        '{"_class_name": "PixArtAlphaPipeline", "text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": '
        '["transformers", "T5Tokenizer"], "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", '
        '"DPMSolverMultistepScheduler"]}'
    )
    done = run("tools/convert_pixart_alpha_to_diffusers.py", *flags, *whole)
    assert done.stderr == f"error: {parts} lacks scheduler; give a complete diffusers pipeline\n"
    (parts / "scheduler").mkdir()
    (parts / "scheduler/scheduler_config.json").write_text('{"_class_name": "DPMSolverMultistepScheduler"}')
    done = run(
        "tools/convert_pixart_alpha_to_diffusers.py", *flags, *whole, "--single_file", tmp_path / "comfy.safetensors"
    )
    assert done.returncode == 0, done.stderr
    assert "found: PixArt-alpha 64 px" in done.stdout
    pipe = PixArtAlphaPipeline.from_pretrained(str(dump))
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a cat", num_inference_steps=2, height=64, width=64, use_resolution_binning=False).images[0]
    assert picture.size == (64, 64)
    done = run("tools/convert_diffusers_to_pixart.py", "--safetensor_path", dump, "--pth_path", tmp_path / "back.pth")
    assert done.returncode == 0, done.stderr
    assert same_tensors(read_native(tmp_path / "back.pth"), dict(model.state_dict()))
    assert open_checkpoint(tmp_path / "comfy.safetensors").found.config == model.config


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything of a pipeline but its transformer."""
    folder = write_tiny_pipeline_parts(tmp_path_factory.mktemp("conversion") / "parts")
    DPMSolverMultistepScheduler().save_pretrained(str(folder / "scheduler"))
    libraries = {"text_encoder": "transformers", "tokenizer": "transformers", "vae": "diffusers"}
    classes = {"text_encoder": "T5EncoderModel", "tokenizer": "T5Tokenizer", "vae": "AutoencoderKL"}
    index = {name: [libraries[name], classes[name]] for name in classes}
    index["scheduler"] = ["diffusers", "DPMSolverMultistepScheduler"]
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "PixArtSigmaPipeline", **index}))
    return folder


@pytest.mark.parametrize(
    ("flags", "side", "scale"),
    [([], 64, 1.0), (["--image_size", 256], 32, 0.5), (["--image_size", 1024, "--multistep", "True"], 128, 2.0)],
)
def test_the_command_of_sigma_makes_a_pipeline_of_a_file_that_tells_nothing(
    flags: list[object], side: int, scale: float, parts: Path, tmp_path: Path, run: Door
) -> None:
    model = small_model(caption_channels=TINY_TEXT_CHANNELS, model_max_length=300)
    tensors = {key: tensor.contiguous() for key, tensor in native_to_diffusers(model.state_dict()).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    command = ["tools/convert_diffusers_to_pipeline.py", "--safetensors_path", tmp_path / "model.safetensors"]
    command += ["--output_folder", tmp_path / "out", "--pipeline_load_from", parts, "--num_heads", 2, *flags]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert f"found: PixArt-sigma {8 * side} px" in done.stdout
    assert same_tensors(load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors"), tensors)
    pipe = PixArtSigmaPipeline.from_pretrained(str(tmp_path / "out"))
    assert (pipe.transformer.config.sample_size, pipe.transformer.config.interpolation_scale) == (side, scale)
    assert not pipe.transformer.config.use_additional_conditions
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    pipe.set_progress_bar_config(disable=True)
    sizes = {"height": 64, "width": 64, "use_resolution_binning": False}
    assert pipe("a cat", num_inference_steps=2, clean_caption=False, **sizes).images[0].size == (64, 64)


def test_a_pipeline_of_a_file_that_tells_what_it_is(parts: Path, tmp_path: Path, run: Door) -> None:
    save_transformer(small_model(caption_channels=TINY_TEXT_CHANNELS), tmp_path / "alpha")
    write_native(open_checkpoint(tmp_path / "alpha"), tmp_path / "alpha.safetensors")
    command = ["tools/convert_diffusers_to_pipeline.py", "--output_folder", tmp_path / "out"]
    command += ["--pipeline_load_from", parts, "--safetensors_path"]
    done = run(*command, tmp_path / "alpha.safetensors", "--image_size", 512)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "is a model for 64 px" in done.stderr and "give 64 or leave it out" in done.stderr
    assert not (tmp_path / "out").exists()
    done = run(*command, tmp_path / "alpha.safetensors")
    assert done.returncode == 0, done.stderr
    assert "found: PixArt-alpha 64 px" in done.stdout and "120 caption tokens" in done.stdout
    assert json.loads((tmp_path / "out/model_index.json").read_text())["_class_name"] == "PixArtAlphaPipeline"
    assert run(*command, tmp_path / "alpha.safetensors").stderr.count("exists") == 1


def test_the_code_of_the_docs_mixes_two_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs/checkpoints.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "lerp" in code]
    first, second = small_model(), small_model()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1)
    save_transformer(first, tmp_path / "first")
    save_transformer(second, tmp_path / "second")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    mixed = open_checkpoint("mixed").state_dict
    for key, parameter in first.named_parameters():
        torch.testing.assert_close(mixed[key], parameter.detach() + 0.3)


def test_bad_flags_are_explained(tmp_path: Path, run: Door) -> None:
    torch.save(small_model().state_dict(), tmp_path / "a.pth")
    base = ["--orig_ckpt_path", tmp_path / "a.pth", "--dump_path", tmp_path / "dump", "--num_heads", 2]
    done = run("tools/convert_pixart_alpha_to_diffusers.py", *base, "--image_size", 512)
    assert done.returncode == 2
    assert "is a model for 64 px" in done.stderr and done.stderr.count("\n") == 1
    done = run("tools/convert_pixart_to_diffusers.py", *base, "--only_transformer=Maybe")
    assert "'Maybe' is neither True nor False" in done.stderr
    assert not (tmp_path / "dump").exists()
