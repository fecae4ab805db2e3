# Purpose: train on your own pictures, starting from the bundled weights; the first run a newcomer makes.
# Data: output/features/mine, extracted from a folder of pictures with captions:
#       python tools/extract_features.py FOLDER --out output/features/mine
# Batch: 8 per process x 1 process x 1 accumulation = 8 a step; 200 steps = 1,600 samples.
# Hardware: 2 CPU cores are enough (about 2 s a step); a GPU takes train_batch_size=256.
# Expect the validation grid to move from emoji towards your pictures; a few hundred pictures are better than twenty.
_base_ = ["emoji_base.py"]
data = dict(_delete_=True, type="Store", root="output/features/mine")
load_from = "output/pretrained_models/emoji-256"
num_workers = 0
train_batch_size = 8
num_epochs = 1000  # max_steps ends the run
max_steps = 200
mixed_precision = "no"
optimizer = dict(type="AdamW", lr=2e-4, weight_decay=0.01, eps=1e-8, betas=(0.9, 0.99))
lr_schedule_args = dict(num_warmup_steps=20)
ema_rate = None
log_interval = 10
save_model_steps = 100
validation = dict(every_steps=100, at_start=True, num_samples=0, num_inference_steps=14)  # nothing is held out
work_dir = "output/mine"
