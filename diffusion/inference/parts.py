"""The parts of a pipeline: loading, saving, and where they are."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import CpuOffload
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from diffusion.checkpoints.recognition import VAE_FACTOR
from diffusion.errors import CheckpointError, PromptError
from diffusion.images import load_vae, vae_factor
from diffusion.inference.captions import CaptionEncoding
from diffusion.inference.control import load_edge_detector, load_networks
from diffusion.inference.fast import FastSampling
from diffusion.inference.folders import (
    GUIDANCE_SCALE,
    PARTS,
    load_scheduler,
    part_variant,
    pipeline_folder,
    require_files,
    save_pipeline,
    usual_guidance,
)
from diffusion.inference.fp8 import is_quantized
from diffusion.inference.lora import LoraAdapters, require_plain
from diffusion.inference.memory import (
    MemoryPlan,
    Residency,
    Workload,
    choose_plan,
    expected_peak,
    tile_vae,
)
from diffusion.inference.solvers import fitting_scheduler
from diffusion.models import HED, ControlPixArt, PixArt
from diffusion.models.cpu_linear import use_onednn
from diffusion.text import CaptionEncoder, load_tokenizer, make_float16_safe

if TYPE_CHECKING:
    from typing_extensions import Self

_logger = logging.getLogger(__name__)
OWN: Any = object()  # an argument left out: the folder's own part, where None means to go without


class PipelineParts(CaptionEncoding, LoraAdapters, FastSampling, DiffusionPipeline):
    """Tokenizer, T5, VAE, native network and scheduler as a pipeline of diffusers, without the drawing.

    `controlnet` (or None) is a `ControlPixArt` around `transformer`, and shares its weights; `edge_detector` (or None)
    makes condition pictures of photographs.

    `null_caption` and `clean_captions` are what calls do that do not say: "t5_empty" and False, the conventions of
    diffusers folders and of models trained here; "stored" and True are those of native official files.
    `usual_guidance` is their guidance_scale, as the folder names it (`folders.usual_guidance`) or 4.5.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"  # type: ignore[assignment]
    _optional_components = ["controlnet", "edge_detector"]  # noqa: RUF012 (diffusers reads this name)
    tokenizer: Any
    text_encoder: Any
    vae: Any
    transformer: Any
    scheduler: Any
    controlnet: ControlPixArt | None
    edge_detector: HED | None
    null_caption = "t5_empty"
    clean_captions = False
    usual_guidance = GUIDANCE_SCALE
    fused_loras: tuple[dict[str, Any], ...] | list[dict[str, Any]] = ()  # of which recipes speak
    _residency: Residency | None = None
    _known_device: torch.device | None = None

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        transformer: Any,
        scheduler: Any,
        controlnet: ControlPixArt | None = None,
        edge_detector: HED | None = None,
    ) -> None:
        super().__init__()
        if controlnet is not None and controlnet.base_model is not transformer:
            raise ValueError("controlnet must be built around transformer; see load_controlnet(path, transformer)")
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
            controlnet=controlnet,
            edge_detector=edge_detector,
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | Path,
        *,
        transformer: str | Path | PixArt | ControlPixArt | None = OWN,
        controlnet: str | Path | None = None,
        edge_detector: str | Path | HED | None = None,
        text_encoder: str | Path | nn.Module | None = OWN,
        vae: str | Path | nn.Module | None = OWN,
        scheduler: Any = None,
        ema: bool = False,
        algorithm: str | None = None,
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        revision: str | None = None,
        use_safetensors: bool | None = None,
        image_size: int | None = None,
    ) -> Self:
        """Load a pipeline folder, or a model of the hub by its name.

        Args:
            folder: tokenizer, text_encoder, vae, scheduler, and transformer unless given; see `pipeline_folder`.
            transformer: another transformer folder, a `checkpoint-N` of a run, or a network; ema: its averaged weights.
                A ControlNet (file) brings its own base. None = without: the pipeline encodes prompts alone.
            controlnet: a ControlNet file for the transformer. edge_detector: `ControlNetHED.pth`, or the network; with
                it `control_image` is any picture, without it a picture of edges.
            text_encoder, vae: other folders, or hub names, of T5 with its tokenizer and of the VAE, or the modules;
                None = without: prompts are then given as embeddings, pictures returned as latents.
            scheduler: one of diffusers; None = the folder's. algorithm: instead, a solver by name (`make_scheduler`).
            torch_dtype: of text encoder and transformer. vae_dtype: of the VAE; float16 overflows in many of them.
            variant: of weight files ("fp16"), for each part that has it. revision: of a hub repository.
            use_safetensors: True = refuse weights in other files.
            image_size: px, of a transformer file that does not tell its own (no `pos_embed`).
        Raises:
            CheckpointError: something is missing or damaged. PromptError: unknown algorithm, or no dtype of torch.
        """
        for name, value in (("torch_dtype", torch_dtype), ("vae_dtype", vae_dtype)):
            if not isinstance(value, torch.dtype):
                raise PromptError(f"{name}={value!r} must be a dtype of torch, such as torch.float16")
        if scheduler is not None and algorithm is not None:
            raise PromptError("scheduler and algorithm are both given; give one of them")
        detector = load_edge_detector(edge_detector, device)
        folder = pipeline_folder(folder, variant=variant, revision=revision)
        require_files(folder, variant=variant, safetensors_only=use_safetensors is True)
        tokenizer, encoder = open_text(folder, text_encoder, device=device, dtype=torch_dtype, variant=variant)
        autoencoder = open_vae(folder, vae, device=device, dtype=vae_dtype, variant=variant)
        scheduler = load_scheduler(folder, algorithm) if scheduler is None else scheduler
        network, control, source = None, None, folder if transformer is OWN else transformer
        if source is not None:
            place = source if isinstance(source, (str, Path)) else None
            chosen = None if place is None else part_variant(place, "transformer", variant)
            network, control = load_networks(
                source, controlnet, device=device, dtype=torch_dtype, ema=ema, variant=chosen, image_size=image_size
            )
            if place is not None and torch.device(device).type == "cpu":  # a given network stays as it is
                use_onednn(network if control is None else control)
            scheduler = fitting_scheduler(scheduler, network.config.prediction_type, network.config.flow_shift)
            _require_one_model(encoder, autoencoder, network, str(place or "the transformer"))
        pipeline = cls(tokenizer, encoder, autoencoder, network, scheduler, control, detector)
        pipeline.usual_guidance = usual_guidance(folder)
        return pipeline

    def save_pretrained(  # type: ignore[override]
        self, folder: str | Path, dtype: torch.dtype | None = None, *, safe_serialization: bool = True
    ) -> None:
        """Write a new folder that stock diffusers opens; see `save_pipeline`. A ControlNet stays in its own file."""
        if not safe_serialization:
            raise CheckpointError("safe_serialization=False: pickled weights are not written; leave it out")
        for name in PARTS:
            if getattr(self, name) is None:
                raise CheckpointError(f"the pipeline cannot be saved without its {name}; load it again with all parts")
        require_plain(self.transformer, "the pipeline cannot be saved")
        if is_quantized(self.transformer):
            raise CheckpointError("the pipeline cannot be saved with FP8 layers; load it again without fp8")
        if self.controlnet is not None:
            _logger.warning("the ControlNet is not written: diffusers has none for PixArt; keep its file")
        save_pipeline(self, folder, dtype)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast all parts, as in diffusers; a T5 in float16 keeps in float32 what would overflow."""
        if self._residency is not None:
            raise PromptError("a pipeline with a memory plan moves its parts by itself; load it again to move it")
        moved: Self = super().to(*args, **kwargs)
        moved._leave_cpu(moved.execution_device)
        if moved.text_encoder is not None:
            make_float16_safe(moved.text_encoder)
        return moved

    def use_native_conventions(self) -> None:
        """Let calls follow the original where they do not say: its stored null caption, and in alpha cleaned prompts.

        Sigma (300 tokens) cleaned none. A network without a stored null caption keeps T5("").
        """
        network = self.transformer
        self.null_caption = "stored" if network.y_embedder.y_embedding.any() else "t5_empty"
        self.clean_captions = network.config.model_max_length <= 120

    def set_memory_plan(self, name: str, device: str | torch.device, work: Workload | None = None) -> MemoryPlan:
        """Move all parts to host memory; from now on they visit `device` as a plan says. Returns the plan.

        Args:
            name: auto, full, 8gb or 4gb (`diffusion.inference.memory`); auto looks at the free memory.
            work: what will be drawn, for the expected peak; None = one guided picture of the model's size.
        Raises:
            PromptError: unknown name, or a plan was set before.
        """
        if self._residency is not None:
            raise PromptError(f"the pipeline has memory plan {self._residency.plan.name} already; load it again")
        if self.transformer is None or self.vae is None:
            raise PromptError(
                "a memory plan moves transformer and VAE, of which this pipeline lacks one; use .to(device)"
            )
        place = torch.device(device)
        self._leave_cpu(place)
        plan = choose_plan(name, lambda plan: max(self.expected_peak(plan, place, work).values()), place)
        tile_vae(self.vae, plan)
        parts = {
            "text_encoder": self.text_encoder,
            "transformer": self.transformer if self.controlnet is None else self.controlnet,  # which holds it
            "vae": self.vae,
            "edge_detector": self.edge_detector,
        }
        self._residency = Residency(plan, place, parts)
        return plan

    def expected_peak(self, plan: MemoryPlan, device: torch.device, work: Workload | None = None) -> dict[str, int]:
        """Bytes on the device at each stage of a plan; see `diffusion.inference.memory.expected_peak`."""
        work = work or Workload(self.default_size, self.default_size)
        return expected_peak(plan, self, work, tokens=self._max_tokens, device=device)

    @property
    def memory_plan(self) -> MemoryPlan | None:
        return None if self._residency is None else self._residency.plan

    def free_text_encoder(self) -> None:
        """Let T5 go, from the host's memory too: prompts are then given as embeddings."""
        if self._residency is not None:
            self._residency.forget("text_encoder")
        self.text_encoder = None

    @property
    def execution_device(self) -> torch.device:
        """Where the parts compute; offloaded ones lie elsewhere in between."""
        if self._residency is not None:
            return self._residency.device
        return self._known_device or self._common_card() or self._execution_device

    def _common_card(self) -> torch.device | None:
        """The card that holds the first weight of every part, where no hook of diffusers or accelerate moves a part.

        diffusers walks through all modules to find that out, for milliseconds of every picture.
        """
        devices = set()
        for name in ("text_encoder", "vae", "transformer", "controlnet", "edge_detector"):
            part = getattr(self, name)
            if hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook"):
                return None
            first = next(part.parameters(), None) if isinstance(part, nn.Module) else None
            if first is not None:
                devices.add(first.device)
        device = devices.pop() if len(devices) == 1 else None
        return device if device is not None and device.type == "cuda" else None

    @contextmanager
    def _device_known(self) -> Iterator[None]:
        """Within it the device is asked for once."""
        before, self._known_device = self._known_device, self.execution_device
        try:
            yield
        finally:
            self._known_device = before

    @property
    def vae_factor(self) -> int:
        """Pixels a latent covers along each side; without a VAE, those of every published model."""
        if self.vae is None:
            return VAE_FACTOR
        return vae_factor(self.vae.config)

    @property
    def default_size(self) -> int:
        """Height and width in px of a picture when none are given: the model's training size."""
        return int(self.transformer.config.input_size) * self.vae_factor

    def _leave_cpu(self, device: torch.device) -> None:
        """On any other device the network is made of plain layers, which is what faster kernels there look for."""
        if device.type != "cpu" and self.transformer is not None:
            use_onednn(self.transformer if self.controlnet is None else self.controlnet, enabled=False)

    def _bring(self, name: str) -> None:
        if self._residency is not None:
            self._residency.bring(name)
            return
        for part in (name, "controlnet") if name == "transformer" else (name,):
            module = getattr(self, part)
            if (hook := getattr(module, "_hf_hook", None)) is not None:  # diffusers' offloading
                hook.pre_forward(module)  # it waits for `forward`, which solvers do not call
                if part == "controlnet" and isinstance(hook, CpuOffload):
                    module.to(hook.execution_device)  # the hook looks at the first weight alone, the transformer's


