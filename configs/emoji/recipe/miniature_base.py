# Purpose: what the three stages of the miniature recipe share, which are the paper's on the bundled pictures, with the
#          objective and optimiser of emoji_256.py, which learn them in minutes: docs/recipe.md;
#          benchmarks/recipe_stages.py measures what each stage is worth.
# Data: in the stages that inherit this file.
# Batch: 256 per process x 1 process x 1 accumulation = 256 a step.
# Hardware: one CUDA GPU with bf16 and a compiler for torch.compile.
_base_ = ["../emoji_base.py"]
process = dict(timestep_sampling="logit_normal")
num_workers = 4
train_batch_size = 256
num_epochs = 100000  # max_steps ends the run
mixed_precision = "bf16"
compile = True
optimizer = dict(type="Muon", lr=2e-3, weight_decay=0.01, eps=1e-8, betas=(0.9, 0.99))
lr_schedule = "cosine"
lr_schedule_args = dict(num_warmup_steps=100)
ema_rate = 0.99
log_interval = 20
save_model_steps = 1000
validation = dict(every_steps=500, at_start=False)
