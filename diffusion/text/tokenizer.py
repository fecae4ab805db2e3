"""Train a T5 tokenizer (sentencepiece unigram) that lower-cases by itself.

Case folding lives in the sentencepiece normaliser (nmt_nfkc_cf), so a stock diffusers pipeline, which knows nothing of
this package, sees the same tokens.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.errors import DataError

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
_THREADS = 16  # whatever the machine has: sums in another order would give other pieces


def train_tokenizer(texts: Sequence[str], output: Path, *, vocab_size: int, max_length: int = 120) -> int:
    """Train on `texts` and write a folder that `transformers.T5Tokenizer.from_pretrained` loads.

    Ids follow T5: pad 0, end of sequence 1 (appended to every text), unknown 2, no beginning-of-sequence token.

    Args:
        texts: training texts; letter case does not matter.
        output: folder for spiece.model, tokenizer.json, tokenizer_config.json.
        vocab_size: number of pieces, special tokens included.
        max_length: tokens after which the tokenizer truncates when asked to.
    Returns:
        The number of pieces.
    Raises:
        DataError: the texts cannot fill the vocabulary.
    """
    import sentencepiece
    from transformers import T5Tokenizer

    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".training-") as aside:
        model = Path(aside) / "spiece.model"
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_prefix=str(model.with_suffix("")),
                vocab_size=vocab_size,
                model_type="unigram",
                character_coverage=1.0,
                normalization_rule_name="nmt_nfkc_cf",
                pad_id=PAD_ID,
                eos_id=EOS_ID,
                unk_id=UNK_ID,
                bos_id=-1,
                pad_piece="<pad>",
                num_threads=_THREADS,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise DataError(
                f"{len(texts)} texts cannot fill {vocab_size} pieces ({error}); use more texts or a smaller vocabulary"
            ) from error
        tokenizer = T5Tokenizer.from_pretrained(aside, extra_ids=0)
        # transformers rebuilds the backend from spiece.model: its own file must say the same as sentencepiece's.
        tokenizer.backend_tokenizer.save(str(output / "tokenizer.json"))
        model.replace(output / "spiece.model")
    config = {
        "tokenizer_class": "T5Tokenizer",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_ids": 0,
        "model_max_length": max_length,
    }
    (output / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return len(tokenizer)


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Texts -> (N, L) int32 ids padded at the end, and (N,) int64 lengths; an end-of-sequence token survives the cut.

    Asks the Rust tokenizer itself: a million texts are read in a third of the time that transformers takes around it.
    """
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(max_tokens)
    backend.no_padding()
    rows = [encoding.ids for encoding in backend.encode_batch_fast(list(texts))]
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    ids = np.full((len(rows), lengths.max()), tokenizer.pad_token_id, np.int32)
    ids[np.arange(ids.shape[1]) < lengths[:, None]] = np.fromiter(chain.from_iterable(rows), np.int32, lengths.sum())
    return torch.from_numpy(ids), torch.from_numpy(lengths)
