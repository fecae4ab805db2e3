# Purpose: train the emoji model from scratch; the runs behind the bundled one are listed in its training.json.
# Data: output/features/emoji-256, split 'train', every concept drawn equally often.
# Batch: 512 per process x 1 process x 1 accumulation = 512 a step; 4,600 steps = 2.4 million samples.
# Hardware: one CUDA GPU with bf16 and a compiler for torch.compile. On N processes set train_batch_size=512/N.
# Expect on one H100: 6,900 to 9,000 images/s, 6 minutes, training loss 0.057.
_base_ = ["emoji_base.py"]
num_workers = 4
train_batch_size = 512
process = dict(timestep_sampling="logit_normal")  # which learns free words sooner (docs/bundled-model.md)
num_epochs = 100000  # max_steps ends the run
max_steps = 4600
mixed_precision = "bf16"
compile = True
# Captions are short: a mask costs 1 ms less of kernels a step than packing.
kernels = dict(attention="auto", text="mask", bf16_stream=True)
optimizer = dict(type="Muon", lr=3e-3, weight_decay=0.01, eps=1e-8, betas=(0.9, 0.99))
lr_schedule = "cosine"
lr_schedule_args = dict(num_warmup_steps=200)
ema_rate = 0.999
log_interval = 50
save_model_steps = 1000
validation = dict(every_steps=1000, at_start=False)
work_dir = "output/emoji"
