"""The web process starts in a moment and stays small, because it never imports torch and friends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

SCRIPT = """
import importlib, pkgutil, sys

HEAVY = {"torch", "transformers", "peft", "datasets", "bitsandbytes", "accelerate"}

class Tripwire:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise AssertionError(f"the web process imports {name}")
        return None

sys.meta_path.insert(0, Tripwire())
import studio.asgi
from django.urls import URLPattern, get_resolver

def walk(resolver):
    for one in resolver.url_patterns:
        if isinstance(one, URLPattern):
            yield one
        else:
            yield from walk(one)

patterns = list(walk(get_resolver()))
for root in ("studio", "jobs"):
    package = importlib.import_module(root)
    for found in pkgutil.walk_packages(package.__path__, f"{root}."):
        importlib.import_module(found.name)
# The plug-ins that the forms and the API's schema list.
from workers import plugins
for folder in ("methods", "formats", "objectives", "evaluations"):
    package = importlib.import_module(f"workers.{folder}")
    for found in pkgutil.iter_modules(package.__path__, f"workers.{folder}."):
        importlib.import_module(found.name)
assert not HEAVY & set(sys.modules)
print(len(patterns))
"""


ESTIMATE = (
    SCRIPT.partition("import studio.asgi")[0]
    + """
import time
from tests.workers.test_resolving import SEVEN_B
from workers.fitting import suggestions
from workers.facts import DatasetFacts, DeviceFacts
from workers.memory import estimate
from workers.recipe import Recipe
from workers.resolving import resolve

rows = DatasetFacts(1000, 500_000, 2048, {256: 400, 512: 300, 1024: 200, 2048: 100})
card = DeviceFacts("cuda", "NVIDIA card", 12 * 2**30, 8)
times = []
for _ in range(9):
    began = time.process_time()
    asked = Recipe.from_dict(
        {"name": "x", "base_model": {"name": "b"}, "dataset": {"name": "d", "format": "alpaca"}}
    )
    found = estimate(resolve(asked, SEVEN_B, rows, card), SEVEN_B, rows, card)
    assert found.verdict == "too_large"
    assert suggestions(asked, SEVEN_B, rows, card)
    times.append(1000 * (time.process_time() - began))
assert not HEAVY & set(sys.modules)
print(min(times))
"""
)


def test_an_estimate_and_what_would_fit_take_no_torch_and_less_than_50_ms() -> None:
    """Of the processor's time, so that a busy machine changes nothing; it takes about 7. `python -m
    tests.bench.estimate` has the figures, those of the form's panel too."""
    done = subprocess.run(
        [sys.executable, "-c", ESTIMATE], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 50


def test_no_url_and_no_module_of_the_web_process_imports_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 30


IDLE = """
import os, sys
import studio.asgi, studio.serving
from django.urls import get_resolver

def walk(resolver):
    for one in resolver.url_patterns:
        if hasattr(one, "url_patterns"):
            walk(one)

walk(get_resolver())
with open("/proc/self/statm") as file:
    print(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024**2)
RARE = {"cryptography.fernet", "tokenizers", "nh3", "markdown_it", "numpy", "pyarrow", "boto3"}
print(sorted(RARE & set(sys.modules)))
"""
MOST_IDLE_MIB = 130
"""It holds about 120. An upload of any size takes some 10 more; the process is to stay below 150 MB."""


def test_an_idle_web_process_is_small_and_has_no_rare_library_loaded() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IDLE], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    resident, loaded = done.stdout.splitlines()[-2:]
    assert loaded == "[]"
    assert float(resident) < MOST_IDLE_MIB


def test_the_tripwire_would_trip() -> None:
    mined = SCRIPT.replace("import studio.asgi", "import studio.asgi; import transformers")
    done = subprocess.run(
        [sys.executable, "-c", mined], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "the web process imports transformers" in done.stderr
