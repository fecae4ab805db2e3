# Purpose: text-image alignment at 256 px, starting from the DiT of stage 1: its adaLN becomes adaLN-single, so that at
#          t = 500 the first prediction is the DiT's (Sec. 2.3). load_from may be the public DiT-XL-2-256x256.pt too.
# Data: SAM layout under /data/data/SA1B with LLaVA captions and T5 features: partition/part0.txt .. part31.txt.
# Batch: 178 per process x 64 processes x 1 accumulation = 11,392 a step; 150,000 steps.
# Hardware: 64 GPUs.
_base_ = ["recipe_base.py"]
image_size = 256
model = "PixArt_XL_2"
load_from = "output/recipe/stage1/checkpoints/checkpoint-300000"
train_batch_size = 178
max_steps = 150000
work_dir = "output/recipe/stage2"
