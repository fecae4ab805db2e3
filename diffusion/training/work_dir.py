"""The folder of a run: one run at a time, never over another's results, resumed from a whole checkpoint alone."""

from __future__ import annotations

from pathlib import Path

from diffusion.checkpoints.training_state import latest_checkpoint, remove_stale, supersede_after, verify
from diffusion.errors import CheckpointError, ConfigError
from diffusion.files import FolderLock
from diffusion.training.run_log import LOGGER

CHECKPOINTS = "checkpoints"


def open_work_dir(work_dir: Path, resume_from: str | None) -> FolderLock:
    """Make the folder, hold it and remove what interrupted saves left.

    Raises:
        WorkDirLockedError: another run holds it. ConfigError: a new run, and the folder holds one.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(work_dir)
    if resume_from is None:
        refuse_existing_run(work_dir)
    remove_stale(work_dir / CHECKPOINTS)
    return lock


def find_checkpoint(work_dir: Path, resume_from: str | None) -> Path | None:
    """The whole checkpoint to go on from: a folder, or for "latest" the newest one. None = begin at step 0.

    An older checkpoint of this run sets the later ones aside: they belong to steps that are trained anew.

    Raises:
        CheckpointError: it is damaged, or "latest" has only damaged ones. ConfigError: it belongs to another run than
            the one in this folder.
    """
    own = work_dir / CHECKPOINTS
    if resume_from is None:
        return None
    if resume_from == "latest":
        found = latest_checkpoint(own)
        if found is None:
            LOGGER.info("no checkpoint in %s yet: starting at step 0", own)
        return found
    require_startable(work_dir, resume_from)
    folder = Path(resume_from)
    is_own = folder.resolve().parent == own.resolve()
    if is_own and folder.name.startswith("checkpoint-") and folder.name[11:].isdigit():
        supersede_after(own, int(folder.name[11:]))
    return folder


def require_startable(work_dir: Path, resume_from: str | None) -> None:
    """Refuse a start that cannot succeed, without changing anything; for programs that prepare data first.

    Raises:
        CheckpointError: the checkpoint that is named is damaged. ConfigError: the folder holds another run.
    """
    if resume_from == "latest":
        return
    if resume_from is None:
        refuse_existing_run(work_dir)
        return
    folder = Path(resume_from)
    problem = verify(folder)
    if problem is not None:
        raise CheckpointError(f"{folder} cannot be resumed: {problem}")
    if folder.resolve().parent != (work_dir / CHECKPOINTS).resolve():
        refuse_existing_run(work_dir)


def refuse_existing_run(work_dir: Path) -> None:
    """A new run needs a folder without checkpoints and metrics.

    Raises:
        ConfigError: the folder holds a run.
    """
    found = [name for name in ("metrics.jsonl", CHECKPOINTS) if (work_dir / name).exists()]
    if found:
        raise ConfigError(
            f"--work-dir {work_dir} already holds a run ({', '.join(found)}); continue it with --resume-from latest "
            "or choose another folder"
        )
