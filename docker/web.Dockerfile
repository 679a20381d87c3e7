# The web process and beat: no torch, about 300 MB. Build from the repository's root:
#   docker build --file docker/web.Dockerfile --tag peft-studio-web .
FROM python:3.12-slim-bookworm

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DJANGO_SETTINGS_MODULE=studio.settings \
    STUDIO_DATA_DIR=/data

WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY docker/constraints.txt docker/constraints.txt
COPY workers workers
COPY studio studio
COPY jobs jobs
RUN pip install --no-cache-dir --constraint docker/constraints.txt --editable '.[web,s3]'
COPY manage.py ./
COPY templates templates
COPY static static

# The same number in both images: they share the data volume.
RUN useradd --uid 10001 --create-home studio && install --directory --owner studio --group studio /data
USER studio
VOLUME /data
EXPOSE 8000
CMD ["python", "-m", "studio.serving", "0.0.0.0", "8000"]
