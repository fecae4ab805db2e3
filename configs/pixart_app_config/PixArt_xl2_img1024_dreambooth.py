# Purpose: DreamBooth: teach the 1024 px model one subject from a few pictures; give the weights with --load-from.
# Data: a folder of pictures, /data/data/dog6, with one caption for all.
# Batch: 1 per process x N processes x 1 accumulation; lr is not scaled.
# Hardware: one CUDA GPU per process; the batch is the original's, lower train_batch_size if memory does not suffice.
_base_ = ["../PixArt_xl2_internal.py"]
data_root = "/data/data"
data = dict(
    type="DreamBooth", root="dog6", prompt=["a photo of sks dog"], transform="default_train", load_vae_feat=True
)
image_size = 1024

# model
model = "PixArtMS_XL_2"
vae_pretrained = "output/pretrained_models/sd-vae-ft-ema"
lewei_scale = 2.0

# training
num_workers = 1
train_batch_size = 1
num_epochs = 200
gradient_accumulation_steps = 1
grad_checkpointing = True
gradient_clip = 0.01
auto_lr = None
optimizer = dict(type="AdamW", lr=5e-6, weight_decay=3e-2, eps=1e-10)
lr_schedule_args = dict(num_warmup_steps=0)
eval_sampling_steps = 200
log_interval = 1
save_model_epochs = 10000
save_model_steps = 100
work_dir = "output/debug"
