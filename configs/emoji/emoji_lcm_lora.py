# Purpose: distil the bundled model into a LoRA (LCM-LoRA): 1 to 8 steps without guidance, the base stays as it is.
# Data: output/features/emoji-256, as emoji_256.py.
# Batch: 256 per process x 1 process x 1 accumulation = 256 a step, which costs what one of emoji_lcm.py does.
# Hardware: one CUDA GPU; on a CPU train_batch_size=4 max_steps=20 mixed_precision=no num_workers=0.
_base_ = ["emoji_lcm.py"]
optimizer = dict(type="AdamW", lr=1e-4, weight_decay=0.0, eps=1e-8, betas=(0.9, 0.99))
lora_rank = 32
work_dir = "output/lcm-lora"
