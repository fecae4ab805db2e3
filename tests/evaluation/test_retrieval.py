"""Which picture a drawing shows: features, nearest neighbours, recall, sharpness, tables and sheets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from diffusion.errors import DataError, PromptError
from diffusion.evaluation.drawing import (
    DrawingSettings,
    caption_of,
    draw,
    evaluate_captions,
    evaluate_free_prompts,
    judge,
    markdown_table,
    round_trips,
    spread,
    write_outcomes,
)
from diffusion.evaluation.free_prompts import FreePrompt, normalised, read_free_prompts
from diffusion.evaluation.picture_features import colour_features, edge_features, fine_detail_energy
from diffusion.evaluation.retrieval import Gallery, load_gallery, nearest_pictures, recall, to_pixels

ROOT = Path(__file__).resolve().parents[2]
EMOJI = ROOT / "data/emoji"


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """60 bundled pictures: every 50th, and the two nearly equal cat faces."""
    folder = tmp_path_factory.mktemp("gallery")
    rows = [json.loads(line) for line in (EMOJI / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    groups = [row["duplicate_group"] for row in rows]
    twins = next([a, b] for a in rows for b in rows if a is not b and a["duplicate_group"] == b["duplicate_group"])
    assert len(set(groups)) < len(rows)
    chosen = [*twins, *(row for row in rows[::58] if row not in twins)]
    (folder / "images").mkdir()
    for row in chosen:
        (folder / row["file_name"]).write_bytes((EMOJI / row["file_name"]).read_bytes())
    lines = "".join(json.dumps(row) + "\n" for row in chosen)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return load_gallery(folder)


def pictures(gallery: Gallery, rows: list[int]) -> list[Image.Image]:
    return [gallery.samples[row].decode() for row in rows]


def stripes(angle_deg: float, colour: tuple[float, float, float] = (1, 1, 1)) -> torch.Tensor:
    """(1, 3, 256, 256): soft stripes of period 32 px whose gradient points along the angle."""
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    angle = np.deg2rad(angle_deg)
    wave = 0.5 + 0.4 * torch.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / 32)
    return torch.stack([wave * c for c in colour])[None].float()


@pytest.mark.parametrize(("angle", "direction"), [(0, 0), (45, 2), (90, 4), (135, 6)])
def test_edges_fall_into_the_bin_of_their_direction(angle: float, direction: int) -> None:
    bins = edge_features(stripes(angle)).view(8, 16, 16)[:, 2:-2, 2:-2].square().sum((1, 2))
    assert int(bins.argmax()) == direction
    assert bins[direction] > 5 * bins[(direction + 4) % 8]


def test_edges_ignore_brightness_and_colours_ignore_layout() -> None:
    faint = 0.5 + 0.3 * (stripes(30) - 0.5)
    near = (edge_features(stripes(30)) - edge_features(faint)).norm()
    far = (edge_features(stripes(30)) - edge_features(stripes(120))).norm()
    assert near < 0.25 * far
    assert torch.equal(colour_features(torch.ones(1, 3, 256, 256))[0], torch.ones(3072))


def test_fine_detail_is_the_upper_half_of_the_spectrum() -> None:
    x = torch.arange(256.0)
    for frequency, inside in ((0.2, False), (0.3, True), (0.45, True)):
        wave = torch.cos(2 * torch.pi * round(frequency * 256) / 256 * x).expand(1, 3, 256, 256)
        # Parseval: all energy of the wave, 256^2 / 2 a pixel of the spectrum on average, or none.
        expected = 256 * 256 / 2 if inside else 0.0
        assert fine_detail_energy(wave).item() == pytest.approx(expected, abs=1.0)


def test_blur_lowers_and_noise_raises_the_sharpness(gallery: Gallery) -> None:
    rows = list(range(10, 20))
    real = pictures(gallery, rows)
    blurred = [image.filter(ImageFilter.GaussianBlur(1.5)) for image in real]
    rng = np.random.default_rng(0)
    noisy = [
        Image.fromarray((np.asarray(i) + rng.normal(0, 20, (256, 256, 3))).clip(0, 255).astype(np.uint8)) for i in real
    ]
    sharp = [judge(gallery, "x", rows, [""] * 10, drawn).figures["sharpness"] for drawn in (real, blurred, noisy)]
    assert sharp[0] == pytest.approx(1)
    assert sharp[1] < 0.3
    assert sharp[2] > 1.5


def test_pictures_find_themselves_after_shift_and_jpeg(gallery: Gallery) -> None:
    rows = list(range(len(gallery.samples)))
    shifted = [Image.fromarray(np.roll(np.asarray(image), 3, axis=1)) for image in pictures(gallery, rows)]
    figures = judge(gallery, "shifted", rows, [""] * len(rows), shifted).figures
    assert figures["picture_r1"] == 1.0
    assert figures["concept_r1"] == 1.0


def test_unit_scale_of_both_blocks(gallery: Gallery) -> None:
    for block in (gallery.colour, gallery.edges):
        pairs = torch.cdist(block.double(), block.double()).square()
        assert pairs.mean().item() == pytest.approx(1, rel=1e-4)


def test_distances_are_those_of_the_features(gallery: Gallery) -> None:
    pixels = to_pixels(pictures(gallery, [3, 7]))
    both, colour = gallery.distances(pixels)
    assert both.argmin(1).tolist() == colour.argmin(1).tolist() == [3, 7]
    direct = (gallery.colour[3] - gallery.colour[7]).square().sum() + (
        gallery.edges[3] - gallery.edges[7]
    ).square().sum()
    assert both[0, 7].item() == pytest.approx(direct.item(), rel=1e-3)


def test_near_duplicates_count_once() -> None:
    distances = torch.tensor([[0.3, 0.1, 0.2, 0.4]])
    assert nearest_pictures(distances, ["a", "b", "b", "c"], 2) == [[1, 0]]
    assert nearest_pictures(distances, ["a", "b", "c", "d"], 3) == [[1, 2, 0]]
    found = nearest_pictures(distances, ["a", "b", "b", "c"], 3)
    assert recall(found, ["a", "b", "b", "c"], ["b"], 1) == 1
    assert recall(found, ["a", "b", "b", "c"], ["a"], 1) == 0
    assert recall(found, ["a", "b", "b", "c"], ["a"], 2) == 1


def test_a_twin_is_the_right_picture(gallery: Gallery) -> None:
    assert gallery.groups[0] == gallery.groups[1]
    outcome = judge(gallery, "twin", [0], [""], pictures(gallery, [1]))
    assert outcome.figures["picture_r1"] == 1.0
    assert outcome.right == [True]


def test_free_prompts_accept_concept_tone_and_twins(gallery: Gallery) -> None:
    row = next(r for r, s in enumerate(gallery.samples) if s.attributes["skin_tone"] == "dark")
    concept = gallery.concepts[row]
    assert FreePrompt("x", (concept,)).accepts(gallery, row)
    assert FreePrompt("x", (concept,), ("dark",)).accepts(gallery, row)
    assert not FreePrompt("x", (concept,), ("light",)).accepts(gallery, row)
    assert not FreePrompt("x", ("nothing",)).accepts(gallery, row)
    assert FreePrompt("x", (gallery.concepts[1],)).accepts(gallery, 0)


def test_the_kept_prompts_are_readable_and_answerable() -> None:
    prompts = read_free_prompts(EMOJI / "free_prompts.jsonl")
    rows = [json.loads(line) for line in (EMOJI / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    known = {(row["concept"], row["skin_tone"]) for row in rows if row["split"] != "reserved"}
    concepts = {concept for concept, _ in known}
    assert len(prompts) == len({normalised(prompt.prompt) for prompt in prompts}) == 100
    for prompt in prompts:
        assert set(prompt.concepts) <= concepts, prompt
        assert all((concept, tone) in known for concept in prompt.concepts for tone in prompt.skin_tones), prompt


def test_the_kept_prompts_stand_in_no_caption() -> None:
    rows = [json.loads(line) for line in (EMOJI / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    captions = {normalised(caption) for row in rows for caption in [row["text"], *row["captions"]]}
    assert normalised("A 3D emoji, of  the Red-Heart!") == "3d emoji of red heart"
    assert [p.prompt for p in read_free_prompts(EMOJI / "free_prompts.jsonl") if normalised(p.prompt) in captions] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no prompts"), ('{"prompt": "x"}\n', "line 1"), ('{"prompt": "x", "concepts": ["y"]}\nnonsense', "line 2")],
)
def test_broken_prompt_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_free_prompts(tmp_path / "p.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_free_prompts(tmp_path / "absent.jsonl")


def test_captions_by_kind(gallery: Gallery) -> None:
    sample = gallery.samples[5]
    assert caption_of(sample, "label") == sample.captions[0]
    assert caption_of(sample, "a 3D emoji of").startswith("a 3D emoji of")
    with pytest.raises(PromptError, match="did you mean 'label'"):
        caption_of(sample, "labels")


def test_splits_and_subsets(gallery: Gallery) -> None:
    assert {gallery.samples[row].attributes["split"] for row in gallery.split("train")} == {"train"}
    with pytest.raises(DataError, match="choose one of"):
        gallery.split("test")
    assert spread(range(10), 3) == [0, 3, 6]
    assert spread([4, 5], 9) == [4, 5]


def test_a_folder_without_concepts_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (256, 256)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a picture")
    with pytest.raises(DataError, match="no concept and no duplicate_group"):
        load_gallery(tmp_path)


def test_the_bundled_model_is_measured_from_end_to_end(gallery: Gallery, tmp_path: Path) -> None:
    from diffusion.inference import PixArtPipeline

    pipeline = PixArtPipeline.from_pretrained(ROOT / "output/pretrained_models/emoji-256")
    pipeline.set_progress_bar_config(disable=True)
    settings = DrawingSettings(2, 4.5, batch_size=2)
    outcomes = evaluate_captions(pipeline, gallery, ["train"], ["label"], [settings], limit=3)
    outcomes += evaluate_free_prompts(
        pipeline, gallery, [FreePrompt("anything", tuple(set(gallery.concepts)))], [settings]
    )
    outcomes += round_trips(gallery, spread(range(len(gallery.samples)), 3), pipeline.vae)
    assert outcomes[1].figures["concept_r1"] == 1.0  # every concept is accepted
    assert [outcome.figures["picture_r1"] for outcome in outcomes[2:]] == [1.0, 1.0]
    assert outcomes[0].figures["pictures"] == 3
    write_outcomes(gallery, outcomes, tmp_path, {"seed": 0})
    content = json.loads((tmp_path / "retrieval.json").read_text())
    assert content["rows"][0]["name"] == "train, label, 2 steps, guidance 4.5"
    assert len(list(tmp_path.glob("sheet-*.png"))) == 4
    assert "| 100.0 % |" in (tmp_path / "retrieval.md").read_text()
    again = draw(
        pipeline,
        [caption_of(gallery.samples[gallery.split("train")[0]], "label")],
        DrawingSettings(2, 4.5, batch_size=1),
    )
    assert np.abs(np.asarray(again[0], int) - np.asarray(outcomes[0].pictures[0], int)).max() <= 2
    other = DrawingSettings(2, 4.5, batch_size=1, solver="sa-solver")
    (outcome,) = evaluate_captions(pipeline, gallery, ["train"], ["label"], [other], limit=1)
    assert outcome.figures["name"] == "train, label, sa-solver, 2 steps, guidance 4.5"
    assert type(pipeline.scheduler).__name__ == "SASolverScheduler"


def test_tables_leave_out_what_a_row_lacks() -> None:
    table = markdown_table([{"name": "a", "picture_r1": 0.5}, {"name": "b", "concept_r1": 1.0}])
    assert table.splitlines()[2] == "| a | 50.0 % |  |"
    assert table.splitlines()[3] == "| b |  | 100.0 % |"


def test_the_program_names_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import runpy
    import sys

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "tools/evaluate.py"), run_name="__main__")
        assert caught.value.code == 2
        return capsys.readouterr().err

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "b.png")
    folders = ["--generated", str(tmp_path), "--reference", str(tmp_path), "--weights", str(tmp_path / "none.pth")]
    assert "no Inception weights there; fetch https://" in run("fidelity", *folders)
    assert "carries no recipe" in run("clip", "--pictures", str(tmp_path), "--model", str(tmp_path))
    assert "--device warp cannot be used" in run("clip", "--pictures", str(tmp_path), "--device", "warp")
    assert "cannot be read" in run("retrieval", "--free_prompts", str(tmp_path / "none.jsonl"))
