"""Train a small T5 encoder to mean what a large sentence encoder means.

Up to four terms. Sentence: the mean of the token states, projected, points where the teacher's embedding points.
Relation: within a batch the student ranks the teacher's embeddings as the teacher does, to keep near meanings apart.
Identity: a linear map recovers each token from its state, so that cross-attention finds words, not one blurred meaning.
Naming, where captions of pictures are given: each lies nearest to the label of its picture (`text_names`).
The heads are thrown away; T5's final RMSNorm leaves states of about unit scale.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.errors import CheckpointError, ConfigError, NumericalError
from diffusion.text.tokenizer import PAD_ID, tokenize
from diffusion.training.text_names import NamedTexts, named_right, naming_loss
from diffusion.training.text_teacher import TeacherTexts, masked_mean

Student = Callable[[Tensor], tuple[Tensor, Tensor]]  # `TextStudent.forward`


@dataclass(frozen=True)
class TextEncoderConfig:
    """Shape of the student and of its training.

    `identity_weight`, `relation_weight`, `naming_weight`: factors of the terms beside the sentence term (weight 1).
    `naming_texts`: captions of pictures a step, when there are any.
    `identity_texts`: texts of a batch in the identity term, whose head is the costly part. `temperature`: of the
    similarities in the relation term. `max_tokens`: longer texts are cut while training. `length_groups`: a batch is
    read in so many parts of texts of like length; but for the choice of `identity_texts`, losses stay the same.
    """

    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    ff_size: int = 512
    dropout: float = 0.0
    max_tokens: int = 48
    batch_size: int = 1024
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup_share: float = 0.05
    relation_weight: float = 0.1
    identity_weight: float = 0.1
    identity_texts: int = 256
    naming_weight: float = 0.1
    naming_texts: int = 1024
    temperature: float = 0.05
    length_groups: int = 2

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}")
        if self.batch_size < 2:
            raise ConfigError(f"batch_size={self.batch_size} must be at least 2: texts are compared within a batch")


class TextStudent(nn.Module):
    """T5 encoder with the two heads that only training needs."""

    def __init__(self, config: TextEncoderConfig, vocab_size: int, teacher_size: int) -> None:
        from transformers import T5Config, T5EncoderModel

        super().__init__()
        self.encoder = T5EncoderModel(
            T5Config(
                vocab_size=vocab_size,
                d_model=config.hidden_size,
                d_kv=config.hidden_size // config.num_heads,
                d_ff=config.ff_size,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                feed_forward_proj="gated-gelu",
                dropout_rate=config.dropout,
            )
        )
        self.sentence_head = nn.Linear(config.hidden_size, teacher_size, bias=False)
        self.identity_head = nn.Linear(config.hidden_size, vocab_size)

    def forward(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) ids, 0 = padding -> token states (B, L, D) and unit sentence vectors (B, K), both float32."""
        mask = token_ids != PAD_ID
        states = self.encoder(input_ids=token_ids, attention_mask=mask).last_hidden_state.float()
        return states, F.normalize(self.sentence_head(masked_mean(states, mask)).float(), dim=1)


def sentence_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine; both (B, K) of unit length."""
    return 1 - (student * teacher).sum(1).mean()


def relation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence of the batch's similarity rows: student to teacher against teacher to teacher. (B, K) -> scalar.

    Zero when the student equals the teacher.
    """
    target = (teacher @ teacher.T / temperature).log_softmax(1)  # (B, B)
    found = (student @ teacher.T / temperature).log_softmax(1)
    return F.kl_div(found, target, log_target=True, reduction="batchmean")


