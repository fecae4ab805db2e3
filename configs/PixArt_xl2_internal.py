# Base of the InternalData configs: every key of the original with its default value.
# Purpose: inherited by configs/pixart_config and configs/pixart_app_config; trains PixArt-XL/2 at 256 px by itself.
# Data: T5 and VAE features in the InternalData layout under /data/data/images (partition/data_info.json).
# Batch: 32 per process x N processes x 1 accumulation; auto_lr scales lr by sqrt(32 N / 256), so N = 8 keeps 1e-4.
# Hardware: one CUDA GPU per process; fp16 as in the original (bf16 is safer where the GPU has it).
data_root = "/data/data"
data = dict(
    type="InternalData",
    root="images",
    image_list_json=["data_info.json"],
    transform="default_train",
    load_vae_feat=True,
)
image_size = 256  # the generated picture side in px; latents have 1/8 of it
train_batch_size = 32
eval_batch_size = 16
use_fsdp = False
valid_num = 0  # buckets with fewer samples are left out

# model
model = "PixArt_XL_2"
aspect_ratio_type = None  # bucket table, e.g. "ASPECT_RATIO_1024"
multi_scale = False
lewei_scale = 1.0  # position-embedding scale

# training
num_workers = 4
train_sampling_steps = 1000
eval_sampling_steps = 250
model_max_length = 120
lora_rank = 4

num_epochs = 80
gradient_accumulation_steps = 1
grad_checkpointing = False
gradient_clip = 1.0
gc_step = 1
auto_lr = dict(rule="sqrt")

optimizer = dict(type="AdamW", lr=1e-4, weight_decay=3e-2, eps=1e-10)
lr_schedule = "constant"
lr_schedule_args = dict(num_warmup_steps=500)

save_image_epochs = 1
save_model_epochs = 1
save_model_steps = 1000000

sample_posterior = True
mixed_precision = "fp16"
scale_factor = 0.18215
ema_rate = 0.9999
tensorboard_mox_interval = 50
log_interval = 50
cfg_scale = 4
mask_type = "null"
num_group_tokens = 0
mask_loss_coef = 0.0
load_mask_index = False

vae_pretrained = "/cache/pretrained_models/sd-vae-ft-ema"
load_from = None
resume_from = dict(checkpoint=None, load_ema=False, resume_optimizer=True, resume_lr_scheduler=True)
snr_loss = False

# work dir
work_dir = "/cache/exps/"
s3_work_dir = None

seed = 43
