# Preset scratch-tiny: a small model from nothing, to see that training works, on almost any card.
# Purpose: the bundled emoji model's network and data, in minutes instead of half an hour.
# Data: output/features/emoji-256: python tools/extract_features.py data/emoji --out output/features/emoji-256
# Batch: 64 per process x 1 process x 1 accumulation = 64 a step; 6,000 steps.
# Hardware: one CUDA GPU with 8 GiB and bf16. Measured by benchmarks/measure_presets.py, see docs/recipe.md.
_base_ = ["../emoji/emoji_base.py"]
num_workers = 4
train_batch_size = 64
num_epochs = 100000  # max_steps ends the run
max_steps = 6000
mixed_precision = "bf16"
optimizer = dict(type="AdamW", lr=7e-4, weight_decay=0.01, eps=1e-8, betas=(0.9, 0.99))
lr_schedule = "cosine"
lr_schedule_args = dict(num_warmup_steps=100)
ema_rate = 0.999
log_interval = 20
save_model_steps = 1000
validation = dict(every_steps=1000, at_start=False)
work_dir = "output/scratch-tiny"
