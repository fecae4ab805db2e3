# Purpose: distil the bundled model into a LoRA (LCM-LoRA): 1 to 8 steps without guidance, the base stays as it is.
# Data: output/features/emoji-256, as emoji_256.py.
# Batch: 256 per process x 1 process x 1 accumulation = 256 a step, which costs what one of emoji_lcm.py does.
# Hardware: one CUDA GPU; on a CPU train_batch_size=4 max_steps=20 mixed_precision=no num_workers=0.
_base_ = ["emoji_lcm.py"]
max_steps = 150  # the target is the student itself: 300 steps at lr 1e-4 blurred the drawings
lora_rank = 32
save_model_steps = 50
validation = dict(every_steps=50)
work_dir = "output/lcm-lora"
