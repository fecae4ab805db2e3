# Purpose: see the whole way in about a minute: fine-tune the bundled weights a little, with pictures before and after.
# Data: output/features/emoji-demo, extracted by `make demo` from a part of data/emoji.
# Batch: 16 per process x 1 process x 1 accumulation = 16 a step; 30 steps = 480 samples.
# Hardware: 2 CPU cores, no GPU. Expect pictures much like those before: 30 steps are for seeing, not for learning.
_base_ = ["emoji_base.py"]
data = dict(root="output/features/emoji-demo")
load_from = "output/pretrained_models/emoji-256"
num_workers = 0
train_batch_size = 16
num_epochs = 1000  # max_steps ends the run
max_steps = 30
mixed_precision = "no"
optimizer = dict(type="AdamW", lr=5e-6, weight_decay=0.01, eps=1e-8, betas=(0.9, 0.99))
lr_schedule = "constant"
lr_schedule_args = dict(num_warmup_steps=0)
ema_rate = None  # EMA over 30 steps would still be the weights it started from
log_interval = 1
save_model_steps = 30
validation = dict(every_steps=30, at_start=True, num_samples=16, num_inference_steps=14)
work_dir = "output/demo"
