"""The product's settings, and trainers that fake their work. Only a process of the tests names this module."""

from __future__ import annotations

from studio.settings import *  # noqa: F403
from studio.settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.faults.apps.FakeTrainersConfig"]
