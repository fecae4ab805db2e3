"""The parts of a pipeline: loading, saving, where they are, and captions to embeddings.

Legend: P prompts, L text tokens, C text width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from diffusion.errors import CheckpointError, PromptError
from diffusion.images import load_vae
from diffusion.inference.conditions import prepare_prompt, shortened
from diffusion.inference.control import load_edge_detector, load_networks
from diffusion.inference.denoising import require_finite
from diffusion.inference.fast import FastSampling
from diffusion.inference.folders import load_scheduler, pipeline_folder, save_pipeline
from diffusion.inference.fp8 import is_quantized
from diffusion.inference.lora import LoraAdapters, require_plain
from diffusion.inference.memory import (
    ENCODE_BATCH,
    MemoryPlan,
    Residency,
    Workload,
    choose_plan,
    expected_peak,
    tile_vae,
)
from diffusion.inference.solvers import fitting_scheduler
from diffusion.models import HED, ControlPixArt, PixArt, pad_captions
from diffusion.models.cpu_linear import use_onednn
from diffusion.text import CaptionEncoder, make_float16_safe

if TYPE_CHECKING:
    from typing_extensions import Self

_logger = logging.getLogger(__name__)


class PipelineParts(LoraAdapters, FastSampling, DiffusionPipeline):
    """Tokenizer, T5, VAE, native network and scheduler as a pipeline of diffusers, without the drawing.

    `controlnet` (or None) is a `ControlPixArt` around `transformer`, and shares its weights; `edge_detector` (or None)
    makes condition pictures of photographs.

    `null_caption` and `clean_captions` are what calls do that do not say: "t5_empty" and False, the conventions of
    diffusers folders and of models trained here; "stored" and True are those of native official files.
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
    fused_loras: tuple[dict[str, Any], ...] | list[dict[str, Any]] = ()  # of which recipes speak
    _residency: Residency | None = None

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
        transformer: str | Path | PixArt | ControlPixArt | None = None,
        controlnet: str | Path | None = None,
        edge_detector: str | Path | HED | None = None,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        ema: bool = False,
        algorithm: str | None = None,
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load a pipeline folder, or a model of the hub by its name.

        Args:
            folder: tokenizer, text_encoder, vae, scheduler, and transformer unless given; see `pipeline_folder`.
            transformer: another transformer folder, a `checkpoint-N` of a run, or a network; ema: its averaged weights.
                A ControlNet (file) brings its own base.
            controlnet: a ControlNet file for the transformer. edge_detector: `ControlNetHED.pth`, or the network; with
                it `control_image` is any picture, without it a picture of edges.
            text_encoder, vae: other folders, or hub names, of T5 with its tokenizer and of the VAE.
            algorithm: solver name (see `make_scheduler`); None = the folder's scheduler.
            torch_dtype: of text encoder and transformer. vae_dtype: of the VAE; float16 overflows in many of them.
        Raises:
            CheckpointError: something is missing or damaged. PromptError: unknown algorithm.
        """
        detector = load_edge_detector(edge_detector, device)
        folder = pipeline_folder(folder)
        text_folder = folder if text_encoder is None else pipeline_folder(text_encoder)
        encoder = CaptionEncoder.from_pretrained(text_folder, device=device, dtype=torch_dtype)
        scheduler = load_scheduler(folder, algorithm)
        autoencoder = load_vae(folder if vae is None else pipeline_folder(vae), device=device, dtype=vae_dtype)
        source = folder if transformer is None else transformer
        network, control = load_networks(source, controlnet, ema=ema, device=device, dtype=torch_dtype)
        if isinstance(source, (str, Path)) and torch.device(device).type == "cpu":  # a given network stays as it is
            use_onednn(network if control is None else control)
        scheduler = fitting_scheduler(scheduler, network.config.prediction_type, network.config.flow_shift)
        weights = str(source) if isinstance(source, (str, Path)) else "the transformer"
        _require_one_model(encoder.model, autoencoder, network, f"{text_folder}", weights)
        return cls(encoder.tokenizer, encoder.model, autoencoder, network, scheduler, control, detector)

    def save_pretrained(  # type: ignore[override]
        self, folder: str | Path, dtype: torch.dtype | None = None
    ) -> None:
        """Write a new folder that stock diffusers opens; see `save_pipeline`. A ControlNet stays in its own file."""
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
        return self._execution_device if self._residency is None else self._residency.device

    @property
    def vae_factor(self) -> int:
        """Pixels a latent covers along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def default_size(self) -> int:
        """Height and width in px of a picture when none are given: the model's training size."""
        return int(self.transformer.config.input_size) * self.vae_factor

    @property
    def _max_tokens(self) -> int:
        return 120 if self.transformer is None else int(self.transformer.config.model_max_length)

    @torch.no_grad()
    def encode_captions(
        self, captions: Sequence[str], *, clean_caption: bool = False, max_sequence_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode prompts -> embeds (P, L, C), mask (P, L) True = keep; L the longest.

        max_sequence_length: tokens after which a prompt is cut, with a notice; None = the model's (120, or 300).
        Raises PromptError when T5 was freed.
        """
        if self.text_encoder is None:
            raise PromptError("this pipeline has no text encoder; give prompt_embeds with prompt_attention_mask")
        limit = self._max_tokens if max_sequence_length is None else max_sequence_length
        self._bring("text_encoder")
        device = self.execution_device
        fast = {} if self._fast is None else self._fast.text_options(self.text_encoder, device, self.memory_plan)
        encoder = CaptionEncoder(self.tokenizer, self.text_encoder, max_length=limit, device=device, **fast)
        texts = [prepare_prompt(text, clean=clean_caption) for text in captions]
        parts = []
        for start in range(0, len(texts), ENCODE_BATCH):
            parts.append(encoder.encode(texts[start : start + ENCODE_BATCH]))
            for dropped in encoder.dropped:
                _logger.warning("a prompt was cut at %d tokens; dropped: %s", limit, shortened(dropped))
        length = max(mask.shape[1] for _, mask in parts)
        embeds, masks = zip(*(pad_captions(*part, length) for part in parts))
        return require_finite(torch.cat(embeds), "the caption embeddings"), torch.cat(masks)

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] = "",
        num_images_per_prompt: int = 1,
        *,
        clean_caption: bool | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """As diffusers' PixArtAlphaPipeline: embeds, mask, and those of the negative prompts or None.

        Shapes (P * images, L, C) and (P * images, L); what a call takes as prompt_embeds, prompt_attention_mask,
        negative_prompt_embeds and negative_prompt_attention_mask. Rows are not padded beyond the longest prompt.
        """
        clean = self.clean_captions if clean_caption is None else clean_caption

        def encode(texts: str | Sequence[str], count: int) -> tuple[Tensor, Tensor]:
            listed = [texts] * count if isinstance(texts, str) else list(texts)
            rows = self.encode_captions(listed, clean_caption=clean, max_sequence_length=max_sequence_length)
            return tuple(part.repeat_interleave(num_images_per_prompt, dim=0) for part in rows)  # type: ignore

        count = 1 if isinstance(prompt, str) else len(prompt)
        positive = encode(prompt, count)
        return (*positive, *encode(negative_prompt, count)) if do_classifier_free_guidance else (*positive, None, None)

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


def _require_one_model(text_encoder: Any, vae: Any, network: PixArt, texts: str, weights: str) -> None:
    """Refuse parts of different models before anything is drawn. Raises CheckpointError."""
    wanted, given = network.config.caption_channels, text_encoder.config.d_model
    if wanted != given:
        raise CheckpointError(
            f"{weights} reads captions of width {wanted}, the T5 of {texts} gives {given}; give the pipeline that the "
            "model belongs to (--pipeline_load_from, or --t5_path)"
        )
    wanted, given = network.config.in_channels, vae.config.latent_channels
    if wanted != given:
        raise CheckpointError(f"{weights} reads latents of {wanted} channels, the VAE gives {given}; give its own VAE")
