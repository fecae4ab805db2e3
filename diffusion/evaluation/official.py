"""Prove on a user's machine that an official file is read right: counts, shapes, parity with diffusers, one picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.checkpoints import Checkpoint, config_to_diffusers, native_to_diffusers, open_checkpoint
from diffusion.checkpoints.download import file_sha256
from diffusion.checkpoints.published import RECORDED, Recorded
from diffusion.checkpoints.tensors import read_torch
from diffusion.errors import CheckpointError
from diffusion.inference import PixArtPipeline
from diffusion.inference.recipe import library_versions
from diffusion.models import PixArt

PROMPT = "A small cactus with a happy face in the Sahara desert."
_XL = {"hidden_size": 1152, "depth": 28, "num_heads": 16}
_TOLERANCE = 1e-5  # relative error of the outputs, float32
_MAX_LATENT_SIDE = 64  # of the parity check: larger grids compute the same, slower


@dataclass
class Report:
    """Results, a line each, as a text for an issue.

    Args:
        lines: (mark, text); mark "ok" or "FAIL" for checks, "info" for facts.
    """

    source: str
    lines: list[tuple[str, str]] = field(default_factory=list)

    def info(self, text: str) -> None:
        self.lines.append(("info", text))

    def check(self, passed: bool, text: str) -> None:
        self.lines.append(("ok" if passed else "FAIL", text))

    @property
    def failures(self) -> int:
        return sum(mark == "FAIL" for mark, _ in self.lines)

    def text(self) -> str:
        """Markdown: a heading with the verdict and a block of lines."""
        checks = sum(mark != "info" for mark, _ in self.lines)
        verdict = f"{checks - self.failures} of {checks} checks passed"
        body = "\n".join(f"{mark:<5}{text}" for mark, text in self.lines)
        return f"### {Path(self.source).name}: {verdict}\n\n```\n{body}\n```\n"


def verify_official(
    path: str | Path,
    *,
    name: str | None = None,
    pipeline: str | Path | None = None,
    picture: str | Path = "output/verified.png",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    recorded: Mapping[str, Recorded] = RECORDED,
) -> Report:
    """Check a published checkpoint on this machine.

    Args:
        path: the file, folder or hub id.
        name: which published model it is, when its file name does not say.
        pipeline: folder of tokenizer, T5 and VAE; then one picture is drawn, in `dtype`, and written to `picture`.
        device: of the parity check (always float32) and the picture.
    Raises:
        CheckpointError: the file cannot be opened at all, see `open_checkpoint`; or an unknown `name`.
    """
    report = Report(str(path))
    versions = ", ".join(f"{library} {version}" for library, version in library_versions().items())
    report.info(f"{versions}; device {_device_name(torch.device(device))}")
    if Path(path).is_file():
        report.info(f"{Path(path).stat().st_size} bytes, sha256 {file_sha256(Path(path))}")
        _describe_torch_file(Path(path), report)
    checkpoint = open_checkpoint(path)
    report.info(checkpoint.found.describe())
    _check_counts(checkpoint, name, recorded, report)
    _describe_buffers(checkpoint, report)
    network = checkpoint.build(device)
    _check_parity(network, report)
    del network
    if pipeline is not None:
        _check_picture(checkpoint, path, pipeline, Path(picture), torch.device(device), dtype, report)
    return report


def _describe_torch_file(path: Path, report: Report) -> None:
    """What lies beside the weights: nobody has recorded whether published files hold averages."""
    if path.suffix == ".safetensors":
        return
    content = read_torch(path)
    report.info(
        f"top level: {', '.join(map(str, content))}" if "state_dict" in content else "top level: bare state dict"
    )


def _check_counts(checkpoint: Checkpoint, name: str | None, recorded: Mapping[str, Recorded], report: Report) -> None:
    """Keys, parameters and every shape against the record of the model's name."""
    if name is not None and name not in recorded:
        raise CheckpointError(f"name={name!r} is no published model; choose one of {', '.join(recorded)}")
    stem = Path(checkpoint.source).name.removesuffix(".pth").removesuffix(".safetensors")
    known = recorded.get(name if name is not None else stem)
    if known is None:
        report.info(f"no published model is called {stem}; --name compares with a record")
        return
    found = checkpoint.found
    native = found.layout == "native"
    keys = {known.num_keys} if native else {known.num_diffusers_keys, known.num_diffusers_keys + 1}  # null caption
    report.check(found.num_keys in keys, f"keys: {found.num_keys}, recorded {' or '.join(map(str, sorted(keys)))}")
    report.check(
        found.num_parameters == known.num_parameters,
        f"parameters: {found.num_parameters:,}, recorded {known.num_parameters:,}",
    )
    report.check(
        found.control_blocks == known.control_blocks,
        f"control blocks: {found.control_blocks}, recorded {known.control_blocks}",
    )
    with torch.device("meta"):
        model = known.network(**{**_XL, **known.options})
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    given = {key: tuple(tensor.shape) for key, tensor in checkpoint.state_dict.items()}
    wrong = [key for key, shape in given.items() if expected.get(key) != shape]
    report.check(not wrong, f"shapes: {len(given)} compared" + (f", other: {', '.join(wrong)}" if wrong else ""))
    report.check(found.config == model.config, f"recognised as recorded: {found.config == model.config}")


