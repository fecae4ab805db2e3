"""What a run may be resumed from: the same training on the same data, from a whole checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from diffusion.checkpoints.training_state import FORMAT_VERSION, latest_checkpoint, list_checkpoints, set_aside, verify
from diffusion.config import TrainConfig, load_config
from diffusion.errors import CheckpointError, ConfigError, DataError
from diffusion.features import ExtractionSettings, extract_folder
from diffusion.training import Reporting, Trainer, denoising_objective
from diffusion.training.continuity import check_config, check_data, data_identity
from tests.programs import run_program
from tests.training.test_trainer import train_program
from tests.training.tiny_run import ROOT, run, write_config
from tests.training.write_faults import in_child


@pytest.fixture(scope="module")
def finished(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.py and run/: 3 steps, checkpoints at each."""
    root = tmp_path_factory.mktemp("continuity")
    config = load_config(write_config(root / "config.py", parts), ["max_steps=3", "save_model_steps=1"])
    run(config, root / "run")
    return root


@pytest.fixture
def work_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def resume(finished: Path, work_dir: Path, *options: str, source: str = "latest", allow: bool = False) -> Trainer:
    """The run as it stands before its next step."""
    trainer = Trainer(
        load_config(finished / "config.py", ["save_model_steps=1", *options]),
        denoising_objective,
        work_dir,
        resume_from=source,
        allow_config_change=allow,
        reporting=Reporting(tensorboard=False),
    )
    trainer.lock.release()
    return trainer


def config_with(finished: Path, *options: str) -> TrainConfig:
    return load_config(finished / "config.py", options, notify=lambda line: None)


