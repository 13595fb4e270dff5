# SPDX-License-Identifier: MIT OR Apache-2.0
# docker build -t embedding-server .
# The options, each set with --build-arg NAME=VALUE:

# Any image with Python 3.11 or newer, its venv module, and glibc, which the wheels need.
ARG BASE=docker.io/library/python:3.13-slim

# ------------------------------------------------------------------- the server, in /opt/venv
FROM ${BASE} AS server
# Extras as pip takes them: "[torch]" for GPUs, "[otlp]", "[otlp,hypercorn]".
ARG EXTRAS=""
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE-MIT LICENSE-APACHE ./
COPY src src
# pip is in a separate environment, which is not shipped. It compiles the packages, as a read-only
# file system can't store bytecode at start. The packages' own tests are 37 of 267 MB.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --without-pip /opt/venv \
    && python3 -m venv /pip \
    && /pip/bin/pip --python /opt/venv install --constraint constraints.txt ".${EXTRAS}" \
    && find /opt/venv -type d \( -name tests -o -path "*/onnx/backend/test" \) -prune -exec rm -r {} +

# --------------------------------------------------------------------- the models, in /models
FROM server AS models
# Names as `embedding-server models pull` takes them, separated by spaces; empty for no models.
ARG MODELS="all-MiniLM-L6-v2"
# The hub, or a mirror of it.
ARG HF_ENDPOINT=https://huggingface.co
# Models in the checkout's folder models/ are copied from there, the others come from the hub. The
# token for gated models is a secret: --secret id=HF_TOKEN,env=HF_TOKEN.
# `serve` serves the models of the image by default, so their names are in its configuration.
RUN --mount=type=bind,target=/context --mount=type=secret,id=HF_TOKEN \
    mkdir -p /out/models /out/etc /cache && : > /out/etc/embedding-server.toml \
    && if [ -n "${MODELS}" ]; then \
        if [ -d /context/models ]; then local=/context/models; else local=/out/models; fi; \
        if [ -f /run/secrets/HF_TOKEN ]; then export HF_TOKEN="$(cat /run/secrets/HF_TOKEN)"; fi; \
        /opt/venv/bin/embedding-server models pull ${MODELS} \
            --load-models-from "$local" --to /out/models \
        && echo "model = \"$(echo ${MODELS} | tr ' ' ',')\"" > /out/etc/embedding-server.toml; \
    fi

# ----------------------------------------------------------------------------- the shipped image
FROM ${BASE}
ARG SOURCE=unknown
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="embedding-server" \
      org.opencontainers.image.description="Sentence embeddings over HTTP" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=models /out /
# Requested models that aren't in /models are downloaded to /cache, which the user below must own.
COPY --from=models --chown=65532:65532 /cache /cache
COPY --from=server /opt/venv /opt/venv
# /dev/shm is writable under --read-only, too; --workers stores its counters there.
ENV PATH=/opt/venv/bin:${PATH} \
    EMBEDDING_SERVER_CONFIG=/etc/embedding-server.toml \
    EMBEDDING_SERVER_HOST=0.0.0.0 \
    EMBEDDING_SERVER_LOAD_MODELS_FROM=/models \
    HF_HOME=/cache \
    TMPDIR=/dev/shm
# By number, so that Kubernetes can see that it isn't root.
USER 65532:65532
EXPOSE 5000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s CMD ["embedding-server", "health"]
ENTRYPOINT ["embedding-server"]
CMD ["serve"]
