# Purpose: distil the bundled model into a latent consistency model that draws in 1 to 8 steps without guidance.
# Data: output/features/emoji-256, as emoji_256.py.
# Batch: 256 per process x 1 process x 1 accumulation = 256 a step; a step costs four passes of the network, one of them
#        with gradients.
# Hardware: one CUDA GPU; on a CPU train_batch_size=4 max_steps=20 mixed_precision=no num_workers=0.
_base_ = ["emoji_base.py"]
load_from = "output/pretrained_models/emoji-256"  # the teacher
num_workers = 4
train_batch_size = 256
num_epochs = 100000  # max_steps ends the run
max_steps = 300
mixed_precision = "fp16"  # at t = 999 a rounding of the noise is 157 times as large in the picture: bf16 is too coarse
optimizer = dict(type="AdamW", lr=5e-5, weight_decay=0.0, eps=1e-8, betas=(0.9, 0.99))
lr_schedule = "cosine"
lr_schedule_args = dict(num_warmup_steps=100)
class_dropout_prob = 0.0

# LCM distillation
loss_type = "huber"
huber_c = 1e-3
num_ddim_timesteps = 50
cfg_scale = 2.0  # uncond + 3 (cond - uncond): the guidance that the teacher is drawn with
ema_decay = 0.95

log_interval = 20
save_model_steps = 100
validation = dict(every_steps=100, at_start=False, num_inference_steps=4, guidance_scale=1.0)
work_dir = "output/lcm"