def test_changes_are_shown_and_harmful_ones_need_a_word(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = config_with(finished).model_dump(mode="json")
    quiet = ["log_interval=7", "num_workers=1", "save_model_steps=9", "validation.every_steps=5", "max_steps=99"]
    check_config(saved, config_with(finished, *quiet, "work_dir='elsewhere'"), allow=False)
    harmful = config_with(finished, "optimizer.lr=2e-3", "seed=1", "log_interval=7")
    with pytest.raises(ConfigError) as error:
        check_config(saved, harmful, allow=False)
    assert str(error.value) == (
        "the config changed since the checkpoint: optimizer.lr 0.001 -> 0.002, seed 43 -> 1; set it back, or add "
        "--allow-config-change to go on with it"
    )
    check_config(saved, harmful, allow=True)


def test_the_length_of_a_run_matters_to_a_schedule_that_ends_with_it(finished: Path) -> None:
    saved = config_with(finished, "lr_schedule='cosine'").model_dump(mode="json")
    with pytest.raises(ConfigError, match="max_steps 6 -> 12"):
        check_config(saved, config_with(finished, "lr_schedule='cosine'", "max_steps=12"), allow=False)


def test_keys_younger_than_the_checkpoint_have_their_defaults(finished: Path) -> None:
    saved = config_with(finished).model_dump(mode="json")
    del saved["process"]["logit_std"], saved["gradient_clip"]
    check_config(saved, config_with(finished), allow=False)
    with pytest.raises(ConfigError, match=r"gradient_clip 1.0 -> 0.5"):
        check_config(saved, config_with(finished, "gradient_clip=0.5"), allow=False)
    saved["of_an_older_version"] = 1
    with pytest.raises(ConfigError, match="of_an_older_version 1 -> None"):
        check_config(saved, config_with(finished), allow=False)


def test_a_changed_config_is_listed_by_the_run(
    finished: Path, work_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"ema_rate 0.9 -> 0.5; .*--allow-config-change"):
        resume(finished, work_dir, "ema_rate=0.5")
    assert resume(finished, work_dir, "ema_rate=0.5", "log_interval=2", allow=True).state.step == 3
    said = capsys.readouterr().out
    assert "config changed since the checkpoint: ema_rate 0.9 -> 0.5 (--allow-config-change)\n" in said
    assert "config changed since the checkpoint: log_interval 1 -> 2\n" in said


def test_other_data_are_refused_and_the_same_data_may_move(
    finished: Path, work_dir: Path, parts: Path, tmp_path: Path
) -> None:
    shutil.copytree(parts / "store", tmp_path / "moved")
    assert resume(finished, work_dir, f"data.root={tmp_path / 'moved'}").state.step == 3
    settings = ExtractionSettings(image_size=32, dtype="fp32")
    extract_folder(ROOT / "data/emoji", tmp_path / "other", parts / "pipe", settings, limit=24)
    options = [f"data.root={tmp_path / 'other'}"]
    with pytest.raises(ConfigError, match=r"data.root=.*other is not the data of the checkpoint: it has \d+ samples"):
        resume(finished, work_dir, *options)
    assert resume(finished, work_dir, *options, allow=True).state.step == 3


def test_the_original_layouts_are_told_apart_by_their_names() -> None:
    class Layout:
        def __init__(self, *names: str) -> None:
            self.entries = [type("Entry", (), {"key": name, "bucket": (32, 32)})() for name in names]

        def __len__(self) -> int:
            return len(self.entries)

    saved = data_identity(Layout("a", "b"))
    check_data(saved, Layout("a", "b"), "data.root=x", allow=False)
    check_data(None, Layout("c"), "data.root=x", allow=False)
    for other in (Layout("b", "a"), Layout("a")):
        with pytest.raises(ConfigError, match=r"data.root=x is not the data of the checkpoint"):
            check_data(saved, other, "data.root=x", allow=False)


def test_another_model_is_refused(finished: Path, work_dir: Path) -> None:
    with pytest.raises(ConfigError, match="depth 2 -> 1"):
        resume(finished, work_dir, "depth=1")
    with pytest.raises(CheckpointError, match=r"checkpoint-3 does not fit the model; unexpected: blocks.1"):
        resume(finished, work_dir, "depth=1", allow=True)
    with pytest.raises(DataError, match="caption_channels"):
        resume(finished, work_dir, "caption_channels=64", allow=True)
    with pytest.raises(CheckpointError, match=r"does not fit the optimizer \(Missing key .*resume_optimizer=False"):
        resume(finished, work_dir, "optimizer.type='SGD'", "optimizer.eps=None", "optimizer.momentum=0.9", allow=True)


def test_a_broken_newest_checkpoint_is_renamed_and_the_one_before_is_used(
    finished: Path, work_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = work_dir / "checkpoints"
    weights = checkpoints / "checkpoint-3/transformer/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit
    weights.write_bytes(content)
    shutil.rmtree(checkpoints / "checkpoint-2/training_state")  # half deleted
    assert resume(finished, work_dir).state.step == 1
    said = capsys.readouterr().out
    assert "diffusion_pytorch_model.safetensors is damaged (its hash differs); it is renamed and the one before" in said
    assert "checkpoint-2 is damaged: training_state/" in said
    (checkpoints / "checkpoint-1/manifest.json").unlink()
    for _ in range(2):  # a scheduler starts it again and again: it never begins at step 0
        with pytest.raises(CheckpointError, match="no checkpoint in .* is whole; restore one from a copy"):
            resume(finished, work_dir)
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["checkpoint-1.corrupt", "checkpoint-2.corrupt", "checkpoint-3.corrupt"]
    shutil.copytree(finished / "run/checkpoints/checkpoint-3", checkpoints / "checkpoint-3")
    assert set_aside(checkpoints / "checkpoint-3", "corrupt").name == "checkpoint-3.corrupt-2"


def test_a_newer_format_is_no_damage(finished: Path, work_dir: Path) -> None:
    path = work_dir / "checkpoints/checkpoint-3/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(CheckpointError, match=rf"format version {FORMAT_VERSION + 1}, written by a newer version"):
        resume(finished, work_dir)
    assert path.is_file()  # and nothing was renamed


def test_a_named_checkpoint_must_be_one(finished: Path, work_dir: Path) -> None:
    for source, problem in (("none", "no such folder"), ("", "manifest.json is missing")):
        with pytest.raises(CheckpointError, match=f"cannot be resumed: {problem}"):
            resume(finished, work_dir, source=str(work_dir / source))


def test_an_older_checkpoint_sets_the_later_ones_aside(finished: Path, work_dir: Path) -> None:
    """Else the next `latest` would go on from a step that was trained otherwise."""
    checkpoints = work_dir / "checkpoints"
    assert resume(finished, work_dir, source=str(checkpoints / "checkpoint-1")).state.step == 1
    assert [step for step, _ in list_checkpoints(checkpoints)] == [1]
    assert (checkpoints / "checkpoint-3.superseded").is_dir()
    assert latest_checkpoint(checkpoints) == checkpoints / "checkpoint-1"


def test_another_runs_checkpoint_begins_a_folder_of_its_own(finished: Path, work_dir: Path, tmp_path: Path) -> None:
    source = str(finished / "run/checkpoints/checkpoint-2")
    with pytest.raises(ConfigError, match="already holds a run"):
        resume(finished, work_dir, source=source)
    assert resume(finished, tmp_path / "new", source=source).state.step == 2


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_checkpoint_without_permission_is_named(work_dir: Path) -> None:
    folder = work_dir / "checkpoints/checkpoint-3"
    for parent in [folder, *folder.parents][: len(folder.parts) - 2]:
        parent.chmod(0o755)
    (folder / "trainer.json").chmod(0o600)

    def as_nobody() -> str:
        os.setuid(65534)
        try:
            return str(verify(folder))
        except CheckpointError as error:
            return f"error: {error}"

    assert in_child(as_nobody) == (
        0,
        f"error: {folder / 'trainer.json'} may not be read (permission denied); mend its permissions",
    )


@pytest.mark.slow
def test_mistakes_of_resuming_are_one_line_for_the_user(finished: Path, work_dir: Path) -> None:
    program = train_program(finished / "config.py", work_dir, "seed=5", "resume_from.checkpoint=latest")
    done = run_program(program)
    assert done.returncode == 2
    assert "error: the config changed since the checkpoint: seed 43 -> 5; set it back" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    done = run_program([*program, "--allow-config-change"])
    assert done.returncode == 0, done.stderr[-2000:]
