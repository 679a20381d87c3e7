"""Suites of standard tasks: the evaluation harness's task files in a folder that whoever runs the studio has set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from django.conf import settings

from studio.accounts.models import ApiToken, Team, User
from studio.catalogue.models import Suite
from studio.catalogue.suites import add_suite, check_name
from workers.errors import RecipeError
from workers.task_files import (
    INSTALL,
    HarnessError,
    TaskInfo,
    choose_tasks,
    definitions_sha256,
    is_installed,
    read_tasks,
)

MAX_FEWSHOT = 64
MAX_TASKS = 100


@dataclass(frozen=True)
class Offer:
    """What tasks can be chosen here, and what is missing, as sentences."""

    tasks: list[TaskInfo]
    missing: list[str]
    may_run_code: bool


def offered_tasks() -> Offer:
    """The tasks of the folder, groups first; what stands in their way is said with what to do about it."""
    missing = []
    if not is_installed():
        missing.append(
            "The evaluation harness is not installed on this machine. A worker that runs such a suite needs it: "
            f"{INSTALL}."
        )
    tasks: list[TaskInfo] = []
    if settings.TASKS_FOLDER is None:
        missing.append(
            "No folder of tasks is set. Put task files of lm-evaluation-harness (YAML, as its --include_path takes "
            "them) with their data into a folder of every machine, and name it with STUDIO_TASKS_FOLDER."
        )
    else:
        try:
            tasks = sorted(read_tasks(settings.TASKS_FOLDER).values(), key=lambda one: (not one.is_group, one.name))
        except HarnessError as error:
            missing.append(f"{error.message} {error.next_step}")
        else:
            if not tasks:
                missing.append(f"The folder {settings.TASKS_FOLDER} has no task files yet.")
    return Offer(tasks, missing, settings.TASKS_MAY_RUN_CODE)


def make_task_suite(
    *,
    team: Team,
    user: User,
    name: str,
    tasks: Sequence[str],
    description: str = "",
    num_fewshot: int | None = None,
    with_chat_template: bool = True,
    max_rows: int | None = None,
    is_guardrail: bool = False,
    token: ApiToken | None = None,
) -> Suite:
    """A new suite of standard tasks, or the next version of the team's suite of this name.

    Args:
        num_fewshot: examples before each question; None for what each task says.
        max_rows: of each task, from its beginning.

    Raises:
        RecipeError: no folder is set, a task is not in it, or runs code where that is not allowed; with the field.
    """
    name = check_name(name, max_rows)
    if num_fewshot is not None and not 0 <= num_fewshot <= MAX_FEWSHOT:
        raise RecipeError(f"There are 0 to {MAX_FEWSHOT} examples before a question.", field="num_fewshot")
    chosen = list(dict.fromkeys(tasks))
    if not chosen:
        raise RecipeError("Choose at least one task.", field="tasks")
    if len(chosen) > MAX_TASKS:
        raise RecipeError(f"Choose {MAX_TASKS} tasks at most; a group counts as one.", field="tasks")
    return add_suite(
        team=team, user=user, name=name, token=token, description=description, tasks=chosen, max_rows=max_rows,
        is_guardrail=is_guardrail,
        evaluation={
            "num_fewshot": num_fewshot, "with_chat_template": with_chat_template,
            "definitions_sha256": checked_definitions(chosen),
        },
    )  # fmt: skip


def checked_definitions(tasks: Sequence[str]) -> str:
    """Digest of the task files of these tasks; raises RecipeError where they cannot be run."""
    folder = settings.TASKS_FOLDER
    if folder is None:
        raise RecipeError(
            "No folder of tasks is set.", next_step="Ask whoever runs the studio to set STUDIO_TASKS_FOLDER.",
            field="tasks",
        )  # fmt: skip
    try:
        choose_tasks(folder, tasks, may_run_code=settings.TASKS_MAY_RUN_CODE)
        return definitions_sha256(folder, tasks)
    except HarnessError as error:
        raise RecipeError(error.message, next_step=error.next_step, field="tasks") from error
