# Purpose: pixel dependency: a class-conditional DiT-XL/2 learns what pictures look like (PixArt-alpha, Sec. 2.2).
#          As in the paper, the public DiT-XL-2-256x256.pt can take its place: name it as load_from of stage 2.
# Data: Store of ImageNet at 256 px whose rows have the attribute class_id (0..999).
# Batch: 128 per process x 8 processes x 1 accumulation = 1024 a step; 300,000 steps.
# Hardware: 8 GPUs.
_base_ = ["recipe_base.py"]
data = dict(_delete_=True, type="Store", root="features/imagenet-256", class_by="class_id")
image_size = 256
model = "DiT_XL_2"
num_classes = 1000
train_batch_size = 128
max_steps = 300000
validation = dict(num_samples=0)
work_dir = "output/recipe/stage1"
