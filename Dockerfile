# behrt and all it needs, for one GPU or many, on one pod or many; docs/pods.md says how it is run.
#
#   docker build -t behrt .
#   docker run --gpus all --volume behrt:/workspace behrt train
#
# The base is PyTorch's own image of the torch in constraints.txt; that torch is used, and not installed again. CUDA 12.6
# runs on the drivers of most rented pods; for Blackwell: --build-arg BASE_IMAGE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
# Any Debian or Ubuntu with Python 3.11 or newer will do. On one without torch, pip installs it, for the CPU by
#   --build-arg BASE_IMAGE=python:3.11-slim-bookworm --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
#
# A mirror or a certificate that the build needs comes as a secret, of which nothing stays: --secret id=pip,src=pip.conf
# and --secret id=ca,src=ca.crt, which that pip.conf names as `cert = /run/secrets/ca`.
ARG BASE_IMAGE=pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime

FROM ${BASE_IMAGE} AS base
# hadolint ignore=DL3002,DL3066
USER root
# hadolint ignore=DL3008
RUN if ! command -v python3 >/dev/null; then \
        apt-get update && apt-get install --yes --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*; \
    fi \
    && python3 -c 'import sys; sys.exit("BASE_IMAGE: behrt needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'


FROM base AS builder
# hadolint ignore=DL3008
RUN if ! python3 -m pip --version >/dev/null; then \
        apt-get update && apt-get install --yes --no-install-recommends python3-pip && rm -rf /var/lib/apt/lists/*; \
    fi
WORKDIR /build
# What the base has installed is seen in here, and what constraints.txt pins otherwise is laid over it. Where the base's
# Python is itself of a virtual environment, that is what it has.
RUN python3 -m venv --without-pip --system-site-packages /opt/behrt \
    && python3 -c 'import site, sys; sys.prefix == sys.base_prefix or print(*site.getsitepackages(), sep="\n")' \
        > "$(/opt/behrt/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"

# The pins hold for what builds the package, too.
ENV PIP_CONSTRAINT=/build/constraints.txt \
    PIP_BUILD_CONSTRAINT=/build/constraints.txt \
    PIP_CONFIG_FILE=/run/secrets/pip \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
ARG TORCH_INDEX=""
COPY constraints.txt setup.cfg ./
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    python3 -c 'import configparser; parts = configparser.ConfigParser(); parts.read("setup.cfg"); print(parts["options"]["install_requires"], parts["options.extras_require"]["server"])' \
        > requirements.txt \
    && python3 -m pip --python /opt/behrt/bin/python install ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} --requirement requirements.txt

COPY pyproject.toml README.md LICENSE ./
COPY behrt behrt
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    python3 -m pip --python /opt/behrt/bin/python install --no-deps .


FROM base
COPY --from=builder /opt/behrt /opt/behrt
# With a home and a name that hold for any user id, as of `docker run --user`.
# torchrun, which may be the base's, starts PYTHON_EXEC.
ENV PATH=/opt/behrt/bin:${PATH} \
    PYTHON_EXEC=/opt/behrt/bin/python \
    HOME=/tmp \
    USER=behrt
WORKDIR /workspace
COPY experiments experiments
COPY sweeps sweeps
# The user has a number, by which Kubernetes knows that it is not root. Where volumes are root's alone: USER_ID=0.
ARG USER_ID=1000
RUN mkdir -p data mlruns && chown -R "${USER_ID}:${USER_ID}" /workspace && behrt --version && python -c 'import mlflow, torch'
USER ${USER_ID}:${USER_ID}
# Whether a run could keep what it trains, and behrt starts.
HEALTHCHECK --interval=60s --timeout=30s --start-period=30s \
    CMD ["sh", "-c", "test -w data && test -w experiments && test -w sweeps && test -w mlruns && behrt --version"]
# Without a shell between: SIGTERM reaches the training, which keeps a checkpoint.
ENTRYPOINT ["behrt"]
CMD ["--help"]
ARG REVISION=""
ENV BEHRT_REVISION=${REVISION}
LABEL org.opencontainers.image.title="behrt" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
