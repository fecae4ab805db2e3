"""An image-text model of transformers as one function from pictures and instructions to captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xxhash
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from diffusion.checkpoints.hub import hub_folder, parse_hub_id
from diffusion.errors import CheckpointError, ConfigError, first_line


class Captioner:
    """Model and processor; a caption depends on its picture, instruction, key and seed, not on its batch (beyond
    rounding).

    Args:
        model: what `AutoModelForImageTextToText` gives; processor: its `AutoProcessor`.
        template: text with `{instruction}` for a model without a chat template; None = the chat template.
        temperature: of sampling; 0 takes the likeliest token.
        max_new_tokens: of a caption; what is longer is cut there.
    Raises:
        ConfigError: neither chat template nor `template`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        template: str | None = None,
        temperature: float = 0.2,
        seed: int = 0,
        max_new_tokens: int = 512,
    ) -> None:
        if template is None and not getattr(processor, "chat_template", None):
            raise ConfigError(
                f"{model.config.model_type} has no chat template; give its form with --template, such as "
                "'USER: <image> {instruction} ASSISTANT:'"
            )
        self.model, self.processor, self.template = model.eval().requires_grad_(False), processor, template
        self.temperature, self.seed, self.max_new_tokens = temperature, seed, max_new_tokens
        # Captions of a batch shall begin at one position, so that none continues from padding.
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    @classmethod
    def from_pretrained(
        cls, place: str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **options: Any
    ) -> Captioner:
        """Load a folder or a hub id; no code from the hub is run.

        Raises:
            CheckpointError: not there, not of an architecture that transformers knows, or without some weights.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        folder = _model_folder(place)
        try:
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True
            )
            model, loading = loaded
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise CheckpointError(
                f"--model-path {place}: no image-text model of transformers ({first_line(error)}); give the folder or "
                "hub id of one, such as llava-hf/llava-1.5-7b-hf"
            ) from error
        if loading["missing_keys"]:
            missing = sorted(loading["missing_keys"])
            raise CheckpointError(f"--model-path {place}: {len(missing)} weights are missing, the first {missing[0]!r}")
        return cls(model.to(device), processor, **options)

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], instructions: Sequence[str], keys: Sequence[str]
    ) -> list[tuple[str, bool]]:
        """Captions of B pictures, and whether each ended by itself (False: cut at `max_new_tokens`).

        Args:
            images: RGB; instructions: what to tell of each; keys: the pictures' names, which key the sampling.
        Raises:
            ConfigError: the batch does not fit into the memory of the device.
        """
        inputs = self._inputs(images, instructions).to(self.model.device, dtype=self.model.dtype)
        try:
            tokens = self.model.generate(**inputs, **self._generation(keys))
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"--batch-size {len(images)} does not fit into the memory of the device; lower it") from (
                error
            )
        prompt = inputs.get("input_ids")
        # Decoder-only models repeat the prompt before what they add, others do not.
        if prompt is not None and tokens.shape[1] >= prompt.shape[1] and tokens[:, : prompt.shape[1]].equal(prompt):
            tokens = tokens[:, prompt.shape[1] :]
        ended = torch.isin(tokens, torch.tensor(self._ends(), device=tokens.device)).any(1).tolist()
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [(" ".join(text.split()), end) for text, end in zip(texts, ended)]

    def _inputs(self, images: Sequence[Image.Image], instructions: Sequence[str]) -> Any:
        if self.template is not None:
            texts = [self.template.replace("{instruction}", text) for text in instructions]
            given = {"text": texts} if self.template else {}
            return self.processor(images=list(images), **given, padding=True, return_tensors="pt")
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
            for image, text in zip(images, instructions)
        ]
        return self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )

    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self._tokenizer.eos_token_id
        return list(ends) if isinstance(ends, (list, tuple)) else [ends]

    def _generation(self, keys: Sequence[str]) -> dict[str, Any]:
        from transformers import GenerationConfig, LogitsProcessorList

        own = self.model.generation_config
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self._ends(),
            pad_token_id=self._tokenizer.pad_token_id,
            bos_token_id=own.bos_token_id,
            decoder_start_token_id=own.decoder_start_token_id,
        )
        noise = [_KeyedGumbel(keys, self.seed, self.temperature, self.model.device)] if self.temperature > 0 else []
        return {"generation_config": config, "logits_processor": LogitsProcessorList(noise)}


class _KeyedGumbel:
    """The likeliest token after adding Gumbel noise is a draw from softmax(scores / temperature).

    One generator a picture: what is drawn for it does not depend on which others share its batch.
    """

    def __init__(self, keys: Sequence[str], seed: int, temperature: float, device: torch.device) -> None:
        names = [f"{seed}/caption/{key}".encode("utf-8", "surrogatepass") for key in keys]
        self.generators = [torch.Generator(device).manual_seed(xxhash.xxh3_64_intdigest(name) >> 1) for name in names]
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) scores of the next token -> the same with noise."""
        drawn = torch.stack([torch.empty_like(scores[0]).exponential_(generator=own) for own in self.generators])
        return scores / self.temperature - drawn.log()


def _model_folder(place: str) -> str:
    """A folder as it is, or the files of a hub id; asked for by itself, so that without a network one line says so."""
    hub_id = parse_hub_id(place)
    if hub_id is None or hub_id[1] is not None:
        return place
    texts, what = ("*.json", "*.model", "*.txt", "*.jinja"), "files of an image-text model"
    folder = hub_folder(hub_id[0], (*texts, "*.safetensors"), what)
    if not any(folder.glob("*.safetensors")):
        folder = hub_folder(hub_id[0], (*texts, "*.bin"), what)
    return str(folder)
