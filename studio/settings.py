"""Django settings. Every environment variable is read in the block at the top, with its unit and default."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import dj_database_url
from csp.constants import NONE, SELF

from studio.beside import kept_secret_key, running_servers

ROOT = Path(__file__).resolve().parent.parent


def _flag(name: str, default: bool) -> bool:
    return os.environ.get(name, str(default)).lower() in {"1", "true", "yes", "on"}


# Folder for uploads, base models, job folders, adapters and, when embedded, the servers' own files.
DATA_DIR = Path(os.environ.get("STUDIO_DATA_DIR", ROOT / ".data")).resolve()
# Real servers. Empty: `manage.py up` starts embedded ones and sets both for its children; other commands find them.
DATABASE_URL = os.environ.get("DATABASE_URL") or running_servers(DATA_DIR).get("DATABASE_URL", "")
REDIS_URL = os.environ.get("REDIS_URL") or running_servers(DATA_DIR).get("REDIS_URL", "")
# At least 50 random characters. `manage.py up` makes one and keeps it in the data folder.
SECRET_KEY = os.environ.get("STUDIO_SECRET_KEY") or kept_secret_key(DATA_DIR)
# Host names that the site answers to, separated by commas.
ALLOWED_HOSTS = os.environ.get("STUDIO_ALLOWED_HOSTS", "localhost,127.0.0.1,[::1]").split(",")
# Address and port that `manage.py up` listens on. No port: 8000, or a free one when that is taken.
HOST = os.environ.get("STUDIO_HOST", "127.0.0.1")
PORT = int(os.environ["STUDIO_PORT"]) if os.environ.get("STUDIO_PORT") else None
# Address on which the embedded servers listen beside their sockets, with passwords, so that other machines reach them;
# empty: sockets only. Their traffic is not encrypted: name an address of a network that you trust.
SERVERS_HOST = os.environ.get("STUDIO_SERVERS_HOST", "")
# Ports of the embedded PostgreSQL and Valkey on that address; 0: a free one, kept from then on.
SERVERS_POSTGRES_PORT = int(os.environ.get("STUDIO_SERVERS_POSTGRES_PORT", 0))
SERVERS_REDIS_PORT = int(os.environ.get("STUDIO_SERVERS_REDIS_PORT", 0))
# S3-compatible storage that all machines share; without a bucket, files lie in the data folder alone.
S3_ENDPOINT = os.environ.get("STUDIO_S3_ENDPOINT", "")
S3_BUCKET = os.environ.get("STUDIO_S3_BUCKET", "")
# Put before every key, so that a bucket can be shared with something else.
S3_PREFIX = os.environ.get("STUDIO_S3_PREFIX", "")
S3_REGION = os.environ.get("STUDIO_S3_REGION", "us-east-1")
S3_KEY_ID = os.environ.get("STUDIO_S3_KEY_ID", "")
S3_SECRET = os.environ.get("STUDIO_S3_SECRET", "")
# True behind HTTPS: secure cookies, HSTS and a redirect.
HTTPS = _flag("STUDIO_HTTPS", False)
# True behind one reverse proxy: its X-Forwarded-Proto and the last address of X-Forwarded-For are believed.
BEHIND_PROXY = _flag("STUDIO_BEHIND_PROXY", False)
DEBUG = _flag("STUDIO_DEBUG", False)
# Largest accepted upload, in bytes.
MAX_UPLOAD_BYTES = int(os.environ.get("STUDIO_MAX_UPLOAD_BYTES", 5 * 1024**3))
# Seconds without a byte after which the sender of an upload counts as gone. Tests shorten it.
UPLOAD_SILENT_SECONDS = float(os.environ.get("STUDIO_UPLOAD_SILENT_SECONDS", 20))
# Seconds a claim holds a job without renewal; heartbeat and reaper follow from it. Tests shorten it.
LEASE_SECONDS = float(os.environ.get("STUDIO_LEASE_SECONDS", 60))
# Seconds between an idle worker's own looks at the queue, for when a wake-up message is lost.
POLL_SECONDS = float(os.environ.get("STUDIO_POLL_SECONDS", 15))
# Attempts at a job before it is given up.
MAX_ATTEMPTS = int(os.environ.get("STUDIO_MAX_ATTEMPTS", 5))
# Seconds without a training step after which a trainer counts as stalled.
STALL_SECONDS = float(os.environ.get("STUDIO_STALL_SECONDS", 900))
# STUDIO_FAILPOINTS and STUDIO_FAILPOINTS_ONCE are for tests only; every process reads them itself, and so does a
# trainer, which knows no Django (workers/failpoints.py).
# Seconds that a trainer stays after a job, with the base model in memory, for the team's next one; 0: none stays.
WARM_SECONDS = float(os.environ.get("STUDIO_WARM_SECONDS", 600))
# Folders (separated by colons) below which an admin may register base models.
BASE_MODEL_ROOTS = [Path(p) for p in os.environ.get("STUDIO_BASE_MODEL_ROOTS", "").split(":") if p]
# Folder with task files of lm-evaluation-harness (what its --include_path takes) and their data, on this machine and on
# every worker; empty: no suites of standard tasks.
TASKS_FOLDER = Path(os.environ["STUDIO_TASKS_FOLDER"]).resolve() if os.environ.get("STUDIO_TASKS_FOLDER") else None
# True lets tasks run the Python functions that their files name: they run with the rights of a worker.
TASKS_MAY_RUN_CODE = _flag("STUDIO_TASKS_MAY_RUN_CODE", False)
# Folders (separated by colons) below which an admin may make datasets of files, where web and workers see them.
DATASET_ROOTS = [Path(p) for p in os.environ.get("STUDIO_DATASET_ROOTS", "").split(":") if p]
# The studio's address as people reach it, for links in mails.
PUBLIC_URL = os.environ.get("STUDIO_PUBLIC_URL", f"http://{HOST}:{PORT or 8000}").rstrip("/")
# The mail server. Without a host no mail is sent.
EMAIL_HOST = os.environ.get("STUDIO_SMTP_HOST", "")
EMAIL_PORT = int(os.environ.get("STUDIO_SMTP_PORT", 587))
EMAIL_HOST_USER = os.environ.get("STUDIO_SMTP_USER", "")
EMAIL_HOST_PASSWORD = os.environ.get("STUDIO_SMTP_PASSWORD", "")
# "starttls", "tls" from the first byte, or "none".
_smtp_security = os.environ.get("STUDIO_SMTP_SECURITY", "starttls").lower()
EMAIL_USE_TLS, EMAIL_USE_SSL = _smtp_security == "starttls", _smtp_security == "tls"
MAIL_FROM = os.environ.get("STUDIO_MAIL_FROM", "PEFT Studio <studio@localhost>")
# Days that messages to webhooks and people are kept once they were delivered or given up; 0: for ever.
DELIVERY_DAYS = int(os.environ.get("STUDIO_DELIVERY_DAYS", 30))
# True lets webhooks go to private addresses and over plain http.
WEBHOOK_PRIVATE_NETWORKS = _flag("STUDIO_WEBHOOK_PRIVATE_NETWORKS", False)
# CPU threads for one trainer; 0: all cores, shared between the trainers of this machine.
TRAINER_THREADS = int(os.environ.get("STUDIO_TRAINER_THREADS", 0))

# The link that `manage.py up` prints works whatever STUDIO_ALLOWED_HOSTS says.
_printed = "localhost" if HOST in {"0.0.0.0", "::"} else f"[{HOST}]" if ":" in HOST else HOST  # noqa: S104  compared
if _printed not in ALLOWED_HOSTS:
    ALLOWED_HOSTS.append(_printed)

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "studio.apps.StudioStaticFilesConfig",
    "django.contrib.humanize",
    "django.contrib.postgres",
    "django_htmx",
    "csp",
    "studio.apps.StudioConfig",
    "studio.accounts",
    "studio.datasets",
    "studio.webhooks",
    "studio.catalogue",
    "studio.reviews",
    "jobs",
]

# From where on a finding counts against an adapter: asked by the catalogue, which knows nothing of reviews.
THRESHOLDS_OF_TEAM = "studio.reviews.policies.thresholds_of"

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "csp.middleware.CSPMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "studio.health.HostMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "studio.accounts.middleware.TeamMiddleware",
    "studio.errors.NotAllowedMiddleware",
]

ROOT_URLCONF = "studio.urls"
# Each app's part of /api/v1/, named as a string: the API's shared half lies below the apps.
API_ROUTERS = [
    "studio.api.me.router",
    "studio.datasets.api.router",
    "studio.datasets.upload_api.router",
    "studio.datasets.adding_api.router",
    "studio.datasets.learning_api.router",
    "studio.datasets.row_api.router",
    "studio.datasets.scan_api.router",
    "studio.datasets.split_api.router",
    "studio.catalogue.api.router",
    "studio.catalogue.naming_api.router",
    "studio.catalogue.views_api.router",
    "studio.catalogue.suite_api.router",
    "studio.reviews.api.router",
    "studio.reviews.scan_api.router",
    "studio.webhooks.api.router",
    "jobs.api.router",
    "jobs.base_needs.router",
    "jobs.machine_api.router",
    "jobs.quotas.router",
]
ASGI_APPLICATION = "studio.asgi.application"
# Calls whose response or body lasts ("METHOD path"), and the ASGI application of each: strings like the routers.
_UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
ASGI_STREAMS = {
    rf"GET /jobs/{_UUID}/events/": "jobs.streams.application",
    rf"(PATCH|POST) /(datasets|api/v1)/uploads/{_UUID}/": "studio.datasets.tus_stream.application",
}

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [ROOT / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "studio.accounts.context.shell",
            ],
            "builtins": ["studio.templatetags.text"],
        },
    },
]

# Without a URL no query can run; `manage.py up` and the tests set one before Django starts.
_database = dj_database_url.parse(DATABASE_URL or "postgres://unset@localhost/unset")
# What the URL asks for (sslmode and its certificates, for example) stands; of two times, the server takes the last.
_asked: dict[str, Any] = {**_database.get("OPTIONS", {})}
# A server that vanished without a word is noticed in half a minute, not in the system's two hours. TCP only.
_alive = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 25000}
_times = "-c statement_timeout=15000 -c idle_in_transaction_session_timeout=30000"
DATABASES = {
    "default": {
        **_database,
        "CONN_HEALTH_CHECKS": True,
        "OPTIONS": {**_alive, **_asked, "options": f"{_times} {_asked.get('options', '')}".strip()},
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# Celery carries wake-ups only; no job's fate depends on a message (jobs/celery.py).
CELERY_BROKER_URL = REDIS_URL.replace("unix://", "redis+socket://", 1)

AUTH_USER_MODEL = "accounts.User"
LOGIN_URL = "accounts:login"
LOGIN_REDIRECT_URL = "home"
LOGOUT_REDIRECT_URL = "accounts:login"
PASSWORD_HASHERS = [
    "django.contrib.auth.hashers.Argon2PasswordHasher",
    "django.contrib.auth.hashers.PBKDF2PasswordHasher",
]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.UserAttributeSimilarityValidator"},
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator", "OPTIONS": {"min_length": 10}},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]
SESSION_COOKIE_AGE = 7 * 24 * 3600
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
SESSION_COOKIE_SECURE = HTTPS
CSRF_COOKIE_SECURE = HTTPS
CSRF_FAILURE_VIEW = "studio.accounts.views.csrf_failure"
SECURE_SSL_REDIRECT = HTTPS
# Probes ask the process itself, behind whatever ends HTTPS.
SECURE_REDIRECT_EXEMPT = [r"^livez$", r"^readyz$"]
SECURE_HSTS_SECONDS = 365 * 24 * 3600 if HTTPS else 0
SECURE_HSTS_INCLUDE_SUBDOMAINS = HTTPS
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if BEHIND_PROXY else None
X_FRAME_OPTIONS = "DENY"
# Whether a domain goes onto the browsers' preload list is its owner's decision, not ours.
SILENCED_SYSTEM_CHECKS = ["security.W021"]
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": [SELF],
        "img-src": [SELF, "data:"],
        "object-src": [NONE],
        "base-uri": [NONE],
        "frame-ancestors": [NONE],
        "form-action": [SELF],
    }
}
# A request's body waits here until a view takes it: on the disk that the upload goes to, not in a small /tmp.
FILE_UPLOAD_TEMP_DIR = DATA_DIR / "spool"
DATA_UPLOAD_MAX_MEMORY_SIZE = 2 * 1024**2
DATA_UPLOAD_MAX_NUMBER_FIELDS = 500

STATIC_URL = "static/"
STATICFILES_DIRS = [ROOT / "static"]
STATIC_ROOT = DATA_DIR / "static"
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage", "OPTIONS": {"location": DATA_DIR}},
    "staticfiles": {"BACKEND": "whitenoise.storage.CompressedManifestStaticFilesStorage"},
}

USE_TZ = True
TIME_ZONE = os.environ.get("STUDIO_TIME_ZONE", "UTC")
LANGUAGE_CODE = "en"
USE_I18N = False

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "line": {
            "()": "studio.hidden_characters.LineFormatter",
            "format": "%(asctime)s %(levelname)s %(name)s: %(message)s",
        }
    },
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["console"], "level": "INFO"},
}
