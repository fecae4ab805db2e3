# Preset full-80gb: all weights of PixArt-XL/2 at 512 px on one card of 80 GB: no recomputation, averaged weights.
# Purpose: fine-tune the official 512 px model on your pictures, faster than with full_24gb.py.
# Data: as full_24gb.py.
# Batch: 12 per process x 1 process x 3 accumulation = 36 a step.
# Hardware: one CUDA GPU of 80 GB with bf16. Measured by benchmarks/measure_presets.py, see docs/recipe.md.
_base_ = ["full_24gb.py"]
train_batch_size = 12
gradient_accumulation_steps = 3
grad_checkpointing = False
ema_rate = 0.9999
work_dir = "output/full-80gb"
