"""The `lora` section: what trains when the network itself stays as it is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from diffusion.config.section import Section, rule_error


class LoraConfig(Section):
    """Low-rank factors on every layer of a frozen network (arXiv:2106.09685)."""

    rank: int = Field(default=4, ge=1, description="Rank of the factors; files and moments grow with it.")
    alpha: float = Field(
        default=8.0, gt=0, description="The change is scaled by alpha / rank (alpha / sqrt(rank) with use_rslora)."
    )
    use_dora: bool = Field(default=False, description="Also learn the magnitude of each output row (arXiv:2402.09353).")
    use_rslora: bool = Field(default=False, description="Divide by sqrt(rank), for high ranks (arXiv:2312.03732).")
    base_dtype: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        default="auto",
        description="Precision of the frozen weights: auto = that of mixed_precision; int8 = linear layers in int8.",
    )
    save_dtype: Literal["fp32", "fp16", "bf16"] = Field(
        default="fp32", description="Precision of the adapter files that a finished run exports."
    )

    @model_validator(mode="after")
    def _dora_needs_whole_weights(self) -> Self:
        if self.use_dora and self.base_dtype == "int8":
            raise rule_error("use_dora", "needs the norms of whole weights; set lora.base_dtype='bf16', not 'int8'")
        return self
