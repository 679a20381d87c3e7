"""No Docker engine runs here, so the files are read: every command, path and variable must exist in the code."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from django.core.management import get_commands
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.studio.test_settings import read_settings

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))


def known_variables() -> set[str]:
    """What settings.py and the GPU slot read from the environment."""
    sources = [ROOT / "studio/settings.py", *(ROOT / "jobs").glob("*.py")]
    pattern = re.compile(r"(?:environ\.get\(|_flag\(|environ\[)\s*\"(\w+)\"")
    return {name for source in sources for name in pattern.findall(source.read_text())}


def steps(path: Path) -> list[tuple[str, str]]:
    """(instruction, argument) of a Dockerfile, continuation lines joined and comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(head, rest.strip()) for head, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def commands() -> list[tuple[str, list[str]]]:
    found = [(name, service["command"]) for name, service in OURS.items() if "command" in service]
    return found + [
        (path.name, json.loads(rest)) for path in DOCKERFILES for head, rest in steps(path) if head == "CMD"
    ]


@pytest.mark.parametrize(("where", "command"), commands())
def test_every_command_names_a_module_that_exists(where: str, command: list[str]) -> None:
    match command:
        case ["python", "manage.py", name, *_]:
            assert name in get_commands(), where
        case ["celery", "--app", app, "worker" | "beat", *_]:
            module = importlib.import_module(app)
            assert module.celery_app.main, where
        case ["python", "-m", "studio.serving", host, port]:
            assert (host, int(port)) == ("0.0.0.0", 8000), "what the image exposes and compose publishes"
        case _:
            pytest.fail(f"{where}: {command} is a command that this test does not know")


def test_the_workers_are_started_as_manage_py_up_starts_them() -> None:
    from studio.devices import Device
    from studio.launching import default_worker_plan, device_worker_plan

    def essence(command: list[str]) -> list[str]:
        arguments = [part for part in command[command.index("--app") :] if part != "--quiet"]
        if "--hostname" in arguments:
            at = arguments.index("--hostname")
            arguments[at : at + 2] = []
        return arguments

    gpu = device_worker_plan(Device(slot=0, kind="cuda", name="x", visible="0"))
    in_image = next(json.loads(rest) for head, rest in steps(DOCKER / "worker.Dockerfile") if head == "CMD")
    assert essence(in_image) == essence(list(gpu.command))
    assert essence(SERVICES["worker-default"]["command"]) == essence(list(default_worker_plan().command))


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_variable_is_one_that_the_code_reads(name: str) -> None:
    environment = OURS[name]["environment"]
    assert set(environment) <= known_variables() | {"CUDA_VISIBLE_DEVICES"}
    assert {"STUDIO_SECRET_KEY", "DATABASE_URL", "REDIS_URL", "STUDIO_DATA_DIR"} <= set(environment)


# What the README's table has and compose does not pass on, and why.
NOT_PASSED = {
    "STUDIO_HOST": "where `up` listens; the image listens on port 8000, and compose says where that is published",
    "STUDIO_PORT": "as STUDIO_HOST",
    "STUDIO_DEBUG": "never in production",
    "STUDIO_SERVERS_HOST": "where `up` lets its embedded servers listen; compose has servers of its own",
    "STUDIO_SERVERS_POSTGRES_PORT": "as STUDIO_SERVERS_HOST",
    "STUDIO_SERVERS_REDIS_PORT": "as STUDIO_SERVERS_HOST",
    "STUDIO_FAILPOINTS": "for tests only",
    "STUDIO_FAILPOINTS_ONCE": "for tests only",
}


