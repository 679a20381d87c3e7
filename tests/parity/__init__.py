"""Parity with other people's trainers, each in a virtual environment of its own. Slow."""

import pytest

pytest.register_assert_rewrite("tests.parity.jobs")
