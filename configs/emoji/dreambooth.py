# Purpose: DreamBooth with the bundled model: one subject from a few pictures, given with --train_class and --prompt.
# Data: a folder of pictures; with --class_prompt also pictures of the class, drawn by the model before training.
# Batch: 8 per process x 1 process x 1 accumulation = 8 a step; 200 steps.
# Hardware: 2 CPU cores are enough (about 2 s a step); with a GPU take mixed_precision="bf16".
# Expect the subject under its own word; without --class_prompt the class drifts towards it.
_base_ = ["emoji_base.py"]
data = dict(_delete_=True, type="DreamBooth", root="output/subject", prompt=["sks"])
load_from = "output/pretrained_models/emoji-256"
num_workers = 0
train_batch_size = 8
num_epochs = 100000  # max_steps ends the run
max_steps = 200
mixed_precision = "no"
optimizer = dict(type="AdamW", lr=1e-4, weight_decay=0.01, eps=1e-8, betas=(0.9, 0.99))
lr_schedule_args = dict(num_warmup_steps=10)
ema_rate = None
log_interval = 10
save_model_steps = 100
# No prompts: the subject's and, with --class_prompt, the class's are drawn, from several seeds.
validation = dict(prompts=[], every_steps=100, at_start=True, num_samples=0, num_inference_steps=14)
work_dir = "output/dreambooth"
