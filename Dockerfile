# Training and detection on an NVIDIA GPU.
#
#   docker build --tag rcnn .                     for GPUs
#   docker build --tag rcnn:cpu --target cpu .    without one, several GB smaller
#
# Two stages for each: the first makes an environment with the package's wheel, the second has that environment and
# nothing that built it. NVRTC comes from PyPI with the extra cuda12 and compiles the kernels at first use, so no image
# has a CUDA toolkit. The driver comes from the host.

ARG PYTHON=3.12.11
ARG DEBIAN=bookworm
ARG CUDA=12.9.1

# ---- the wheel, and an environment for each machine ----------------------------------------------------------------

FROM python:${PYTHON}-slim-${DEBIAN} AS wheel
WORKDIR /source
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY rcnn rcnn
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM wheel AS cpu-environment
COPY .ci/constraints.txt /constraints.txt
RUN python -m venv /opt/rcnn && \
    /opt/rcnn/bin/pip install --no-cache-dir --constraint /constraints.txt \
        --index-url https://download.pytorch.org/whl/cpu torch && \
    /opt/rcnn/bin/pip install --no-cache-dir --constraint /constraints.txt \
        "$(echo /wheels/rcnn-*.whl)[plots]" tensorboard notebook

FROM nvidia/cuda:${CUDA}-base-ubuntu24.04 AS gpu-environment
RUN apt-get update && \
    apt-get install --yes --no-install-recommends python3 python3-venv && \
    rm -rf /var/lib/apt/lists/*
COPY .ci/constraints.txt /constraints.txt
COPY --from=wheel /wheels /wheels
RUN python3 -m venv /opt/rcnn && \
    /opt/rcnn/bin/pip install --no-cache-dir --constraint /constraints.txt \
        "$(echo /wheels/rcnn-*.whl)[cuda12,plots]" tensorboard notebook

# ---- what runs -----------------------------------------------------------------------------------------------------

FROM python:${PYTHON}-slim-${DEBIAN} AS cpu
RUN useradd --create-home --uid 1000 rcnn && mkdir /data /runs && chown rcnn /data /runs && ln -s /runs /home/rcnn/runs
COPY --from=cpu-environment /opt/rcnn /opt/rcnn
COPY --chown=rcnn notebooks /home/rcnn/notebooks
ENV PATH=/opt/rcnn/bin:$PATH PYTHONUNBUFFERED=1
USER rcnn
WORKDIR /home/rcnn
VOLUME ["/data", "/runs"]
HEALTHCHECK --interval=5m --timeout=60s --start-period=30s CMD ["rcnn", "env"]
CMD ["rcnn", "--help"]

# The base image has the CUDA runtime's libraries and nothing else; torch brings its own.
FROM nvidia/cuda:${CUDA}-base-ubuntu24.04 AS gpu
RUN apt-get update && \
    apt-get install --yes --no-install-recommends python3 && \
    rm -rf /var/lib/apt/lists/* && \
    userdel --remove ubuntu && \
    useradd --create-home --uid 1000 rcnn && mkdir /data /runs && chown rcnn /data /runs && ln -s /runs /home/rcnn/runs
COPY --from=gpu-environment /opt/rcnn /opt/rcnn
COPY --chown=rcnn notebooks /home/rcnn/notebooks
ENV PATH=/opt/rcnn/bin:$PATH PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER rcnn
WORKDIR /home/rcnn
VOLUME ["/data", "/runs"]
HEALTHCHECK --interval=5m --timeout=60s --start-period=30s CMD ["rcnn", "env"]
CMD ["rcnn", "--help"]
