# Two images: --target cpu (default engine ONNX Runtime, OpenVINO beside it) and --target cuda.
#
#   docker build --target cpu -t glioma-nas:cpu .
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" glioma-nas:cpu run my_cohort.yaml --out runs/mine
#   docker build --target cuda -t glioma-nas:cuda .
#   docker run --rm --gpus all --shm-size 2g -v "$PWD:/work" glioma-nas:cuda run my_cohort.yaml --set device=cuda
#
# No scan is copied into an image (.dockerignore), and nothing is downloaded when it runs.

FROM python:3.12-slim-bookworm AS wheel
WORKDIR /source
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.12-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 MPLCONFIGDIR=/tmp/matplotlib HOME=/tmp
RUN useradd --uid 1000 --create-home researcher && mkdir /work && chown researcher /work
COPY constraints.txt /constraints.txt
COPY --from=wheel /wheel /wheel
WORKDIR /work

FROM base AS cuda
# PyPI's torch brings CUDA's libraries along; the driver comes from the host's NVIDIA container toolkit.
RUN python -m pip install --constraint /constraints.txt "$(ls /wheel/*.whl)[skull-strip,dicom-seg,tensorrt-rtx,bundle]" \
    && python -m pip check
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER researcher
ENTRYPOINT ["glioma-nas"]
CMD ["--help"]

FROM base AS cpu
# Both from one index: torch of the CPU index beside torchvision of PyPI cannot be imported together with NNI.
RUN python -m pip install --index-url https://download.pytorch.org/whl/cpu torch==2.11.0 torchvision==0.26.0 \
    && python -m pip install --constraint /constraints.txt "$(ls /wheel/*.whl)[openvino,skull-strip,dicom-seg,bundle]" \
    && python -m pip check
USER researcher
ENTRYPOINT ["glioma-nas"]
CMD ["--help"]
