# Purpose: about 1024 px in aspect-ratio buckets, with size and ratio conditions. Position scale 2: the coordinates of
#          stage 4 are interpolated (Sec. 2.4 after DiffFit). The size embedders are new and begin silent.
# Data: InternalDataMS layout under /data/data/InternData (partition_filter/data_info.json), multi-scale features.
# Batch: 12 per process x 32 processes x 1 accumulation = 384 a step; 16,000 steps.
# Hardware: 32 GPUs.
_base_ = ["recipe_base.py"]
data = dict(_delete_=True, type="InternalDataMS", root="InternData", image_list_json=["data_info.json"])
image_size = 1024
model = "PixArtMS_XL_2"
aspect_ratio_type = "ASPECT_RATIO_1024"
multi_scale = True
lewei_scale = 2.0
load_from = "output/recipe/stage4/checkpoints/checkpoint-100000"
train_batch_size = 12
max_steps = 16000
save_model_steps = 2000
work_dir = "output/recipe/stage5"
