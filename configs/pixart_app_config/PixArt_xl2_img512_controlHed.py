# Purpose: ControlNet-Transformer on HED edges at 512 px; give the base weights with --load-from.
# Data: InternalDataHed layout under /data/data/InternData: features and hed_feature_512, a tenth of the list is used.
# Batch: 12 per process x N processes x 4 accumulation = 384 a step on 8; auto_lr scales lr by sqrt(batch / 256).
# Hardware: one CUDA GPU per process; the batch is the original's, lower train_batch_size if memory does not suffice.
_base_ = ["../PixArt_xl2_internal.py"]
data_root = "/data/data"
data = dict(
    type="InternalDataHed",
    root="InternData",
    image_list_json=["data_info.json"],
    transform="default_train",
    load_vae_feat=True,
)
image_size = 512

# model
model = "PixArt_XL_2"
vae_pretrained = "output/pretrained_models/sd-vae-ft-ema"
lewei_scale = 1.0

# training
num_workers = 10
train_batch_size = 12
num_epochs = 1000
gradient_accumulation_steps = 4
grad_checkpointing = True
gradient_clip = 0.01
optimizer = dict(type="AdamW", lr=2e-5, weight_decay=3e-2, eps=1e-10)
lr_schedule_args = dict(num_warmup_steps=0)
eval_sampling_steps = 200
log_interval = 20
save_model_epochs = 5
save_model_steps = 1000
work_dir = "output_debug/debug"

# ControlNet
copy_blocks_num = 13
class_dropout_prob = 0.5
train_ratio = 0.1
