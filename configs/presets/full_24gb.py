# Preset full-24gb: all weights of PixArt-XL/2 at 512 px on one card of 24 GB.
# Purpose: fine-tune the official 512 px model on your pictures.
# Data: output/features/mine-512, extracted with the official T5 and VAE:
#       python tools/extract_features.py FOLDER --out output/features/mine-512 --image-size 512 --pretrained PIPELINE
# Batch: 16 per process x 1 process x 2 accumulation = 32 a step.
# Memory: weights, gradients and moments take 9.8 GB in fp32; blocks are recomputed in the backward pass; no averaged
#         weights. With optimizer.type="AdamW8bit" (extra `lowbit`) the moments take 1.3 GB instead of 4.9.
# Hardware: one CUDA GPU of 24 GB with bf16. Measured by benchmarks/measure_presets.py, see docs/recipe.md.
data_root = "."
data = dict(type="Store", root="output/features/mine-512")
image_size = 512
model = "PixArt_XL_2"
load_from = "output/pretrained_models/PixArt-XL-2-512x512.pth"
null_caption = "stored"  # as the official weights were trained
num_workers = 4
train_batch_size = 16
gradient_accumulation_steps = 2
num_epochs = 100000  # max_steps ends the run
max_steps = 2000
mixed_precision = "bf16"
grad_checkpointing = True
gradient_clip = 0.01
optimizer = dict(type="AdamW", lr=1e-5, weight_decay=3e-2, eps=1e-8)
auto_lr = None
lr_schedule_args = dict(num_warmup_steps=100)
ema_rate = None
save_model_epochs = None
save_model_steps = 500
checkpoints_total_limit = 2
log_interval = 10
work_dir = "output/full-24gb"
