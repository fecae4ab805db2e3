# Purpose: four times the pixels; starts from stage 2. Position scale 2 keeps the coordinates of 128 px, interpolated.
# Data: output/features/emoji-256: python tools/extract_features.py data/emoji --out output/features/emoji-256
# Batch: 256 per process x 1 process x 1 accumulation; 2,000 steps.
# Hardware: one CUDA GPU with bf16 and a compiler for torch.compile.
_base_ = ["miniature_base.py"]
image_size = 256
lewei_scale = 2.0
load_from = "output/miniature/stage2/checkpoints/checkpoint-2000"
max_steps = 2000
work_dir = "output/miniature/stage3"
