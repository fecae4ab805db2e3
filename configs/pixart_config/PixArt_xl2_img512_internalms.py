# Purpose: train at about 512 px in aspect-ratio buckets, with size and ratio conditions.
# Data: InternalDataMS layout under /data/data/InternData (partition_filter/data_info.json), multi-scale features.
# Batch: 40 per process x N processes x 1 accumulation = 320 a step on 8; auto_lr scales lr by sqrt(batch / 256).
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
image_size = 512

# model
model = "PixArtMS_XL_2"
vae_pretrained = "output/pretrained_models/sd-vae-ft-ema"
aspect_ratio_type = "ASPECT_RATIO_512"
multi_scale = True
lewei_scale = 1.0

# training
num_workers = 10
train_batch_size = 40
num_epochs = 20
gradient_accumulation_steps = 1
grad_checkpointing = True
gradient_clip = 0.01
optimizer = dict(type="AdamW", lr=2e-5, weight_decay=3e-2, eps=1e-10)
lr_schedule_args = dict(num_warmup_steps=1000)
eval_sampling_steps = 200
log_interval = 20
save_model_epochs = 1
save_model_steps = 2000
work_dir = "output/debug"
