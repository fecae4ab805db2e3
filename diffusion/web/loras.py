"""LoRA adapters that a page offers: the files and folders of one folder, by their names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from diffusion.errors import PromptError, did_you_mean

_logger = logging.getLogger(__name__)


class Loras:
    """Adapters below `folder`: `NAME.safetensors`, or `NAME/` with a .safetensors file in it. None may be there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._applied: tuple[str, int] | None = None  # its name, and when its file was written

    def names(self) -> list[str]:
        """What is there now, sorted."""
        return sorted(self._found())

    def apply(self, pipeline: Any, name: str | None, scale: float) -> dict[str, Any]:
        """Have the pipeline draw with one adapter, or with none; returns what recipes say about it.

        Raises:
            PromptError: no such adapter, or a network in FP8. CheckpointError: it does not fit; the pipeline then draws
                with none.
        """
        if name is None or scale == 0:
            self._unload(pipeline)
            return {}
        found = self._found()
        if name not in found:
            raise PromptError(f"LoRA {name[:60]!r} is not in {self.folder}; {did_you_mean(name[:60], found)}")
        wanted = name, _written(found[name])
        if self._applied != wanted:
            self._unload(pipeline)
            try:
                pipeline.load_lora_weights(str(found[name]), adapter_name="page")
            except Exception:
                pipeline.unload_lora_weights()  # some layers may hold it already
                raise
            self._applied = wanted
        pipeline.set_adapters(["page"], [scale])
        return {"lora": name, "lora_scale": scale}

    def _unload(self, pipeline: Any) -> None:
        if self._applied is not None:
            self._applied = None
            pipeline.unload_lora_weights()

    def _found(self) -> dict[str, Path]:
        if not self.folder.is_dir():
            return {}
        files = {path.stem: path for path in self.folder.glob("*.safetensors")}
        folders = {path.parent.name: path.parent for path in self.folder.glob("*/*.safetensors")}
        return {**folders, **files}


def _written(path: Path) -> int:
    """When an adapter was written, in nanoseconds: training may have replaced it."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return max(file.stat().st_mtime_ns for file in files)
