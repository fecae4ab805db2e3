"""Tokenizer, corpus, teacher file and the distillation of the text encoder."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, T5EncoderModel, T5Tokenizer

from diffusion.errors import CheckpointError, ConfigError, DataError
from diffusion.text.tokenizer import tokenize, train_tokenizer
from diffusion.training.text_corpus import build_corpus, read_emojibase, read_train_captions, read_word_list
from diffusion.training.text_distillation import (
    TextEncoderConfig,
    identity_loss,
    relation_loss,
    retrieval_at_1,
    sentence_loss,
    train_text_encoder,
)
from diffusion.training.text_names import named_right, named_texts
from diffusion.training.text_teacher import (
    TeacherTexts,
    embed_texts,
    load_teacher_texts,
    principal_components,
    read_texts,
    save_teacher_texts,
)

ENTRIES = [
    {"label": "Red Apple", "tags": ["fruit", "food"], "group": 4},
    {"label": "dog face", "tags": ["animal", "pet", "puppy"], "group": 3},
    {"label": "rocket", "tags": ["space", "launch"], "group": 5, "skins": [{"label": "rocket: dark skin tone"}]},
    {"label": "flag: Malta", "group": 9},
]
WORDS = ["green", "happy", "house", "water", "light", "small", "music", "river"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return build_corpus(["A Red Apple: fruit"], ENTRIES, WORDS, size=400, seed=0).texts


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    assert train_tokenizer(texts, folder, vocab_size=200) == 200
    return folder


@pytest.fixture(scope="module")
def teacher(texts: list[str]) -> TeacherTexts:
    """A teacher that can be learnt: every word has a direction, a text is the sum of its words."""

    def direction(word: str) -> torch.Tensor:
        return torch.randn(16, generator=torch.Generator().manual_seed(sum(map(ord, word))))

    vectors = torch.stack([sum((direction(word) for word in text.split()), torch.zeros(16)) for text in texts])
    pairs = torch.tensor([[0, 1], [2, 3]])
    return TeacherTexts(texts, torch.nn.functional.normalize(vectors, dim=1), pairs, torch.arange(0, len(texts), 10))


def tiny_config(**changes: Any) -> TextEncoderConfig:
    settings: dict[str, Any] = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "ff_size": 48, "batch_size": 64}
    return TextEncoderConfig(**{**settings, "max_tokens": 24, "learning_rate": 1e-2, **changes})


def test_tokenizer_lower_cases_appends_eos_and_round_trips(tokenizer_folder: Path) -> None:
    tokenizer = T5Tokenizer.from_pretrained(str(tokenizer_folder))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    ids = tokenizer("A Happy  DOG Face").input_ids
    assert ids == tokenizer("a happy dog face").input_ids
    assert ids[-1] == 1
    assert ids.count(1) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a happy dog face"
    assert tokenizer("").input_ids == [1]
    assert 2 in tokenizer("日本").input_ids
    padded = tokenizer(["rocket", "red apple in space"], padding=True)
    assert padded.input_ids[0][-1] == 0
    assert padded.attention_mask[0][-1] == 0
    assert tokenizer.model_max_length == 120


def test_both_tokenizer_files_say_the_same(tokenizer_folder: Path, texts: list[str]) -> None:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "spiece.model"))
    tokenizer = T5Tokenizer.from_pretrained(str(tokenizer_folder))
    for text in [*texts[:100], "Green HOUSE,  river"]:
        assert tokenizer(text).input_ids == [*pieces.encode(text), 1]
    assert {path.name for path in tokenizer_folder.iterdir()} == {
        "spiece.model", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_tokenizer_names_what_cannot_be_filled(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="5000"):
        train_tokenizer(["a dog", "a cat"], tmp_path, vocab_size=5000)


def test_corpus_is_distinct_lower_case_complete_and_repeatable() -> None:
    corpus = build_corpus(["A Red Apple: fruit"], ENTRIES, WORDS, size=400, seed=0)
    assert len(corpus.texts) == len(set(corpus.texts)) == 400
    assert all(text == text.lower() and text for text in corpus.texts)
    expected = {"a red apple: fruit", "red apple", "puppy", "rocket: dark skin tone", "flag: malta", *WORDS}
    assert expected <= set(corpus.texts)
    assert [(corpus.texts[a], corpus.texts[b]) for a, b in corpus.pairs][1] == ("dog face", "animal, pet, puppy")
    assert set(corpus.pairs[0]) <= set(corpus.held_out)
    assert corpus == build_corpus(["A Red Apple: fruit"], ENTRIES, WORDS, size=400, seed=0)
    assert corpus != build_corpus(["A Red Apple: fruit"], ENTRIES, WORDS, size=400, seed=1)
    with pytest.raises(DataError, match="size 3"):
        build_corpus([], ENTRIES, WORDS, size=3, seed=0)


def test_corpus_sources_name_a_bad_file(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"a": 1}', encoding="utf-8")
    for read in (read_emojibase, read_train_captions):
        with pytest.raises(DataError, match=r"bad\.json"):
            read(bad)
    with pytest.raises(DataError, match=r"none\.txt"):
        read_word_list(tmp_path / "none.txt")
    rows = '{"text": "x", "captions": ["x", "x, y"], "split": "train"}\n{"text": "z", "split": "heldout"}\n'
    bad.write_text(rows, encoding="utf-8")
    assert read_train_captions(bad) == ["x", "x", "x, y"]
    bad.write_text("[PAD]\n##ing\nthe\nhouse\nit\n1999\n", encoding="utf-8")
    assert read_word_list(bad) == ["the", "house"]


def test_teacher_file_keeps_texts_and_dot_products(tmp_path: Path, teacher: TeacherTexts) -> None:
    path = tmp_path / "teacher.safetensors"
    save_teacher_texts(teacher, path, metadata={"teacher": "test"})
    again = load_teacher_texts(path)
    assert again.texts == teacher.texts == read_texts(path)
    assert torch.equal(again.pairs, teacher.pairs)
    assert torch.equal(again.held_out, teacher.held_out)
    wanted = teacher.embeddings @ teacher.embeddings.T
    torch.testing.assert_close(again.embeddings @ again.embeddings.T, wanted, atol=0.02, rtol=0)
    path.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"teacher\.safetensors"):
        load_teacher_texts(path)


def test_principal_components_keep_what_lies_in_few_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.nn.functional.normalize(
        torch.randn(100, 4, generator=generator) @ torch.randn(4, 20, generator=generator), dim=1
    )
    reduced, kept = principal_components(flat, 4)
    assert kept == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(reduced @ reduced.T, flat @ flat.T, atol=1e-5, rtol=0)
    assert principal_components(flat, 2)[1] < 0.95


def test_embed_texts_is_the_masked_mean_in_the_given_order(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "dog", "house", "green"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "hidden_size": 16}
    model = BertModel(BertConfig(vocab_size=len(words), **shape)).eval()
    model.save_pretrained(str(tmp_path))
    tokenizer.save_pretrained(str(tmp_path))
    texts = ["red dog house green red", "dog", "green house"]
    found = embed_texts(tmp_path, texts, batch_size=2)
    for text, vector in zip(texts, found):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        wanted = torch.nn.functional.normalize(states.mean(1), dim=1)[0]
        torch.testing.assert_close(vector, wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(CheckpointError, match="none"):
        embed_texts(tmp_path / "none", texts)


def test_losses_vanish_for_a_perfect_student_only() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, other = (torch.nn.functional.normalize(torch.randn(6, 8, generator=generator), dim=1) for _ in range(2))
    assert sentence_loss(teacher, teacher) == pytest.approx(0, abs=1e-6)
    assert relation_loss(teacher, teacher, 0.05) == pytest.approx(0, abs=1e-5)
    assert sentence_loss(other, teacher) > 0.5
    assert relation_loss(other, teacher, 0.05) > 0.5
    ids = torch.tensor([[3, 1, 0], [4, 5, 1]])
    logits = 50 * torch.nn.functional.one_hot(ids, 6).float()
    logits[0, 2] = torch.tensor([0, 9.0, 0, 0, 0, 0])  # padding: ignored
    assert identity_loss(logits, ids) == pytest.approx(0, abs=1e-6)


def test_retrieval_counts_hits() -> None:
    candidates = torch.eye(4)
    queries = candidates[[0, 1, 2, 2]]
    assert retrieval_at_1(queries, candidates, torch.tensor([0, 1, 2, 3])) == 0.75


def test_tokenize_pads_and_keeps_the_end(tokenizer_folder: Path) -> None:
    tokenizer = T5Tokenizer.from_pretrained(str(tokenizer_folder))
    ids, lengths = tokenize(tokenizer, ["rocket", "red apple in the green house " * 4], 10)
    assert ids.shape == (2, 10)
    assert ids[1, -1] == 1
    assert (ids[0, int(lengths[0]) :] == 0).all()
    assert ids[0, int(lengths[0]) - 1] == 1


def test_training_learns_saves_and_loads_in_stock_transformers(
    tokenizer_folder: Path, teacher: TeacherTexts, tmp_path: Path
) -> None:
    output = tmp_path / "text_encoder"
    metrics = train_text_encoder(
        tokenizer_folder, teacher, output, steps=150, seed=0, config=tiny_config(), log_every=10
    )
    assert metrics["history"][-1]["loss"] < 0.5 * metrics["history"][0]["loss"]
    assert metrics["cosine_heldout"] > 0.6
    assert metrics["identity_heldout"] > 0.5
    encoder = T5EncoderModel.from_pretrained(str(output), dtype=torch.float32)
    tokenizer = T5Tokenizer.from_pretrained(str(tokenizer_folder))
    with torch.no_grad():
        states = encoder(**tokenizer("a happy dog face", return_tensors="pt")).last_hidden_state
    assert states.shape[-1] == 32
    assert 0.3 < states.std() < 3
    stored = T5EncoderModel.from_pretrained(str(output), dtype=torch.float16)
    assert stored.shared.weight.dtype == torch.float16
    assert (tmp_path / "text_encoder_metrics.json").is_file()


def test_same_seed_same_encoder_other_seed_another(
    tokenizer_folder: Path, teacher: TeacherTexts, tmp_path: Path
) -> None:
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        output = tmp_path / name / "text_encoder"
        random.seed(name)  # the global generators must not matter
        train_text_encoder(tokenizer_folder, teacher, output, steps=3, seed=seed, config=tiny_config())
        weights.append((output / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_captions_of_pictures_come_near_their_labels(
    tokenizer_folder: Path, teacher: TeacherTexts, tmp_path: Path
) -> None:
    """Words that the teacher finds far from every label name a picture none the less."""
    captions = {"red apple": "green music river", "dog face": "small water house", "rocket": "happy light river"}
    rows = [
        {"text": label, "concept": label, "split": "train", "captions": [other, other]}
        for label, other in captions.items()
    ]
    rows.append({"text": "not read by the teacher", "concept": "x", "split": "train", "captions": []})
    named = named_texts(rows, teacher)
    assert named.labels.shape == (3, 16) and len(named.texts) == 9
    assert named.weights.sum() == pytest.approx(3)  # one a label, whatever it has of captions
    config = tiny_config(naming_weight=1.0, naming_texts=32)
    metrics = train_text_encoder(
        tokenizer_folder, teacher, tmp_path / "t", steps=100, config=config, named=named, log_every=10
    )
    first, last = metrics["history"][0]["naming"], metrics["history"][-1]["naming"]
    assert last < 0.1 < 1 < first
    assert "named_heldout" not in metrics  # every caption was drawn
    with pytest.raises(DataError, match="no label"):
        named_texts(rows[-1:], teacher)


def test_captions_that_the_corpus_holds_out_measure_naming(
    tokenizer_folder: Path, teacher: TeacherTexts, tmp_path: Path
) -> None:
    kept = [teacher.texts[number] for number in teacher.held_out.tolist()]
    others = [text for text in teacher.texts if text not in kept]
    rows = [
        {"text": label, "concept": label, "split": "train", "captions": [kept[number], others[-1 - number]]}
        for number, label in enumerate(others[:2])
    ]
    named = named_texts(rows, teacher)
    assert [named.texts[row] for row in (named.weights == 0).nonzero()[:, 0]] == kept[:2]
    assert named.weights.sum() == pytest.approx(2)
    metrics = train_text_encoder(
        tokenizer_folder, teacher, tmp_path / "t", steps=2, config=tiny_config(naming_texts=8), named=named
    )
    assert metrics["named_texts_heldout"] == 2 and metrics["named_heldout"] in (0.0, 0.5, 1.0)
    vectors, labels, concepts = torch.eye(3), torch.eye(3) + 0.1, torch.tensor([0, 0, 1])
    assert named_right(vectors, torch.tensor([1, 0, 0]), labels, concepts) == pytest.approx(2 / 3)


def test_wrong_settings_are_named(teacher: TeacherTexts, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_heads=3"):
        tiny_config(num_heads=3)
    with pytest.raises(CheckpointError, match="none"):
        train_text_encoder(tmp_path / "none", teacher, tmp_path / "out", steps=1, config=tiny_config())


def test_stock_pipeline_loads_tokenizer_and_encoder_from_plain_folders(
    tokenizer_folder: Path, teacher: TeacherTexts, tmp_path: Path
) -> None:
    from diffusers import PixArtAlphaPipeline

    train_text_encoder(tokenizer_folder, teacher, tmp_path / "text_encoder", steps=1, config=tiny_config())
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    parts = {"tokenizer": ["transformers", "T5Tokenizer"], "text_encoder": ["transformers", "T5EncoderModel"]}
    absent = {name: [None, None] for name in ("vae", "transformer", "scheduler")}
    index = {"_class_name": "PixArtAlphaPipeline", **parts, **absent}
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    none = dict.fromkeys(absent)
    pipe = PixArtAlphaPipeline.from_pretrained(str(tmp_path), torch_dtype=torch.float32, **none)
    embeds, mask, _, null_mask = pipe.encode_prompt("A Happy DOG", device="cpu", clean_caption=False)
    same, _, _, _ = pipe.encode_prompt("a happy dog", device="cpu", clean_caption=False)
    assert embeds.shape == (1, 120, 32)
    assert torch.equal(embeds, same)
    assert int(null_mask.sum()) == 1
    assert int(mask.sum()) > 3


def test_reading_by_length_changes_no_loss(tokenizer_folder: Path, teacher: TeacherTexts, tmp_path: Path) -> None:
    def first_loss(groups: int) -> dict[str, float]:
        metrics = train_text_encoder(
            tokenizer_folder, teacher, tmp_path / f"encoder-{groups}", steps=2, config=tiny_config(length_groups=groups)
        )
        last: dict[str, float] = metrics["history"][-1]  # after one update, so that gradients count too
        return last

    whole, parts = first_loss(1), first_loss(4)
    assert whole == pytest.approx(parts, rel=1e-4)
    assert whole["loss"] > 0.1
