# Preset full-80gb: all weights of PixArt-XL/2 at 512 px on a card of 80 GB: compiled, no recomputation, an EMA.
# Purpose: fine-tune the official 512 px model on your pictures, faster than with full_24gb.py.
# Data: as full_24gb.py.
# Batch: 32 per process x 1 process x 1 accumulation = 32 a step.
# Hardware: one CUDA GPU of 80 GB with bf16. Measured by benchmarks/measure_presets.py, see docs/recipe.md.
_base_ = ["full_24gb.py"]
train_batch_size = 32
gradient_accumulation_steps = 1
grad_checkpointing = False
compile = True
ema_rate = 0.9999
work_dir = "output/full-80gb"
