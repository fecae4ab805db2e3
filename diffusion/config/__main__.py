"""Print all config keys with default and meaning: python -m diffusion.config"""

from __future__ import annotations

from diffusion.config.reference import describe_keys

print(describe_keys())