def open_text(
    folder: Path, given: Any, *, device: str | torch.device, dtype: torch.dtype, variant: str | None
) -> tuple[Any, Any]:
    """Tokenizer and T5 of a folder or, if `given` is one, of another; T5 itself may be given, or None to go without."""
    if given is OWN or isinstance(given, (str, Path)):
        source = folder if given is OWN else pipeline_folder(given)
        chosen = part_variant(source, "text_encoder", variant)
        encoder = CaptionEncoder.from_pretrained(source, device=device, dtype=dtype, variant=chosen)
        return encoder.tokenizer, encoder.model
    if given is None and not (folder / "tokenizer").is_dir():
        return None, None
    return load_tokenizer(folder), given if given is None else make_float16_safe(given)


def open_vae(folder: Path, given: Any, *, device: str | torch.device, dtype: torch.dtype, variant: str | None) -> Any:
    """The VAE of a folder or, if `given` is one, of another; or what is given."""
    if given is OWN or isinstance(given, (str, Path)):
        source = folder if given is OWN else pipeline_folder(given)
        chosen = part_variant(source, "vae", variant)
        return load_vae(source, device=device, dtype=dtype, variant=chosen)
    return given


def _require_one_model(text_encoder: Any, vae: Any, network: PixArt, weights: str) -> None:
    """Refuse parts of different models before anything is drawn. Raises CheckpointError."""
    wanted = network.config.caption_channels
    if text_encoder is not None and wanted != (given := text_encoder.config.d_model):
        raise CheckpointError(
            f"{weights} reads captions of width {wanted}, the T5 of {text_encoder.name_or_path or 'it'} gives "
            f"{given}; give the pipeline that the model belongs to (--pipeline_load_from, or --t5_path)"
        )
    wanted = network.config.in_channels
    if vae is not None and wanted != (given := vae.config.latent_channels):
        raise CheckpointError(f"{weights} reads latents of {wanted} channels, the VAE gives {given}; give its own VAE")
