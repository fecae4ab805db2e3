"""T5 caption encoder. Legend: B captions, L tokens, C text width."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from diffusion.devices import HostCopy, sent
from diffusion.errors import CheckpointError, first_line
from diffusion.text.int8 import quantize_linears
from diffusion.text.packed import encode_packed, encode_padded


class CaptionEncoder:
    """Tokenizer and T5 encoder as one function from captions to embeddings.

    The encoder runs under its attention mask, so the padding of a batch never changes a caption's embedding (beyond
    rounding). Captions are taken as they are: clean them first with `clean_caption`.

    `num_truncated` counts the captions that were cut at `max_length` tokens since the encoder was made; `dropped` holds
    what the last call cut off, one text a cut caption.
    """

    def __init__(
        self,
        tokenizer: Any,
        model: Any,
        *,
        max_length: int = 120,
        device: str | torch.device | None = None,
        padded_length: Callable[[int], int] = lambda length: length,
        run: Callable[[Callable[[Mapping[str, Tensor]], Tensor], dict[str, Tensor]], Tensor] | None = None,
        fused: bool = False,
    ) -> None:
        """`tokenizer`: a fast transformers tokenizer; `model`: T5EncoderModel; `max_length`: tokens with `</s>`.

        `device`: where inputs go; None = where the model lies. An offloaded model lies elsewhere than it computes.
        `padded_length`: what a batch whose longest caption has so many tokens is padded to. `run`: calls the function
        it is given with the tensors it is given, or does what amounts to it (see `GraphCache`). `fused`: see
        `encode_padded`; not for a model that hooks move.
        """
        if max_length < 1:
            raise ValueError(f"max_length={max_length} must be at least 1")
        if len(tokenizer) > model.config.vocab_size:
            raise CheckpointError(
                f"the tokenizer has {len(tokenizer)} pieces but the text encoder only {model.config.vocab_size} "
                "embeddings; take both from the same pipeline folder"
            )
        self.tokenizer = tokenizer
        self.model = model
        if model.training or next(model.parameters()).requires_grad:
            model.eval().requires_grad_(False)  # walks through all modules, for milliseconds of every picture
        self.max_length = max_length
        self._device = None if device is None else torch.device(device)
        self._padded_length = padded_length
        self._call = run or (lambda work, tensors: work(tensors))
        self._fused = fused
        self.num_truncated = 0
        self.dropped: list[str] = []

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        max_length: int = 120,
        int8: bool = False,
        variant: str | None = None,
    ) -> CaptionEncoder:
        """Load from a diffusers pipeline folder (`tokenizer/` and `text_encoder/`) or from a plain T5 folder.

        Only local files are read. With int8 the linear layers take one byte a weight. `variant` is of the names of the
        weight files ("fp16").
        In float16 some layers stay in float32, see `make_float16_safe`.
        Raises CheckpointError when a part is missing or unreadable.
        """
        from transformers import T5EncoderModel

        tokenizer, encoder_folder = load_tokenizer(folder), text_folders(folder)[1]
        try:
            with _quiet_loading():
                loaded: Any = T5EncoderModel.from_pretrained(
                    str(encoder_folder), local_files_only=True, dtype=dtype, output_loading_info=True, variant=variant
                )
            model, loading = loaded
        except (OSError, EOFError, ValueError, KeyError, RuntimeError, SafetensorError, UnpicklingError) as error:
            reason = first_line(error)
            if isinstance(error, UnpicklingError):  # torch's own words advise to run it
                reason = "its weights are a pickle of more than tensors, which is not opened"
            raise CheckpointError(f"{encoder_folder}: the T5 text encoder cannot be loaded ({reason})") from error
        if loading["missing_keys"]:
            # transformers would go on with random weights in their place.
            missing = sorted(loading["missing_keys"])
            raise CheckpointError(f"{encoder_folder}: {len(missing)} weights are missing, the first {missing[0]!r}")
        if int8:
            quantize_linears(make_float16_safe(model), device)
        return cls(tokenizer, make_float16_safe(model).to(device), max_length=max_length)

    @staticmethod
    def token_counter(folder: str | Path) -> Callable[[Sequence[str]], list[int]]:
        """A function from captions to their numbers of tokens with `</s>`, before any cut, by the folder's tokenizer.

        Raises CheckpointError when the tokenizer is missing or unreadable.
        """
        backend = load_tokenizer(folder).backend_tokenizer  # not the tokenizer: it would warn of every long caption
        return lambda captions: [len(encoding.ids) for encoding in backend.encode_batch(list(captions))]

    @property
    def device(self) -> torch.device:
        return self.model.device if self._device is None else self._device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def hidden_size(self) -> int:
        """C, the width of the embeddings."""
        return self.model.config.d_model

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode captions -> (embeds (B, L, C), mask (B, L) bool, True = keep), L the longest of the batch.

        `encode([""])` is the null caption: `</s>` alone. Both results lie on the encoder's device.
        Raises ValueError for an empty list.
        """
        if len(captions) == 0:
            raise ValueError("encode needs at least one caption")
        return self._run(self._tokenize(captions))

    def encode_unpadded(
        self, captions: Sequence[str], batch_size: int = 32, *, token_budget: int | None = None
    ) -> list[Tensor]:
        """Encode captions of any number -> one (L_i, C) tensor each, on the CPU, in the order given.

        They run end to end without padding (see `encode_packed`), sorted by length: `batch_size` captions a call, or
        with `token_budget` as many as have that number of tokens together (at least one). The tensors of a call are
        views of one block of memory.
        """
        token_ids = self._tokenize(captions) if len(captions) > 0 else []
        order = sorted(range(len(token_ids)), key=lambda index: len(token_ids[index]))
        results: list[Tensor] = [torch.empty(0)] * len(token_ids)
        previous: tuple[list[int], HostCopy] | None = None
        for indices in _calls(order, [len(ids) for ids in token_ids], batch_size, token_budget):
            embeds = encode_packed(self.model, [token_ids[index] for index in indices]).to(self.dtype)
            # A call's results are waited for while the device computes the next one.
            if previous is not None:
                _distribute(*previous, token_ids, results)
            previous = (indices, HostCopy(embeds))
        if previous is not None:
            _distribute(*previous, token_ids, results)
        return results

    def _tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        if isinstance(captions, str):
            raise ValueError("captions must be a list of strings, not one string")
        batch = self.tokenizer(list(captions), truncation=True, max_length=self.max_length, add_special_tokens=True)
        self.dropped = [
            caption[_end_of_kept(encoding) :].strip()
            for caption, encoding in zip(captions, batch.encodings)
            if encoding.overflowing
        ]
        self.num_truncated += len(self.dropped)
        return batch["input_ids"]

    @torch.no_grad()
    def _run(self, token_ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        length = self._padded_length(max(len(ids) for ids in token_ids))
        padding = self.tokenizer.pad_token_id
        ids = [row + [padding] * (length - len(row)) for row in token_ids]
        kept = [[1] * len(row) + [0] * (length - len(row)) for row in token_ids]
        both = sent([ids, kept], torch.int64, self.device)
        embeds = self._call(self._encode, {"input_ids": both[0], "attention_mask": both[1]})  # (B, L, C)
        return embeds.to(self.dtype), both[1].bool()

    def _encode(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if self._fused:
            return encode_padded(self.model, **inputs)
        embeds: Tensor = self.model(**inputs).last_hidden_state
        return embeds


def make_float16_safe(model: Any) -> Any:
    """The same T5; when it is in float16, the second products of its feed-forward layers (`wo`) go to float32.

    In T5 v1.1 their results exceed float16's 65,504. The sums they enter are then float32 too, and each norm returns
    to float16. transformers loads float16 weights so; a cast afterwards undoes it.
    """
    if model.dtype == torch.float16:
        for name, module in model.named_modules():
            if name.endswith(".wo"):
                module.float()
    return model


def _calls(
    order: Sequence[int], lengths: Sequence[int], batch_size: int, token_budget: int | None
) -> Iterator[list[int]]:
    """Cut captions that are sorted by length, shortest first, into calls."""
    call: list[int] = []
    tokens = 0
    for index in order:
        length = lengths[index]  # the newest is the longest: attention pads all to it, at most to twice the budget
        full = len(call) == batch_size
        if token_budget is not None:
            full = tokens + length > token_budget or (len(call) + 1) * length > 2 * token_budget
        if call and full:
            yield call
            call, tokens = [], 0
        call.append(index)
        tokens += length
    if call:
        yield call


def _distribute(indices: list[int], copy: HostCopy, token_ids: list[list[int]], results: list[Tensor]) -> None:
    (embeds,) = copy.wait()
    for index, rows in zip(indices, embeds.split([len(token_ids[index]) for index in indices])):
        results[index] = rows


def _end_of_kept(encoding: Any) -> int:
    """Position in the caption behind its last kept token; `</s>` stands nowhere in it."""
    kept = [end for (_, end), special in zip(encoding.offsets, encoding.special_tokens_mask) if not special]
    return max(kept, default=0)


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without the bar that transformers draws for the weights of every model, however small."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_tokenizer(folder: str | Path) -> Any:
    """The T5 tokenizer of a pipeline or T5 folder. Raises CheckpointError when it is missing or unreadable."""
    from transformers import AutoTokenizer

    found = text_folders(folder)[0]
    try:
        return AutoTokenizer.from_pretrained(str(found), local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{found}: the T5 tokenizer cannot be loaded ({first_line(error)})") from error


def text_folders(folder: str | Path) -> tuple[Path, Path]:
    """The (tokenizer, text encoder) folders inside a pipeline folder; both `folder` itself for a plain T5 folder.

    Raises CheckpointError naming the missing path.
    """
    root = Path(folder)
    if not root.is_dir():
        raise CheckpointError(
            f"{root}: no such folder; give a local diffusers pipeline folder "
            f"(get one with `hf download ID --local-dir {root}`)"
        )
    if (root / "text_encoder").is_dir():
        if not (root / "tokenizer").is_dir():
            raise CheckpointError(f"{root / 'tokenizer'}: missing beside text_encoder; copy the tokenizer there")
        return root / "tokenizer", root / "text_encoder"
    if not (root / "config.json").is_file():
        raise CheckpointError(
            f"{root}: holds neither text_encoder/ nor config.json; give a pipeline or T5 folder, or fetch the official "
            "ones with tools/download.py"
        )
    return root, root
