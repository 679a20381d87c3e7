"""What else goes wrong in a real training: numbers that are none, a hang, a broken disk, a broken GPU."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import gpu_health, scheduling
from jobs.models import Job, JobState
from studio import storage
from studio.devices import Device
from tests.faults.trainers import break_trainers, run_attempt
from tests.jobs.making import make_worker
from workers.events import StepEvent

pytestmark = pytest.mark.django_db(transaction=True)


def names_in(job: Job) -> set[str]:
    return {path.name for path in (storage.job_folder(job.pk) / "checkpoints").iterdir()}


def test_a_loss_that_is_no_number_ends_the_job_at_that_step_for_good(
    queue: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_trainers(monkeypatch, tmp_path, "return float('nan') if step == 7 else None")
    job = run_attempt(queue(max_steps=12))
    assert (job.state, job.failure_code, job.attempts.count()) == (JobState.FAILED, "diverged", 1)
    assert "at step 7" in job.failure_message
    assert "The checkpoint of step 5" in job.failure_message
    assert job.failure_next_step.startswith("Lower the learning rate from 0.001 to 0.0001")
    last = job.points.order_by("-step").first()
    assert (last.step, last.loss) == (7, None), "the curve has the point"
    assert last.learning_rate > 0
    assert names_in(job) == {"5-1"}


def test_a_trainer_that_hangs_leaves_its_stacks_and_is_tried_again(
    queue: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: object
) -> None:

    def be_impatient(event: object) -> None:
        if isinstance(event, StepEvent) and event.step == 6:  # before it, a busy machine may take its time to start
            settings.STALL_SECONDS = 5.0

    hang = (
        "def wait_for_what_never_comes(): time.sleep(3600)\nif attempt == 1 and step == 7: wait_for_what_never_comes()"
    )
    break_trainers(monkeypatch, tmp_path, hang)
    job = run_attempt(queue(max_steps=10), tell=be_impatient)
    settings.STALL_SECONDS = 600.0
    assert (job.state, job.failure_code, job.failures_counted) == (JobState.RETRY_WAIT, "stalled", 1)
    assert "in step 7 and was stopped" in job.failure_message
    log = (storage.job_folder(job.pk) / "attempts" / "1" / "trainer.log").read_text()
    assert "in wait_for_what_never_comes" in log
    assert "Thread 0x" in log, "every thread's stack"
    job = run_attempt(job)
    assert (job.state, job.attempts.get(number=2).from_step) == (JobState.SUCCEEDED, 5)


def test_a_disk_that_breaks_under_a_checkpoint_costs_that_checkpoint_only(
    queue: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = """
if attempt == 1 and step == 8:
    def broken(descriptor): raise OSError(errno.EIO, "Input/output error")
    checkpoints.os.fsync = broken
