"""Where pictures with captions come from: one adapter a layout, one record type."""

from diffusion.features.sources.folder import read_folder, scan_folder
from diffusion.features.sources.opening import open_source
from diffusion.features.sources.original import picture_roots, read_json_list
from diffusion.features.sources.sample import Picture, PictureFile, Rejected, Sample, Source

__all__ = [
    "Picture",
    "PictureFile",
    "Rejected",
    "Sample",
    "Source",
    "open_source",
    "picture_roots",
    "read_folder",
    "read_json_list",
    "scan_folder",
]
