# Purpose: distil the 1024 px model into a latent consistency model (4 steps); give the teacher with --load-from.
# Data: InternalDataMS layout under /data/data/InternData (partition_filter/data_info.json), multi-scale features.
# Batch: 16 per process x N processes x 1 accumulation = 128 a step on 8; auto_lr scales lr by sqrt(batch / 256).
# Hardware: one CUDA GPU per process; the batch is the original's, lower train_batch_size if memory does not suffice.
_base_ = ["../PixArt_xl2_internal.py"]
data_root = "/data/data"
data = dict(
    type="InternalDataMS",
    root="InternData",
    image_list_json=["data_info.json"],
    transform="default_train",
    load_vae_feat=True,
)
image_size = 1024

# model
model = "PixArtMS_XL_2"
fp32_attention = False
vae_pretrained = "output/pretrained_models/sd-vae-ft-ema"
aspect_ratio_type = "ASPECT_RATIO_1024"
multi_scale = True
lewei_scale = 2.0

# training
num_workers = 4
train_batch_size = 16
num_epochs = 10
gradient_accumulation_steps = 1
grad_checkpointing = True
gradient_clip = 0.01
optimizer = dict(type="AdamW", lr=2e-5, weight_decay=0.0, eps=1e-10)
lr_schedule_args = dict(num_warmup_steps=100)
eval_sampling_steps = 200
log_interval = 10
save_model_epochs = 1
save_model_steps = 200
work_dir = "output/debug"

# LCM distillation
loss_type = "huber"
huber_c = 1e-3
num_ddim_timesteps = 50
w_max = 15.0
w_min = 3.0
ema_decay = 0.95
cfg_scale = 4.5
class_dropout_prob = 0.0
lora_rank = 32
