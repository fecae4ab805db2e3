# Purpose: what the five stages of the paper's recipe share; see docs/recipe.md. Steps, batches and rates are those of
#          the paper (arXiv:2310.00426, Sec. 2.2 and its table of stages): AdamW, lr 2e-5 constant, weight decay 0.03.
# Data: in the stages that inherit this file; here that of stage 2.
# Batch: train_batch_size x processes x accumulation; on fewer GPUs raise gradient_accumulation_steps, so that the
#        product stays.
# Hardware: one CUDA GPU per process. bf16 takes the place of the original's fp16; gradient_clip is that of its configs.
data_root = "/data/data"
data = dict(type="SAM", root="SA1B", image_list_txt=[f"part{index}.txt" for index in range(32)])  # of stage 2
num_workers = 10
num_epochs = 1000  # max_steps ends the run
mixed_precision = "bf16"
grad_checkpointing = True
gradient_clip = 0.01
optimizer = dict(type="AdamW", lr=2e-5, weight_decay=3e-2, eps=1e-10)
auto_lr = None  # the rates are written for the batches of the stages
lr_schedule = "constant"
lr_schedule_args = dict(num_warmup_steps=1000)
ema_rate = 0.9999
save_model_epochs = None
save_model_steps = 10000
checkpoints_total_limit = 3
log_interval = 20
seed = 43
