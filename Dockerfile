# A local server for one adapter, and a custom container for Inference Endpoints: the adapter's folder is /repository.
FROM python:3.12-slim-bookworm

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HF_HOME=/cache

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY wan_finetune ./wan_finetune

# The wheels bring CUDA; the host brings the driver. No compiler and no system package is needed.
RUN pip install --constraint constraints.txt ".[serve]" \
    && useradd --create-home --uid 1000 serve \
    && mkdir /cache /repository \
    && chown serve /cache

USER serve
WORKDIR /home/serve
EXPOSE 7861

# 503 until the weights are loaded, which takes minutes.
HEALTHCHECK --interval=30s --timeout=10s --start-period=30m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7861/health', timeout=5)"]

# All interfaces of the container; compose.yaml lets only this machine in.
CMD ["python", "-m", "wan_finetune.serving.server", "--folder", "/repository", "--host", "0.0.0.0", "--port", "7861"]
