# Purpose: text-image alignment at 256 px on SA1B with long captions (second stage of PixArt-alpha).
# Data: SAM layout under /data/data/SA1B: partition/part0.txt .. part31.txt.
# Batch: 176 per process x N processes x 1 accumulation = 1408 a step on 8; auto_lr scales lr by sqrt(batch / 256).
# Hardware: one CUDA GPU per process; the batch is the original's, lower train_batch_size if memory does not suffice.
_base_ = ["../PixArt_xl2_sam.py"]
data_root = "/data/data"
data = dict(
    type="SAM",
    root="SA1B",
    image_list_txt=[f"part{index}.txt" for index in range(32)],
    transform="default_train",
    load_vae_feat=True,
)
image_size = 256

# model
model = "PixArt_XL_2"
fp32_attention = True
vae_pretrained = "output/pretrained_models/sd-vae-ft-ema"

# training
num_workers = 10
train_batch_size = 176
num_epochs = 200
gradient_accumulation_steps = 1
grad_checkpointing = True
gradient_clip = 0.01
optimizer = dict(type="AdamW", lr=2e-5, weight_decay=3e-2, eps=1e-10)
lr_schedule_args = dict(num_warmup_steps=1000)
eval_sampling_steps = 200
log_interval = 20
save_model_epochs = 2
save_model_steps = 20000
work_dir = "output/debug"
