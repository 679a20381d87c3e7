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
"""An upload of any size takes some 10 more; the process is to stay below 150 MB."""


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
