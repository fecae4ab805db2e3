"""Draws the same pictures on all processes of a start: torchrun ... -m tests.inference.parallel_worker PIPE OUT."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffusion.errors import PixArtError
from diffusion.inference import PixArtPipeline
from diffusion.models import ControlPixArt
from diffusion.ranks import Ranks
from tests.inference.tiny_pipeline import load_quietly, tiny_transformer


@dataclass(frozen=True)
class Case:
    """row_groups: of `SharedForward`; network: overrides of the tiny one; call: arguments of the pipeline."""

    row_groups: int | None = None
    network: dict[str, Any] = field(default_factory=dict)
    controlled: bool = False
    call: dict[str, Any] = field(default_factory=dict)

    def load(self) -> dict[str, Any]:
        """What the pipeline is loaded with beside its folder."""
        network = tiny_transformer(**self.network)
        return {"transformer": controlled(network) if self.controlled else network}


COMPRESSED = {"sampling": "conv", "scale_factor": 2, "layers": [1]}
CASES = {
    "guided": Case(),
    "tokens alone": Case(row_groups=1, call={"guidance_scale": 1.0}),
    "rows alone": Case(row_groups=4, call={"num_images_per_prompt": 2, "height": 32, "width": 64}),
    "control": Case(controlled=True, call={"control_image": Image.linear_gradient("L").convert("RGB")}),
    "sizes": Case(
        network={"micro_condition": True, "kv_compress": {"sampling": "conv", "scale_factor": 2, "layers": [1]}}
    ),
}


def controlled(base: Any) -> ControlPixArt:
    """A ControlNet whose random weights make it answer to its condition."""
    network = ControlPixArt(base, num_blocks=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.controlnet.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    return network.eval()


def draw(pipeline: PixArtPipeline, case: Case) -> torch.Tensor:
    """(B, 3, H, W)."""
    call = {"num_inference_steps": 3, "seed": 5, **case.call}
    return pipeline("a red apple", output_type="pt", **call).images  # type: ignore[no-any-return]


def main(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks("cpu")
    for name, case in CASES.items():
        pipeline = load_quietly(folder, **case.load())
        pipeline.share_work(ranks, row_groups=case.row_groups)
        torch.save(draw(pipeline, case), out / f"{name}-{ranks.rank}.pt")
    errors = []
    pipeline = load_quietly(folder)
    for groups, call in ((2, {"guidance_scale": 1.0}), (1, {"height": 96})):
        try:
            pipeline.share_work(ranks, row_groups=groups)
            draw(pipeline, Case(call=call))
        except PixArtError as error:
            errors.append(str(error))
    (out / f"errors-{ranks.rank}.txt").write_text("\n".join(errors))
    pipeline.end_sharing()
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
