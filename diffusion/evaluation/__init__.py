"""How good a model's pictures are: retrieval, sharpness, FID, KID, CLIP score."""
