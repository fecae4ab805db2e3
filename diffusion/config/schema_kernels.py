"""Section of a training config for speed: by which kernels the blocks compute."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from diffusion.config.section import Section, Strings, rule_error

FP8_LAYERS = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.proj", "mlp.fc1", "mlp.fc2")


class KernelsConfig(Section):
    """Kernels of the blocks. The defaults are plain torch; all but `fp8` compute the same function."""

    attention: Literal["torch", "auto", "cudnn", "flash", "efficient", "math", "products", "fa3", "fa4"] = Field(
        default="torch",
        description="torch: SDPA as torch chooses; a kernel of SDPA by name; products: matrix products, for bf16 on a "
        "CPU; fa3, fa4: FlashAttention from its own package; auto: the best measured on this kind of device.",
    )
    head_width: int | None = Field(
        default=None, gt=0, multiple_of=8, description="Pad attention heads to so many channels; None = do not."
    )
    text: Literal["mask", "spare", "packed", "direct"] = Field(
        default="mask",
        description="How padding of captions is left out: a mask tensor; a spare channel of the heads, which lets SDPA "
        "use its fastest kernels; captions packed one after another; or direct, Triton kernels that read the mask.",
    )
    fused: bool = Field(
        default=False,
        description="On CUDA norms, gates and GELU as Triton kernels, and clipping, AdamW and the average of the "
        "weights in one pass; on a CPU a faster GELU in compiled blocks.",
    )
    mlp: Literal["torch", "auto", "quack"] = Field(
        default="torch",
        description="quack: the feed-forward layer with its GELU inside the matrix products, by the package "
        "quack-kernels (Hopper, half precision); auto: where that is installed and works.",
    )
    onednn: bool = Field(default=False, description="float32 products of a CPU by oneDNN instead of MKL.")
    bf16_stream: bool = Field(
        default=False, description="Under autocast, keep tokens between blocks in its precision instead of float32."
    )
    fp8: Literal["rowwise", "tensorwise"] | None = Field(
        default=None, description="Lossy: FP8 products in fp8_layers, scaled by row or by tensor; None = none."
    )
    fp8_layers: Strings = Field(default=FP8_LAYERS, description="Ends of the names of the layers that fp8 changes.")

    @model_validator(mode="after")
    def _layers_are_read(self) -> Self:
        if self.fp8 is None and tuple(self.fp8_layers) != FP8_LAYERS:
            raise rule_error("fp8_layers", "has no effect; set kernels.fp8='rowwise', or leave it out")
        return self