def test_every_variable_of_the_readme_reaches_the_services() -> None:
    rows = re.findall(r"^\| (`[A-Z].*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert documented >= {"DATABASE_URL", "STUDIO_TIME_ZONE", *NOT_PASSED}
    for name, service in OURS.items():
        assert documented - set(service["environment"]) == set(NOT_PASSED), name


def test_what_is_left_out_has_the_same_default_in_compose_as_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = COMPOSE["x-environment"]
    defaults = {
        name: match[1]
        for name, value in environment.items()
        if (match := re.fullmatch(r"\$\{\w+:-(.*)\}", str(value))) is not None
    }
    assert len(defaults) > 8
    for name in defaults:
        monkeypatch.delenv(name, raising=False)
    without = read_settings(monkeypatch)
    with_them = read_settings(monkeypatch, **defaults)
    for name in ("ALLOWED_HOSTS", "HTTPS", "BEHIND_PROXY", "BASE_MODEL_ROOTS", "MAX_UPLOAD_BYTES", "LEASE_SECONDS",
                 "POLL_SECONDS", "MAX_ATTEMPTS", "STALL_SECONDS", "TRAINER_THREADS", "TIME_ZONE"):  # fmt: skip
        assert f"STUDIO_{name}" in defaults
        assert getattr(with_them, name) == getattr(without, name), name
    lines = (DOCKER / "example.env").read_text().splitlines()
    assert {f"{name}={value}" for name, value in defaults.items()} <= set(lines), "the example says the same"


def test_the_example_of_the_environment_has_every_variable_that_compose_asks_for() -> None:
    asked = set(re.findall(r"(?<!\$)\$\{(\w+)", (DOCKER / "compose.yaml").read_text()))
    lines = [line for line in (DOCKER / "example.env").read_text().splitlines() if line and not line.startswith("#")]
    given = dict(line.split("=", 1) for line in lines)
    assert asked == set(given)
    assert all(given[name] == "" for name in given if "PASSWORD" in name or "KEY" in name), "no secret is published"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_is_sound(path: Path) -> None:
    found = steps(path)
    assert found[0][0] == "FROM"
    assert ":" in found[0][1], "the base image has a version"
    assert not found[0][1].endswith(":latest")
    heads = [head for head, _ in found]
    assert set(heads) <= {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "VOLUME", "EXPOSE", "CMD"}
    assert heads.index("USER") < heads.index("CMD"), "it does not run as root"
    for head, rest in found:
        if head == "COPY":
            *sources, _target = shlex.split(rest)
            for source in sources:
                assert (ROOT / source).exists(), source
    variables = dict(re.findall(r"(\w+)=(\S+)", " ".join(rest for head, rest in found if head == "ENV")))
    assert {name for name in variables if name.startswith("STUDIO_")} <= known_variables()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_installs_extras_that_exist(path: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = {
        extra for _, rest in steps(path) for group in re.findall(r"\.\[([\w,]+)\]", rest) for extra in group.split(",")
    }
    assert asked
    assert asked <= set(extras)
    assert ("worker" in asked) == (path.name == "worker.Dockerfile"), "the web image has no torch"


def installed_with(*extras: str) -> set[str]:
    """The names of the distributions that `pip install .[extras]` brings, those of their dependencies included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    todo = [Requirement(line) for line in wanted]
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement = todo.pop()
        for extra in ["", *sorted(requirement.extras)]:
            if (canonicalize_name(requirement.name), extra) in seen:
                continue
            seen.add((canonicalize_name(requirement.name), extra))
            try:
                lines = distribution(requirement.name).requires or []
            except PackageNotFoundError:
                continue  # an optional wheel that this machine does not have, so nothing can lean on it here
            needed = [Requirement(line) for line in lines]
            todo += [one for one in needed if one.marker is None or one.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


IMPORT_WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}: the extra does not bring it", name=name)

blocked = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Absent())
import studio.asgi
import studio.serving
import jobs.tasks
import jobs.slots
from django.urls import get_resolver
assert get_resolver().url_patterns
jobs.celery_app.loader.import_default_modules()
"""


def test_the_web_image_can_import_what_its_services_run() -> None:
    brought = installed_with("web")
    blocked = [
        module
        for module, owners in packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & (brought | {"peft-studio"})
    ]
    assert {"torch", "pytest"} <= set(blocked), "the development environment has more than the image"
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT, ",".join(blocked)],
        env=os.environ | {"DJANGO_SETTINGS_MODULE": "studio.settings"}, cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_services_wait_for_what_they_need_and_volumes_exist() -> None:
    for name, service in SERVICES.items():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in SERVICES, name
            if how["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[needed], needed
            if how["condition"] == "service_completed_successfully":
                assert SERVICES[needed]["restart"] == "no", needed
        for mount in service.get("volumes", []):
            assert mount.split(":")[0] in COMPOSE["volumes"], name
        if "build" in service:
            assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).exists()


def test_a_gpu_worker_reserves_the_device_of_its_slot() -> None:
    gpus = {name: service for name, service in SERVICES.items() if name.startswith("worker-gpu")}
    assert gpus
    for name, service in gpus.items():
        [device] = service["deploy"]["resources"]["reservations"]["devices"]
        slot = name.removeprefix("worker-gpu")
        assert (device["driver"], device["device_ids"], device["capabilities"]) == ("nvidia", [slot], ["gpu"])
        assert service["environment"]["STUDIO_SLOT"] == slot


def test_the_constraints_pin_no_local_build() -> None:
    lines = [line for line in (DOCKER / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 50
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), line
