"""Where pictures with captions come from: one adapter a layout, one record type."""

from diffusion.features.sources.folder import read_folder, scan_folder
from diffusion.features.sources.mirror import mirrored
from diffusion.features.sources.opening import open_source
from diffusion.features.sources.original import picture_roots, read_json_list
from diffusion.features.sources.sample import Columns, Picture, PictureFile, Rejected, Sample, Source

__all__ = [
    "Columns",
    "Picture",
    "PictureFile",
    "Rejected",
    "Sample",
    "Source",
    "mirrored",
    "open_source",
    "picture_roots",
    "read_folder",
    "read_json_list",
    "scan_folder",
]