def identity_loss(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Cross-entropy of each kept token's own id: logits (..., V), ids (...)."""
    return F.cross_entropy(logits.float().flatten(0, -2), token_ids.flatten(), ignore_index=PAD_ID)


@torch.no_grad()
def _sentence_vectors(student: TextStudent, ids: Tensor, batch_size: int = 512) -> Tensor:
    return torch.cat([student(part.long())[1] for part in ids.split(batch_size)])


def retrieval_at_1(queries: Tensor, candidates: Tensor, answers: Tensor) -> float:
    """Share of (Q, K) queries whose nearest of (C, K) candidates is `answers` (Q,) or an equal vector."""
    similarity = queries @ candidates.T
    best = similarity.amax(1)
    return float((similarity.gather(1, answers[:, None])[:, 0] >= best - 1e-6).float().mean())


@torch.no_grad()
def evaluate_student(student: TextStudent, data: TeacherTexts, ids: Tensor) -> dict[str, float]:
    """Held-out figures, `ids` (N, L) on the student's device.

    cosine_heldout / cosine_train: mean cosine to the teacher; identity_heldout: share of tokens that the linear head
    recovers; retrieval_student / retrieval_teacher: label finds its keywords (R@1) among all keyword texts, for the
    pairs whose two texts are held out; state_std: scale of the token states.
    """
    student.eval()
    device = ids.device
    held = data.held_out.to(device)
    seen = torch.ones(len(data.texts), dtype=torch.bool, device=device)
    seen[held] = False
    train = seen.nonzero()[:, 0][:: max(1, int(seen.sum()) // 1000)]
    teacher = data.embeddings.to(device)
    figures: dict[str, float] = {}
    for name, rows in (("heldout", held), ("train", train)):
        if len(rows):
            figures[f"cosine_{name}"] = float((_sentence_vectors(student, ids[rows]) * teacher[rows]).sum(1).mean())
    if len(held):
        tokens = ids[held[:512]].long()
        states, _ = student(tokens)
        kept = tokens != PAD_ID
        hits = student.identity_head(states).argmax(-1) == tokens
        figures["identity_heldout"] = float(hits[kept].float().mean())
        figures["state_std"] = float(states[kept].std())
    pairs = data.pairs.to(device)
    asked = (~seen[pairs]).all(1).nonzero()[:, 0] if len(pairs) else pairs.new_zeros(0)
    if len(asked):
        labels, keywords = pairs[asked, 0], pairs[:, 1]
        found = _sentence_vectors(student, ids[labels])
        figures["retrieval_student"] = retrieval_at_1(found, _sentence_vectors(student, ids[keywords]), asked)
        figures["retrieval_teacher"] = retrieval_at_1(teacher[labels], teacher[keywords], asked)
    return figures


def _schedule(step: int, steps: int, warmup_share: float) -> float:
    warmup = max(1, round(steps * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_text_encoder(
    tokenizer_folder: Path,
    data: TeacherTexts,
    output: Path,
    *,
    steps: int,
    device: str = "cpu",
    seed: int = 0,
    config: TextEncoderConfig | None = None,
    named: NamedTexts | None = None,
    log_every: int = 100,
    compile_model: bool = False,
) -> dict[str, Any]:
    """Distil and write `output` (a 16-bit `text_encoder` folder) and `output/../text_encoder_metrics.json`.

    Same arguments, seed and CPU: same weights. Returns the metrics, with the loss history under "history".

    named: captions of pictures for the naming term; None = without it. compile_model: torch.compile, for a GPU.

    Raises:
        CheckpointError: no tokenizer in `tokenizer_folder`.
        NumericalError: the loss is not finite.
    """
    from transformers import T5Tokenizer

    config = config or TextEncoderConfig()
    try:
        tokenizer = T5Tokenizer.from_pretrained(str(tokenizer_folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{tokenizer_folder} holds no tokenizer; write one with tools/train_tokenizer.py"
        ) from error
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    student = TextStudent(config, len(tokenizer), data.embeddings.shape[1]).to(device)
    ids, started = tokenize(tokenizer, data.texts, config.max_tokens)[0].to(device), time.monotonic()
    naming = None if named is None else _Naming(named, tokenizer, config, device, seed)
    history = _fit(
        student, data, ids, config, naming,
        steps=steps, seed=seed, log_every=log_every, compile_model=compile_model,
    )  # fmt: skip
    metrics: dict[str, Any] = {
        **evaluate_student(student, data, ids),
        **({} if naming is None else naming.figures(student)),
        "parameters": sum(parameter.numel() for parameter in student.encoder.parameters()),
        "steps": steps,
        "seconds": round(time.monotonic() - started, 1),
        "texts": len(data.texts),
        "history": history,
    }
    output.mkdir(parents=True, exist_ok=True)
    student.encoder.half().save_pretrained(str(output))
    (output.parent / "text_encoder_metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


class _Naming(nn.Module):
    """The naming term: draws captions of pictures and asks for their labels, which it may move."""

    def __init__(self, named: NamedTexts, tokenizer: Any, config: TextEncoderConfig, device: str, seed: int) -> None:
        super().__init__()
        self.ids = tokenize(tokenizer, named.texts, config.max_tokens)[0].to(device)
        self.owner = named.owner.to(device)
        self.labels = nn.Parameter(named.labels.to(device))
        self.concepts = named.concepts.to(device)
        self.weights, self.config = named.weights, config
        self.order = torch.Generator().manual_seed(seed + 1)

    def draw(self) -> Tensor:
        """Numbers of captions, on the CPU."""
        return torch.multinomial(self.weights, self.config.naming_texts, replacement=True, generator=self.order)

    def forward(self, vectors: Tensor, chosen: Tensor) -> Tensor:
        """Sentence vectors (B, K) of the captions `chosen` (B,) -> scalar loss."""
        return naming_loss(vectors, self.owner[chosen.to(vectors.device)], self.labels, self.config.temperature)

    @torch.no_grad()
    def figures(self, student: TextStudent) -> dict[str, float]:
        """named_heldout: share of the captions that were never drawn whose nearest label is of their concept."""
        student.eval()
        rows = (self.weights == 0).nonzero()[:, 0].to(self.ids.device)
        if not len(rows):
            return {}
        vectors = _sentence_vectors(student, self.ids[rows])
        return {
            "named_heldout": named_right(vectors, self.owner[rows], self.labels, self.concepts),
            "named_texts_heldout": len(rows),
        }


class _Reader:
    """Reads texts by number, those of like length together, which are padded less.

    Tables of token ids, of the corpus and of captions, are read as one, since every pass costs a GPU's host hundreds
    of kernel launches: the numbers of a table begin where those of the table before end.
    """

    def __init__(self, student: Student, identity_head: nn.Module, config: TextEncoderConfig, *tables: Tensor) -> None:
        self.student, self.identity_head, self.config = student, identity_head, config
        width = max(table.shape[1] for table in tables)
        self.ids = torch.cat([F.pad(table, (0, width - table.shape[1])) for table in tables])
        self.lengths = (self.ids != PAD_ID).sum(1).cpu()

    def read(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers (B,) on the CPU -> sentence vectors (B, K) in the same order, and the identity loss."""
        order = self.lengths[chosen].argsort(stable=True)
        every = max(1, len(chosen) // self.config.identity_texts)
        vectors, logits, asked = [], [], []
        for rows in chosen[order].chunk(self.config.length_groups):
            tokens = self.ids[rows.to(self.ids.device), : int(self.lengths[rows].max())].long()
            states, found = self.student(tokens)
            vectors.append(found)
            logits.append(self.identity_head(states[::every]).flatten(0, 1))
            asked.append(tokens[::every].flatten())
        back = order.argsort().to(self.ids.device)
        return torch.cat(vectors)[back], identity_loss(torch.cat(logits), torch.cat(asked))


def _fit(
    student: TextStudent,
    data: TeacherTexts,
    ids: Tensor,
    config: TextEncoderConfig,
    naming: _Naming | None,
    *,
    steps: int,
    seed: int,
    log_every: int,
    compile_model: bool,
) -> list[dict[str, float]]:
    """The training loop; returns the logged losses."""
    device = ids.device
    order = torch.Generator().manual_seed(seed)
    allowed = torch.ones(len(data.texts), dtype=torch.bool)
    allowed[data.held_out] = False
    rows = allowed.nonzero()[:, 0]
    teacher = data.embeddings.to(device)
    trained = [*student.parameters(), *(naming.parameters() if naming is not None else ())]
    optimizer = torch.optim.AdamW(
        trained, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    history: list[dict[str, float]] = []
    queue = rows[:0]
    student.train()
    # Eagerly the host launches 700 kernels a pass; of sizes that differ in every step, so the shapes stay symbols.
    run: Student = torch.compile(student, dynamic=True) if compile_model else student
    reader = _Reader(run, student.identity_head, config, ids, *(() if naming is None else (naming.ids,)))
    for step in range(steps):
        if len(queue) < config.batch_size:  # a new pass; the short rest of the last one is dropped
            queue = rows[torch.randperm(len(rows), generator=order)]
        chosen, queue = queue[: config.batch_size], queue[config.batch_size :]
        captions = rows[:0] if naming is None else naming.draw()
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, steps, config.warmup_share)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            vectors, identity = reader.read(torch.cat([chosen, len(ids) + captions]))
            vectors, of_captions = vectors.split([len(chosen), len(captions)])
            named = None if naming is None else naming(of_captions, captions)
        target = teacher[chosen.to(device)]
        parts = {
            "sentence": sentence_loss(vectors, target),
            "relation": relation_loss(vectors, target, config.temperature),
            "identity": identity,
        }
        loss = (
            parts["sentence"] + config.relation_weight * parts["relation"] + config.identity_weight * parts["identity"]
        )
        if named is not None:
            parts["naming"] = named
            loss = loss + config.naming_weight * named
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        if step % log_every == 0 or step == steps - 1:
            entry = {"step": step, "loss": loss.item(), **{name: part.item() for name, part in parts.items()}}
            if not math.isfinite(entry["loss"]):
                raise NumericalError(f"text encoder loss is {entry['loss']} at step {step}; use a lower learning rate")
            history.append({key: round(value, 5) for key, value in entry.items()})
            print(" ".join(f"{key}={value:g}" for key, value in history[-1].items()), flush=True)
    return history
