# Purpose: DreamBooth by an adapter: teach the 1024 px model one subject with a file of some MB; see --load-from.
# Data: as PixArt_xl2_img1024_dreambooth.py.
# Batch: as there.
# Hardware: one CUDA GPU per process; the frozen weights are kept in bf16.
_base_ = ["PixArt_xl2_img1024_dreambooth.py"]
lora = dict(rank=16, alpha=16.0)
optimizer = dict(type="AdamW", lr=1e-4, weight_decay=1e-2, eps=1e-8)
gradient_clip = 1.0
ema_rate = None
work_dir = "output/dreambooth_lora"
