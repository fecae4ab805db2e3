"""Pictures: decoding, aspect-ratio buckets, transforms, edges, the VAE, labelled grids."""

from diffusion.images.buckets import (
    ASPECT_RATIO_256,
    ASPECT_RATIO_256_TEST,
    ASPECT_RATIO_512,
    ASPECT_RATIO_512_TEST,
    ASPECT_RATIO_1024,
    ASPECT_RATIO_1024_TEST,
    ASPECT_RATIO_2048,
    ASPECT_RATIO_2048_TEST,
    ASPECT_RATIO_2880,
    ASPECT_RATIO_2880_TEST,
    BucketTable,
    Measure,
    aspect_ratio_table,
    closest_bucket,
    with_transposes,
)
from diffusion.images.decoding import (
    IMAGE_SUFFIXES,
    PREPROCESSING_VERSION,
    decode_bytes,
    decode_image,
    picture_size,
    read_picture,
)
from diffusion.images.edges import canny_edges, detect_edges
from diffusion.images.grid import labelled_grid
from diffusion.images.shared_decoding import SharedDecoder
from diffusion.images.transforms import crop_box_for, resize_and_crop, to_pil, to_tensor, to_unit_range
from diffusion.images.vae import compile_encoder, decode_latents, encode_moments, load_vae, vae_factor, vae_folder

__all__ = [
    "ASPECT_RATIO_256",
    "ASPECT_RATIO_256_TEST",
    "ASPECT_RATIO_512",
    "ASPECT_RATIO_512_TEST",
    "ASPECT_RATIO_1024",
    "ASPECT_RATIO_1024_TEST",
    "ASPECT_RATIO_2048",
    "ASPECT_RATIO_2048_TEST",
    "ASPECT_RATIO_2880",
    "ASPECT_RATIO_2880_TEST",
    "IMAGE_SUFFIXES",
    "PREPROCESSING_VERSION",
    "BucketTable",
    "Measure",
    "SharedDecoder",
    "aspect_ratio_table",
    "canny_edges",
    "closest_bucket",
    "compile_encoder",
    "crop_box_for",
    "decode_bytes",
    "decode_image",
    "decode_latents",
    "detect_edges",
    "encode_moments",
    "labelled_grid",
    "load_vae",
    "picture_size",
    "read_picture",
    "resize_and_crop",
    "to_pil",
    "to_tensor",
    "to_unit_range",
    "vae_factor",
    "vae_folder",
    "with_transposes",
]
