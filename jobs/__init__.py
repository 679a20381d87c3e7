"""What has been asked for and how it is going: the job queue."""

from jobs.celery import app as celery_app

__all__ = ["celery_app"]
