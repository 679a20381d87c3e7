"""Memory that runs out in a real training: half the rows at once, once, and then a sentence with figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import supervising
from jobs.host_memory import HostMemoryWatch
from jobs.models import Job, JobState
from studio import storage
from tests.faults.trainers import break_trainers, run_attempt, without_dropout

pytestmark = pytest.mark.django_db(transaction=True)

# A device that holds one row at once, from step 8 on; its checkpoints are at steps 5 and 10.
SHORT = """
if step >= 8 and size > 1:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
"""


def weights_of(job: Job) -> str:
    content = (storage.adapter_folder(job.adapter.folder) / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(content).hexdigest()


def curve_of(job: Job) -> dict[int, tuple[float, float]]:
    points = job.points.order_by("step", "attempt").values_list("step", "loss", "learning_rate")
    return {step: (loss, rate) for step, loss, rate in points}


def test_out_of_memory_late_goes_on_with_half_the_rows_and_learns_the_same(
    queue: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run_attempt(without_dropout(queue("undisturbed", max_steps=12)))
    assert undisturbed.state == JobState.SUCCEEDED
    break_trainers(monkeypatch, tmp_path, SHORT)
    job = run_attempt(without_dropout(queue("short", max_steps=12)))
    assert (job.state, job.failure_code, job.micro_batch_size) == (JobState.RETRY_WAIT, "out_of_memory", 1)
    job = run_attempt(job)
    assert (job.state, job.failures_counted) == (JobState.SUCCEEDED, 1)
    rows = job.attempts.order_by("number").values_list("micro_batch_size", "accumulation", "from_step", "outcome")
    assert list(rows) == [(2, 2, 0, "failed"), (1, 4, 5, "succeeded")]
    assert min(job.attempts.values_list("peak_memory_bytes", flat=True)) > 2**26
    ours, theirs = curve_of(job), curve_of(undisturbed)
    assert [rate for _, rate in ours.values()] == [rate for _, rate in theirs.values()], "the schedule goes on"
    assert [loss for loss, _ in ours.values()] == pytest.approx([loss for loss, _ in theirs.values()], rel=1e-4)
    texts = " ".join(job.events.values_list("text", flat=True))
    assert "at step 8 with 2 rows at once: it held" in texts
    assert "with 1 row in memory at once and 4 such micro-batches to a step; the batch stays 4" in texts
    position = json.loads((storage.job_folder(job.pk) / "checkpoints" / "10-2" / "position.json").read_text())
    assert position["micro_batch_size"] == 1


def test_a_kill_after_the_micro_batch_has_changed_ends_with_the_same_bytes(
    queue: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the dropout that LoRA has: its random numbers are part of the checkpoint."""
    break_trainers(monkeypatch, tmp_path, SHORT)
    straight = run_attempt(run_attempt(queue("straight", max_steps=14)))
    assert straight.state == JobState.SUCCEEDED
    break_trainers(monkeypatch, tmp_path, SHORT + "if attempt == 2 and step == 13: os.kill(os.getpid(), 9)")
    killed = run_attempt(run_attempt(queue("killed", max_steps=14)))
    assert (killed.state, killed.failure_code) == (JobState.RETRY_WAIT, "process_lost")
    killed = run_attempt(killed)
    assert killed.attempts.get(number=3).micro_batch_size == 1
    assert weights_of(killed) == weights_of(straight)


def test_out_of_memory_again_is_final_and_names_what_was_used_what_there_is_and_what_would_fit(
    queue: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_trainers(monkeypatch, tmp_path, "if step == 2: raise MemoryError")
    job = run_attempt(run_attempt(queue(batch_size=8, micro_batch_size=8)))
    assert (job.state, job.failure_code, job.micro_batch_size) == (JobState.FAILED, "out_of_memory", 4)
    assert "at step 2 with 4 rows at once: it held" in job.failure_message
    assert "GiB when it asked for more, and this machine has" in job.failure_message
    assert "tried again once" in job.failure_message
    assert "a micro-batch of 2, about" in job.failure_next_step
    assert job.attempts.count() == 2


def test_with_one_row_at_once_there_is_nothing_to_halve(
    queue: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_trainers(monkeypatch, tmp_path, "if step == 2: torch.empty(2**52)")
    job = run_attempt(queue(micro_batch_size=1))
    assert (job.state, job.failure_code) == (JobState.FAILED, "out_of_memory")
    assert "with 1 row at once" in job.failure_message
    assert "micro-batch of 0" not in job.failure_next_step


def test_a_trainer_that_the_system_killed_for_memory_is_tried_once_more_and_fails_with_numbers(
    queue: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control group whose limit the trainer is about to fill; its kill is a SIGKILL like any other."""
    (tmp_path / "memory.max").write_text(f"{2**28}\n")
    monkeypatch.setattr(supervising, "HostMemoryWatch", lambda: HostMemoryWatch([tmp_path]))
    break_trainers(monkeypatch, tmp_path, "if step == 7: time.sleep(2); os.kill(os.getpid(), signal.SIGKILL)")
    job = run_attempt(queue(max_steps=10))
    assert (job.state, job.failure_code) == (JobState.RETRY_WAIT, "host_oom")
    job = run_attempt(job)
    assert (job.state, job.failure_code) == (JobState.FAILED, "host_oom")
    assert "GiB of 0.2 GiB" in job.failure_message
    assert job.attempts.get(number=2).from_step == 5