def _describe_buffers(checkpoint: Checkpoint, report: Report) -> None:
    null = checkpoint.state_dict.get("y_embedder.y_embedding")
    if null is None:
        report.info("null caption: none in the file")
    else:
        value = null.float()
        first = ", ".join(f"{number:.5f}" for number in value.flatten()[:4].tolist())
        report.info(f"null caption: std {value.std():.6f}, mean {value.mean():.2e}, begins {first}")
    report.info(f"position table: {'in the file' if 'pos_embed' in checkpoint.state_dict else 'not in the file'}")


@torch.no_grad()
def _check_parity(network: PixArt, report: Report) -> None:
    """Our network and diffusers' on the same noise, times, captions with padding, and sizes; the weights are shared."""
    from diffusers import PixArtTransformer2DModel

    try:
        plain = replace(
            network.config, prediction_type="epsilon", flow_shift=1.0
        )  # diffusers' network has no word for it
        config = {key: value for key, value in config_to_diffusers(plain).items() if not key.startswith("_")}
    except CheckpointError as error:
        report.info(f"parity with diffusers: not possible ({error})")
        return
    with torch.device("meta"):
        stock: Any = PixArtTransformer2DModel(**config)
    stock.load_state_dict(native_to_diffusers(network.state_dict()), assign=True)
    # Its position table is no weight; the real one is made on the CPU and moved.
    stock.pos_embed.pos_embed = _stock_positions(config).to(network.device)
    stock.eval()
    latents, times, captions, mask, size, ratio = (value.to(network.device) for value in _inputs(network))
    micro = network.config.micro_condition
    ours = network(latents, times, captions, mask, **({"img_hw": size, "aspect_ratio": ratio} if micro else {}))
    theirs = stock(
        latents,
        encoder_hidden_states=captions,
        timestep=times,
        encoder_attention_mask=mask,
        added_cond_kwargs={"resolution": size if micro else None, "aspect_ratio": ratio[:, None] if micro else None},
        return_dict=False,
    )[0]
    difference = ((ours - theirs).norm() / theirs.norm()).item()
    shape = "x".join(map(str, latents.shape))
    report.check(
        difference <= _TOLERANCE and bool(theirs.norm() > 0),
        f"parity with diffusers on {shape}, float32: relative error {difference:.1e} (at most {_TOLERANCE:.0e})",
    )


def _stock_positions(config: Mapping[str, object]) -> Tensor:
    from diffusers import PixArtTransformer2DModel

    small: Any = PixArtTransformer2DModel(**{**config, "num_layers": 0})
    table: Tensor = small.pos_embed.pos_embed
    return table


def _inputs(network: PixArt) -> list[Tensor]:
    """Latents wider than high, times, captions of two lengths, mask, sizes and ratios; from a fixed seed."""
    config = network.config
    generator = torch.Generator().manual_seed(0)
    side = min(config.input_size, _MAX_LATENT_SIDE)
    latents = torch.randn(2, config.in_channels, side // 4 * 3, side, generator=generator)
    captions = torch.randn(2, 20, config.caption_channels, generator=generator)
    mask = torch.ones(2, 20)
    mask[0, 7:] = 0
    size, ratio = torch.tensor([[768.0, 1024.0], [512.0, 640.0]]), torch.tensor([0.75, 0.8])
    return [latents, torch.tensor([999.0, 20.5]), captions, mask, size, ratio]


def _check_picture(
    checkpoint: Checkpoint,
    path: str | Path,
    parts: str | Path,
    picture: Path,
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
) -> None:
    if checkpoint.control:
        report.info("picture: not drawn of a ControlNet")
        return
    algorithm, steps, guidance = ("lcm", 4, 1.0) if checkpoint.found.lcm else ("dpm-solver", 20, 4.5)
    pipeline = PixArtPipeline.from_pretrained(
        parts, transformer=path, algorithm=algorithm, device=device, torch_dtype=dtype
    )
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(PROMPT, num_inference_steps=steps, guidance_scale=guidance, seed=0).images[0]
    picture.parent.mkdir(parents=True, exist_ok=True)
    image.save(picture)
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).float()
    report.check(
        bool(pixels.std() > 5),
        f"picture: {image.width}x{image.height} in {picture}, {algorithm} {steps} steps, {dtype}, "
        f"mean {pixels.mean():.1f}, std {pixels.std():.1f}: look at it",
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
