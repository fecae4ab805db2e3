# Purpose: what the emoji configs share; inherited by emoji_256.py (training) and emoji_demo.py (a minute on a CPU).
# Data: Arrow feature store output/features/emoji-256, made by
#       python tools/extract_features.py data/emoji --out output/features/emoji-256
# Batch and hardware: in the configs that inherit this one.
data_root = "."
data = dict(type="Store", root="output/features/emoji-256", split="train", balance_by="concept")
image_size = 256

# model: 10 blocks of width 256; captions come from the bundled T5 of width 256
model = "PixArt_Ti_2"
caption_channels = 256
class_dropout_prob = 0.1
null_caption = "t5_empty"  # guides correctly in stock diffusers pipelines too
pipeline_load_from = "output/pretrained_models/emoji-256"  # tokenizer, T5 and VAE of the validation pictures
scale_factor = 0.2276993837771202  # scaling_factor in <pipeline_load_from>/vae/config.json

process = dict(
    noise_schedule="linear",
    # Velocities, weighed evenly: noise prediction learns high noise, where it is decided what is drawn, last of all.
    prediction_type="v_prediction",  # fine-tuning follows this line
)
gradient_clip = 1.0
auto_lr = None  # the learning rates are written for the batches of these configs
save_model_epochs = None  # by steps
checkpoints_total_limit = 2
seed = 43

validation = dict(
    split="heldout",
    num_samples=64,
    prompts=[
        "red apple",
        "slice of pizza",
        "dog face",
        "police car",
        "rocket",
        "sunflower",
        "crown",
        "soccer ball",
        "smiling face with sunglasses",
        "thumbs up: medium-dark skin tone",
        "waving hand: light skin tone",
        "woman firefighter: medium skin tone",
    ],
    num_inference_steps=20,
    guidance_scale=3.0,
    seed=0,
)
