# Purpose: aesthetic quality at 256 px, from the aligned model of stage 2.
# Data: InternalData layout under /data/data/InternData (partition/data_info.json), square features of 256 px.
# Batch: 178 per process x 64 processes x 1 accumulation = 11,392 a step; 90,000 steps.
# Hardware: 64 GPUs.
_base_ = ["recipe_base.py"]
data = dict(_delete_=True, type="InternalData", root="InternData", image_list_json=["data_info.json"])
image_size = 256
model = "PixArt_XL_2"
load_from = "output/recipe/stage2/checkpoints/checkpoint-150000"
train_batch_size = 178
max_steps = 90000
work_dir = "output/recipe/stage3"
