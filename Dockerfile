# The page that draws, on port 12345. CUDA comes with torch's wheel, so a plain Python base is enough; the host needs the
# NVIDIA driver and its container toolkit. `--build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu` makes a small
# image without CUDA.
#
#   docker build -t pixart .
#   docker run --gpus all -p 12345:12345 -v $HOME/.cache/huggingface:/root/.cache/huggingface pixart
FROM python:3.11-slim-bookworm

ARG TORCH_INDEX=https://pypi.org/simple
ARG USER_ID=1000

# APP_CONTEXT: 1024, 512, LCM or CONTROLNET. DEMO_FETCH=auto: with a card the official model comes from the hub at the
# first start, where the mount or output/pretrained_models lacks it. HF_HOME is that mount, for the user below too.
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/root/.cache/huggingface \
    GRADIO_TEMP_DIR=/tmp/gradio \
    GRADIO_ANALYTICS_ENABLED=False \
    DEMO_HOST=0.0.0.0 \
    DEMO_PORT=12345 \
    DEMO_FETCH=auto \
    APP_CONTEXT=1024

# The home of root may be entered, not listed: the cache in it belongs to the user, at the path that the README mounts.
RUN useradd --create-home --uid ${USER_ID} pixart \
    && mkdir -p /root/.cache/huggingface /workspace/output/online_demo_img \
    && chmod 711 /root /root/.cache \
    && chown -R pixart /root/.cache/huggingface /workspace

WORKDIR /workspace

# Dependencies first: a change of code does not install them again.
COPY pyproject.toml requirements.txt LICENSE README.md ./
COPY diffusion ./diffusion
RUN pip install --no-cache-dir --extra-index-url ${TORCH_INDEX} -e ".[app]"

COPY --chown=pixart app ./app
COPY --chown=pixart scripts ./scripts
COPY --chown=pixart tools ./tools
COPY --chown=pixart configs ./configs
COPY --chown=pixart asset ./asset
COPY --chown=pixart output/pretrained_models/emoji-256 ./output/pretrained_models/emoji-256
COPY --chown=pixart output/pretrained_models/emoji-256-lcm-lora ./output/pretrained_models/emoji-256-lcm-lora

USER ${USER_ID}
EXPOSE 12345
VOLUME ["/root/.cache/huggingface", "/workspace/output/online_demo_img"]

# The first start loads, and with a network downloads, the model.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['DEMO_PORT'] + '/healthz', timeout=4)"]

# Exec form: SIGTERM of `docker stop` reaches Python. app.py reads APP_CONTEXT.
ENTRYPOINT ["python", "app/app.py"]
