# Purpose: the same at 512 px. Positions are computed for the new grid with scale 1, as the original has it: the grid
#          of the stage before is its corner.
# Data: InternalData layout under /data/data/InternData (partition/data_info.json), square features of 512 px.
# Batch: 40 per process x 64 processes x 1 accumulation = 2,560 a step; 100,000 steps.
# Hardware: 64 GPUs.
_base_ = ["recipe_base.py"]
data = dict(_delete_=True, type="InternalData", root="InternData", image_list_json=["data_info.json"])
image_size = 512
model = "PixArt_XL_2"
lewei_scale = 1.0
load_from = "output/recipe/stage3/checkpoints/checkpoint-90000"
train_batch_size = 40
max_steps = 100000
work_dir = "output/recipe/stage4"
