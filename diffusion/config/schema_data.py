"""The `data` section: which features a run reads."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator
from typing_extensions import Self

from diffusion.config.section import Names, Section, Strings, rule_error

DataType = Literal["Store", "SAM", "InternalData", "InternalDataMS", "InternalDataHed", "DreamBooth"]
DATA_TYPES: tuple[str, ...] = get_args(DataType)
_FEATURES = frozenset({"load_vae_feat", "load_t5_feat", "transform"})
_INTERNAL = _FEATURES | {"image_list_json"}
# Keys that each data type reads, beside `type` and `root`. A key set for another type gets a notice: the original
# configs inherit such keys from their base file.
KEYS_READ_BY_TYPE: dict[str, frozenset[str]] = {
    "Store": frozenset({"split", "balance_by", "class_by", "max_captions", "mix"}),
    "SAM": _FEATURES | {"image_list_txt"},
    "InternalData": _INTERNAL,
    "InternalDataMS": _INTERNAL,
    "InternalDataHed": _INTERNAL,
    "DreamBooth": frozenset({"prompt", "transform", "token", "class_prompt", "num_class_images", "prior_weight"}),
}


class DataConfig(Section):
    """One data set. `type` chooses the reader; KEYS_READ_BY_TYPE says which other keys it reads."""

    type: DataType = Field(
        description="Reader: Store (Arrow feature store written by tools/extract_features.py), the original's layouts "
        "SAM, InternalData, InternalDataMS (aspect-ratio buckets), InternalDataHed (ControlNet), or DreamBooth."
    )
    root: str = Field(min_length=1, description="Folder of the data set; a relative path is joined to data_root.")
    split: str | None = Field(
        default=None, description="Store: split to read, such as 'train' or 'heldout'; None reads all rows."
    )
    balance_by: str | None = Field(
        default=None,
        description="Store: attribute (such as 'concept') whose values are drawn equally often; None = every row once "
        "an epoch.",
    )
    class_by: str | None = Field(
        default=None,
        description="Store: attribute that is a sample's class, for DiT_* models: numbers as they are, names in "
        "alphabetical order.",
    )
    max_captions: int | None = Field(
        default=None, gt=0, description="Store: draw from the first so many captions of a picture; None = from all."
    )
    mix: dict[str, float] = Field(
        default={},
        description="Store: further stores, made alike, and how often each of their rows is drawn an epoch (2, 0.5); "
        "rows of root are drawn once, or as often as its entry here says. With multi_scale they may be of other sizes.",
    )
    image_list_txt: Names = Field(
        default=(),
        description="SAM: file names under <root>/partition, a picture name without extension a line; one or a list.",
    )
    image_list_json: Names = Field(
        default=(),
        description="InternalData*: metadata files under <root>/partition or partition_filter; one or a list.",
    )
    transform: str | None = Field(
        default="default_train", description="Picture transform when VAE features are not loaded; 'default_train'."
    )
    load_vae_feat: bool = Field(
        default=True, description="Read stored VAE mean and std (True) or decode pictures in training (False)."
    )
    load_t5_feat: bool = Field(default=True, description="Read stored caption embeddings (True) or encode captions.")
    prompt: Strings = Field(default=(), description="DreamBooth: the caption of all pictures, as a list of one string.")
    token: str | None = Field(
        default=None, description="DreamBooth: the word of the prompt that names the subject, as 'sks'."
    )
    class_prompt: str | None = Field(
        default=None, description="DreamBooth: what the subject is one of; pictures of it are drawn and learned too."
    )
    num_class_images: int = Field(default=100, gt=0, description="DreamBooth: pictures of the class that are drawn.")
    prior_weight: float = Field(
        default=1.0, gt=0, description="DreamBooth: pictures of the class drawn for each picture of the subject."
    )

    @model_validator(mode="after")
    def _mix_is_possible(self) -> Self:
        for root, weight in self.mix.items():
            if not 0 < weight <= 1000:
                raise rule_error("mix", f"draws {root!r} {weight!r} times an epoch; use a number between 0 and 1000")
        if self.mix and self.balance_by is not None:
            raise rule_error("mix", "and balance_by both say how often a row is drawn; set one of them")
        return self

    @model_validator(mode="after")
    def _type_has_its_list(self) -> Self:
        needed = {"SAM": "image_list_txt", "DreamBooth": "prompt"}.get(self.type, "image_list_json")
        if self.type != "Store" and not getattr(self, needed):
            raise rule_error(needed, f"must not be empty when data.type is '{self.type}'; list at least one entry")
        return self
