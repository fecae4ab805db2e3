# Purpose: distil the bundled model into a generator of one step (DMD).
# Data: output/features/emoji-256, as emoji_256.py; with regression_weight > 0 the store of pairs that
#       tools/generate_dmd_pairs.py makes of it.
# Batch: 128 per process x 1 process x 1 accumulation = 128 a step; a step trains two networks and asks two more.
# Hardware: one CUDA GPU; on a CPU train_batch_size=2 max_steps=5 mixed_precision=no num_workers=0.
_base_ = ["emoji_base.py"]
load_from = "output/pretrained_models/emoji-256"  # the teacher
num_workers = 4
train_batch_size = 128
num_epochs = 100000  # max_steps ends the run
max_steps = 2000
mixed_precision = "bf16"
optimizer = dict(type="AdamW", lr=1e-4, weight_decay=0.0, eps=1e-8, betas=(0.9, 0.99))
lr_schedule_args = dict(num_warmup_steps=100)
class_dropout_prob = 0.0
ema_rate = 0.99

# DMD
one_step_timestep = 400
dmd_max_timestep = 950
dmd_guidance_scale = 3.0
regression_weight = 0.0

log_interval = 50
save_model_steps = 500
validation = dict(every_steps=500, at_start=False)
work_dir = "output/dmd"
