# Both commands in a container, with the exact versions of constraints.txt.
#
#     docker build --tag teachonce .                                                       # NVIDIA GPUs
#     docker build --tag teachonce --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .      # CPUs
#     docker run --rm --gpus all --shm-size=1g --volume "$PWD:/work" --user "$(id -u):$(id -g)" teachonce \
#         teacher-cache capture mine.yaml
#
# --shm-size: loader workers do not use /dev/shm for data, so Docker's 64 MB suffice for one GPU, or none.  NCCL uses it
# between the GPUs of a machine.  Data, models, caches and runs lie outside, under /work, and in /work/.cache what comes
# from the Hub and from storages; nothing secret goes in: give their credentials at the start (docker run --env-file).
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# Triton builds its launchers with a C compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

# Empty: PyPI's torch, which brings CUDA along.  Another index of PyTorch's: another CUDA, or none.
ARG TORCH_INDEX=
ARG EXTRAS=lora,report,s3,tracking

RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

WORKDIR /opt/teachonce
COPY constraints.txt ./
# Beside PyPI, which has all that torch needs; of equal versions pip takes the one that says +cpu or +cu130.
RUN pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint constraints.txt torch

COPY pyproject.toml README.md LICENSE ./
COPY shared ./shared
COPY stage1_teacher ./stage1_teacher
COPY stage2_student ./stage2_student
COPY teachonce ./teachonce
RUN pip install --constraint constraints.txt ".[$EXTRAS]" && teacher-cache --version && train-student --version

# Any other user will do as well (docker run --user): what has to be written lies under /work and HOME.
RUN useradd --create-home --uid 1000 teachonce && mkdir --parents /work && chmod 1777 /home/teachonce /work
ENV HOME=/home/teachonce
# What is fetched from the Hub and from storages must outlive the container.
ENV XDG_CACHE_HOME=/work/.cache
USER teachonce
WORKDIR /work
CMD ["teacher-cache", "--help"]
