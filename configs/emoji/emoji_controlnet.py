# Purpose: a ControlNet that makes the bundled model follow edges.
# Data: output/features/emoji-canny, pictures with their Canny edges:
#       python tools/extract_features.py data/emoji --condition canny --out output/features/emoji-canny
# Batch: 256 per process x 1 process x 1 accumulation = 256 a step.
# Hardware: one CUDA GPU with bf16; on a CPU train_batch_size=4 max_steps=20 mixed_precision=no num_workers=0.
_base_ = ["emoji_base.py"]
data = dict(root="output/features/emoji-canny")
load_from = "output/pretrained_models/emoji-256"  # the base
num_workers = 4
train_batch_size = 256
num_epochs = 100000  # max_steps ends the run
max_steps = 4000
mixed_precision = "bf16"
optimizer = dict(type="AdamW", lr=5e-4, weight_decay=0.01, eps=1e-8, betas=(0.9, 0.99))
lr_schedule = "cosine"
lr_schedule_args = dict(num_warmup_steps=100)
class_dropout_prob = 0.3  # an absent caption makes the branch look at the condition
ema_rate = 0.99

# ControlNet
copy_blocks_num = 5  # of 10, as 13 of the 28 of PixArt-XL/2

log_interval = 50
save_model_steps = 500
validation = dict(every_steps=500, at_start=False)
work_dir = "output/controlnet"
