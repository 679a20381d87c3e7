"""The training engine: what runs on the GPU. Imports nothing of `studio` or `jobs`, no Django, no Celery."""