"""
    break_trainers(monkeypatch, tmp_path, fault)
    job = run_attempt(queue(max_steps=12))
    assert (job.state, job.failure_code, job.failures_counted) == (JobState.RETRY_WAIT, "storage", 0)
    assert "Input/output error" in job.failure_message
    assert names_in(job) == {"5-1", ".bad-10-1"}
    job = run_attempt(job)
    assert (job.state, job.attempts.get(number=2).from_step) == (JobState.SUCCEEDED, 5)
    assert ".bad-10-1" in names_in(job), "kept for whoever looks into it"


def test_a_damaged_checkpoint_is_passed_over_and_the_event_says_so(
    queue: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_trainers(monkeypatch, tmp_path, "if attempt == 1 and step == 12: os.kill(os.getpid(), 9)")
    job = run_attempt(queue(max_steps=14))
    weights = storage.job_folder(job.pk) / "checkpoints" / "10-1" / "adapter.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    job = run_attempt(job)
    assert (job.state, job.attempts.get(number=2).from_step) == (JobState.SUCCEEDED, 5)
    warning = job.events.get(level="warning", text__startswith="Checkpoint 10 is damaged (")
    assert warning.text.endswith("goes on from 5.")
    assert names_in(job) == {"10-2", "14-2"}


def test_when_every_checkpoint_is_damaged_it_starts_again_and_warns(
    queue: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_trainers(monkeypatch, tmp_path, "if attempt == 1 and step == 12: os.kill(os.getpid(), 9)")
    job = run_attempt(queue(max_steps=14))
    for name in ("5-1", "10-1"):
        (storage.job_folder(job.pk) / "checkpoints" / name / "optimizer.safetensors").unlink()
    job = run_attempt(job)
    assert (job.state, job.failures_counted, job.attempts.get(number=2).from_step) == (JobState.SUCCEEDED, 1, 0)
    told = job.events.filter(level="warning", text__endswith="starts again from step 0.")
    assert told.count() == 2


class FakeDriver(types.ModuleType):
    """NVML as far as a GPU's health is asked of it."""

    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC, nvmlEventTypeXidCriticalError = 1, 0, 8

    class NVMLError(Exception):
        pass

    class NVMLError_GpuIsLost(NVMLError):
        pass

    class NVMLError_NotFound(NVMLError):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    class NVMLError_Timeout(NVMLError):
        pass

    def __init__(self, *, ecc: list[int] | None = None, xids: tuple[int, ...] = (), is_lost: bool = False) -> None:
        super().__init__("pynvml")
        self.ecc, self.xids, self.is_lost = ecc or [0, 0], list(xids), is_lost
        self.num_open = 0

    def nvmlInit(self) -> None:
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"gpu {index}"

    def nvmlDeviceGetTotalEccErrors(self, *_: object) -> int:
        if self.is_lost and len(self.ecc) == 1:
            raise self.NVMLError_GpuIsLost
        return self.ecc.pop(0)

    def nvmlEventSetCreate(self) -> object:
        return object()

    def nvmlDeviceRegisterEvents(self, *_: object) -> None:
        return

    def nvmlEventSetFree(self, *_: object) -> None:
        return

    def nvmlEventSetWait_v2(self, *_: object) -> object:
        if not self.xids:
            raise self.NVMLError_Timeout
        return types.SimpleNamespace(eventData=self.xids.pop(0))


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        (FakeDriver(ecc=[3, 5]), "GPU 1 reports 2 memory errors that it could not correct (ECC)"),
        (FakeDriver(xids=(79,)), "GPU 1 reports Xid 79, it has fallen off the bus"),
        (FakeDriver(ecc=[0, 0], is_lost=True), "GPU 1 is lost to the driver"),
        (FakeDriver(ecc=[3, 3], xids=(31, 43)), ""),  # what a program does to itself, or a kill to it
    ],
    ids=["ecc", "xid", "lost", "well"],
)
def test_the_driver_tells_how_the_gpu_is(driver: FakeDriver, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    gpus = [Device(slot=slot, kind="cuda", name=f"GPU {slot}", visible=str(slot)) for slot in range(2)]
    monkeypatch.setattr(gpu_health, "find_devices", lambda: gpus)
    worker = make_worker(1)
    worker.device_kind = "cuda"
    with gpu_health.GpuWatch(worker) as watch:
        assert watch.fault() == words
    assert driver.num_open == 0
    with gpu_health.GpuWatch(make_worker(0)) as on_a_cpu:
        assert on_a_cpu.fault() == ""


def test_a_gpu_that_fails_is_left_alone_and_another_worker_goes_on(
    queue: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeDriver(ecc=[0, 1]))
    gpus = [Device(slot=0, kind="cuda", name="GPU", visible="0")]
    monkeypatch.setattr(gpu_health, "find_devices", lambda: gpus)
    bad, good = make_worker(0), make_worker(1)
    bad.device_kind = "cuda"
    bad.save()
    break_trainers(monkeypatch, tmp_path, "if attempt == 1 and step == 7: os.kill(os.getpid(), signal.SIGSEGV)")
    job = run_attempt(queue(max_steps=10), bad)
    assert (job.state, job.failure_code) == (JobState.RETRY_WAIT, "gpu_error")
    assert "1 memory errors that it could not correct" in job.failure_message
    Job.objects.filter(pk=job.pk).update(not_before=job.created_at)
    assert scheduling.next_job(bad) is None
    bad.refresh_from_db()
    assert "GPU 0" in bad.quarantine_reason
    job = run_attempt(job, good)
    assert (job.state, job.attempts.get(number=2).from_step) == (JobState.SUCCEEDED, 5)


def test_an_error_that_cuda_reports_quarantines_the_slot_as_well(
    queue: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_trainers(monkeypatch, tmp_path, "raise RuntimeError('CUDA error: unspecified launch failure')")
    worker = make_worker(0)
    job = run_attempt(queue(max_steps=10), worker)
    assert (job.state, job.failure_code) == (JobState.RETRY_WAIT, "gpu_error")
    assert scheduling.next_job(worker) is None
