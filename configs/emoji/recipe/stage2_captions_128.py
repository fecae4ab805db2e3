# Purpose: captions take the place of classes, at 128 px; starts from the DiT of stage 1.
# Data: output/features/emoji-128, as stage 1.
# Batch: 256 per process x 1 process x 1 accumulation; 2,000 steps.
# Hardware: one CUDA GPU with bf16 and a compiler for torch.compile.
_base_ = ["miniature_base.py"]
data = dict(root="output/features/emoji-128")
image_size = 128
load_from = "output/miniature/stage1/checkpoints/checkpoint-1000"
max_steps = 2000
work_dir = "output/miniature/stage2"
