"""A finished run on the hub: its card, and what it made, in one commit."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion.adapters import COMFYUI_WEIGHTS, DIFFUSERS_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS
from diffusion.checkpoints.branch import BRANCH_FOLDER
from diffusion.checkpoints.hub import CLIENT_LIBRARIES, endpoint, why_unreachable
from diffusion.checkpoints.training_state import latest_checkpoint
from diffusion.errors import CheckpointError, ConfigError, PixArtError
from diffusion.training.model_card import CARD
from diffusion.training.run_log import LOGGER

_ADAPTER = (PEFT_CONFIG, PEFT_WEIGHTS, DIFFUSERS_WEIGHTS, COMFYUI_WEIGHTS)
_OF_A_RUN = (CARD, "config.json", *_ADAPTER, "validation/*.png")


def require_account(token: str | None = None) -> str:
    """The name of the account that uploads will go to, asked before a run begins.

    Args:
        token: None = the one of `hf auth login` or HF_TOKEN.
    Raises:
        ConfigError: the hub cannot be reached, or knows no such token.
    """
    remedy = "run `hf auth login`, or set HF_ENDPOINT"
    what = f"--push_to_hub: no account on {endpoint()}"
    if (reason := why_unreachable()) is not None:
        raise ConfigError(f"{what} ({reason}); {remedy}")
    with _explained(what, remedy, ConfigError):
        return str(_client(token).whoami()["name"])


def require_account_if_asked(args: argparse.Namespace) -> None:
    """`require_account` for the flags of a training program, before anything else is done."""
    if args.push_to_hub:
        require_account(args.hub_token)
    elif args.hub_model_id is not None:
        raise ConfigError("--hub_model_id is given without --push_to_hub; give both, or neither")


def publish_if_asked(args: argparse.Namespace, work_dir: Path, *, is_main: bool) -> None:
    """`publish` for the flags of a training program."""
    if args.push_to_hub and is_main:
        publish(work_dir, args.hub_model_id or work_dir.resolve().name, token=args.hub_token)


def publish(work_dir: Path, repo: str, *, token: str | None = None) -> str:
    """Upload a finished run; returns the address of the repository.

    The card, the config, the validation pictures, and the adapter files or what the last checkpoint holds.

    Args:
        repo: `owner/name`, or a name in the account of the token; it is made if it does not exist.
    Raises:
        CheckpointError: nothing to upload, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd

    files = {path.relative_to(work_dir).as_posix(): path for pattern in _OF_A_RUN for path in work_dir.glob(pattern)}
    if PEFT_WEIGHTS not in files:
        files |= _weights(work_dir)
    api = _client(token)
    with _explained(f"{repo} could not be uploaded", f"the run itself is whole in {work_dir}", CheckpointError):
        url = api.create_repo(repo, exist_ok=True)
        operations = [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
        api.create_commit(url.repo_id, operations, commit_message=f"{work_dir.name}: model and card")
    LOGGER.info("uploaded %d files to %s", len(files), url)
    return str(url)


def _weights(work_dir: Path) -> dict[str, Path]:
    """Of the last checkpoint: the transformer (LCM's with its scheduler), a ControlNet's branch, LCM-LoRA's adapter."""
    checkpoint = latest_checkpoint(work_dir / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{work_dir} holds no checkpoint and no adapter to upload; train first")
    found = {name: checkpoint / name for name in _ADAPTER if (checkpoint / name).is_file()}
    names = (name for kind in ("transformer", BRANCH_FOLDER) for name in (f"{kind}_ema", kind))
    folder = next((name for name in names if (checkpoint / name).is_dir()), None)
    for name in (folder, "scheduler"):
        if name is not None and (checkpoint / name).is_dir():
            files = (path for path in (checkpoint / name).iterdir() if path.is_file())
            found |= {f"{name.removesuffix('_ema')}/{path.name}": path for path in files}
    if not found:
        raise CheckpointError(f"{checkpoint} holds nothing to upload: no transformer, ControlNet or adapter")
    return found


@contextlib.contextmanager
def _explained(what: str, remedy: str, kind: type[PixArtError]) -> Iterator[None]:
    """Turn the hub client's errors, and those of its HTTP library, into one line."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in CLIENT_LIBRARIES:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise kind(f"{what} ({reason}); {remedy}") from error


def _client(token: str | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), token=token)
