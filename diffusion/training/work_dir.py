"""The folder of a run: no run starts over another's results."""

from __future__ import annotations

from pathlib import Path

from diffusion.errors import ConfigError


def refuse_existing_run(work_dir: Path) -> None:
    """A new run needs a folder without checkpoints and metrics.

    Raises:
        ConfigError: the folder holds a run.
    """
    found = [name for name in ("metrics.jsonl", "checkpoints") if (work_dir / name).exists()]
    if found:
        raise ConfigError(
            f"--work-dir {work_dir} already holds a run ({', '.join(found)}); continue it with --resume-from latest "
            "or choose another folder"
        )
