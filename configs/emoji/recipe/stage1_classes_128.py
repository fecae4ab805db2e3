# Purpose: pixel dependency at 128 px: a small class-conditional DiT learns the bundled pictures by their concept.
# Data: output/features/emoji-128: python tools/extract_features.py data/emoji --out output/features/emoji-128 \
#       --image-size 128
# Batch: 256 per process x 1 process x 1 accumulation; 1,000 steps.
# Hardware: one CUDA GPU with bf16 and a compiler for torch.compile.
_base_ = ["miniature_base.py"]
data = dict(root="output/features/emoji-128", class_by="concept")
image_size = 128
model = "DiT_Ti_2"
num_classes = 2000
max_steps = 1000
validation = dict(prompts=[])
work_dir = "output/miniature/stage1"
