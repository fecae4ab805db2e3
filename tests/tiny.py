"""Tiny real models that tests of several rooms share: a trained tokenizer, a T5 encoder and a KL-VAE.

They have random weights from fixed seeds, the layouts and classes of the full-size parts, and load in milliseconds.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import T5Config, T5EncoderModel, T5Tokenizer

TINY_TEXT_CHANNELS = 32
TINY_LATENT_CHANNELS = 4
TINY_VAE_FACTOR = 8

_SENTENCES = (
    "a red apple on a table",
    "a cat sleeping in the sun",
    "woman astronaut with medium skin tone",
    "man cook with dark skin tone",
    "blue car near the house, street, town",
    "grinning face with big eyes",
    "a dog runs over green grass",
    "flag in the wind, sea and sky",
    "thumbs up, light skin tone: hand, yes",
    "black and white photo of an old tree",
)


def tiny_tokenizer(folder: str | Path) -> T5Tokenizer:
    """Train a unigram tokenizer of at most 256 pieces on a few sentences, save it to `folder` and return it."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    letters = list("▁abcdefghijklmnopqrstuvwxyz,.:'0123456789")
    trainer = trainers.UnigramTrainer(
        vocab_size=160,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=letters,
        show_progress=False,
    )
    trained.train_from_iterator(list(_SENTENCES) * 4, trainer)
    pieces = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    # The trainer does not expose its scores; ranking by position keeps its order of preference.
    vocab = [(piece, 0.0 if index < 3 else -1.0 - 0.05 * index) for piece, index in pieces]
    known = {piece for piece, _ in vocab}
    vocab += [(letter, -20.0) for letter in letters if letter not in known]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def tiny_text_encoder(seed: int = 0) -> T5EncoderModel:
    """A T5 v1.1 encoder: 2 layers, width 32, 256 tokens, float32, eval mode."""
    config = T5Config(
        vocab_size=256,
        d_model=TINY_TEXT_CHANNELS,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5EncoderModel(config)
    return model.eval()


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """A KL-VAE: 4 latent channels, factor 8, scaling_factor 0.18215, float32, eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=TINY_LATENT_CHANNELS,
            sample_size=64,
            scaling_factor=0.18215,
        )
    return vae.eval()


def write_tiny_pipeline_parts(folder: str | Path) -> Path:
    """Write `tokenizer/`, `text_encoder/`, `vae/` and an index of a diffusers pipeline folder; returns the folder."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    (root / "model_index.json").write_text("{}")
    tiny_tokenizer(root / "tokenizer")
    tiny_text_encoder().save_pretrained(str(root / "text_encoder"))
    tiny_vae().save_pretrained(str(root / "vae"))
    return root
