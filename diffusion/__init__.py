"""PixArt-alpha / PixArt-delta: models, training and sampling. Rooms and their order: docs/architecture.md."""

__version__ = "0.1.0"
