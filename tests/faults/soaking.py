"""The soak itself: workers, faults at seeded moments, the verdict. Imported once Django knows the soak's servers."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import psutil
import redis
from django.conf import settings
from django.core.management import call_command
from django.db import DatabaseError, InterfaceError, connections
from django.db.models import Count

from jobs.lifecycle import POISON_ATTEMPTS
from jobs.models import FINAL_STATES, LEASED_STATES, Job, JobAttempt, JobState, MetricPoint, Worker
from jobs.progress import stream_key
from jobs.queueing import queue_job
from jobs.trainers import trainer_environment
from studio import storage
from studio.accounts.models import Membership, Role, Team, User
from studio.catalogue.importing import register_base_model
from studio.catalogue.models import Adapter
from studio.datasets.inspecting import inspect
from studio.datasets.uploads import receive_upload
from studio.embedded import EmbeddedServers, die_with_parent
from tests.faults import invariants
from tests.faults.apps import FAKE
from tests.faults.fake_trainer import expected_state, weights_file
from tests.faults.invariants import Trainer, broken_invariants, find_trainers
from tests.processes import kill_tree
from tests.tiny import make_tiny_base, tiny_rows
from workers.recipe import Recipe

T = TypeVar("T")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# How twenty kill -9 are spent: on trainers, on workers alone (their trainer has to die with them), on both at once.
KILLS = (*("trainer", "trainer", "worker", "trainer", "trainer", "tree") * 3, "trainer", "trainer")
PAUSES = ("pause worker", "pause tree")
KILL_NAMES = {
    "trainer": "kill -9 of a trainer", "worker": "kill -9 of a worker", "tree": "kill -9 of a whole tree",
    "pause worker": "zombies: the worker paused", "pause tree": "zombies: the whole tree paused",
    "postgres": "Postgres immediate restarts", "redis": "Redis kills",
}  # fmt: skip
# A real training costs seconds of import at each attempt, so that only so many of its attempts are interrupted.
MAX_HITS_OF_REAL = 2
MAX_PAUSED = 3
SECONDS_BETWEEN_SERVER_KILLS = 2.0
WORKER = (
    "-m", "celery", "--app", "jobs", "--quiet", "worker", "--queues", "gpu", "--pool", "solo", "--concurrency", "1",
    "--prefetch-multiplier", "1", "--without-gossip", "--without-mingle", "--loglevel", "INFO",
)  # fmt: skip


def patiently(ask: Callable[[], T], *, seconds: float = 60) -> T:
    """What the database answers, once it does."""
    give_up_at = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except (DatabaseError, InterfaceError):
            if time.monotonic() > give_up_at:
                raise
            connections.close_all()
            time.sleep(0.1)


def _processor_seconds() -> float:
    """Of this process and of everything below it that has ended, in seconds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@dataclass
class LiveWorker:
    """A worker process that was started and not killed."""

    process: subprocess.Popen[bytes]
    slot: int
    is_ready: bool = False
    paused: list[psutil.Process] = field(default_factory=list)
    resume_at: float = 0.0


@dataclass
class Verdict:
    """What the soak found."""

    rows: list[tuple[str, str]]
    violations: list[str]

    def table(self) -> str:
        """For people: a line per figure, and then what is wrong."""
        width = max(len(name) for name, _ in self.rows)
        lines = [f"{name:<{width}}  {value}" for name, value in self.rows]
        return "\n".join(["", *lines, "", *(self.violations or ["Every invariant holds."])])


class Soak:
    """One run: `run()` gives the verdict."""

    def __init__(self, options: argparse.Namespace, servers: EmbeddedServers, started_at: float) -> None:
        self.options, self.servers, self.started_at = options, servers, started_at
        self.random = random.Random(options.seed)
        self.left = self._faults()
        self.done: Counter[str] = Counter()
        self.workers: list[LiveWorker] = []
        self.jobs: list[Job] = []
        self.hits: Counter[UUID] = Counter()
        self.num_starts = self.num_ended = self.num_finals = 0
        self.server_killed_at = 0.0
        self.violations: list[str] = []
        self._suspects: set[str] = set()
        self.references: dict[int, Path] = {}
        self.logs = Path(settings.DATA_DIR) / "logs"

    def run(self) -> Verdict:
        """Queue the jobs, inject every fault, wait for the end and judge."""
        self._print(f"seed {self.options.seed}")
        self.logs.mkdir()
        # Lost connections are what this is about; each would fill the terminal with a traceback.
        logging.getLogger().setLevel(logging.ERROR)
        call_command("migrate", verbosity=0)
        self._prepare()
        references = [self._start_reference(seed) for seed in self._real_seeds()]
        for process in references:
            assert process.wait(300) == 0, f"the undisturbed training failed; its log is in {self.logs}"
        for _ in range(self.options.jobs):
            self._queue()
        self._print(f"{len(self.jobs)} jobs queued, {len(references)} undisturbed trainings done; faults begin")
        self.began_at = time.monotonic()
        try:
            self._work()
            return self._judge()
        finally:
            for worker in self.workers:
                kill_tree(worker.process.pid)

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        self.team = Team.objects.create(name="Soak", slug="soak")
        self.user = User.objects.create_user(username="soak")
        Membership.objects.create(user=self.user, team=self.team, role=Role.TRAINER)
        folder = make_tiny_base(Path(settings.DATA_DIR) / "base_models" / "tiny")
        self.base_model = register_base_model(folder=folder, name="tiny", hub_id="", licence="mit")
        content = "".join(json.dumps(row) + "\n" for row in tiny_rows(60)).encode()
        self.version = receive_upload(team=self.team, user=self.user, file_name="tiny.jsonl", chunks=[content])
        inspect(self.version.pk)
        self.version.refresh_from_db()

    def _real_seeds(self) -> list[int]:
        return list(range(1, min(2, self.options.real) + 1))

    def _recipe(self, name: str, *, seed: int, max_steps: int) -> Recipe:
        return Recipe.from_dict(
            {
                "name": name,
                "base_model": {"name": self.base_model.name, "revision": self.base_model.revision},
                "dataset": {
                    "name": str(self.version), "sha256": self.version.sha256, "format": self.version.format,
                    "columns": self.version.columns,
                },
                "method": "lora",
                "settings": {"rank": 4},
                "precision": "float32",
                "training": {
                    "seed": seed, "max_steps": max_steps, "batch_size": 4, "micro_batch_size": 2, "max_length": 64,
                    "epochs": 100, "learning_rate": 1e-3, "checkpoint_every_steps": 10, "packing": False,
                    "gradient_checkpointing": False,
                },
                "evaluation": {"num_generated": 2, "max_new_tokens": 4, "general": False},
            }
        )  # fmt: skip

    def _real_recipe(self, name: str, seed: int) -> Recipe:
        return self._recipe(name, seed=seed, max_steps=120)

    def _start_reference(self, seed: int) -> subprocess.Popen[bytes]:
        """An undisturbed training by the trainer's own command line."""
        out = Path(settings.DATA_DIR) / "undisturbed" / str(seed)
        out.mkdir(parents=True)
        (out / "recipe.json").write_text(json.dumps(self._real_recipe("undisturbed", seed).to_dict()))
        self.references[seed] = out / "attempts" / "1" / "adapter"
        command = [
            sys.executable, "-m", "workers", str(out / "recipe.json"), "--out", str(out),
            "--base-model-folder", self.base_model.folder,
            "--dataset-file", str(storage.blob_path(self.version.sha256)),
        ]  # fmt: skip
        with (self.logs / f"undisturbed-{seed}.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=settings.ROOT, env=trainer_environment(), stdout=log, stderr=log,
                preexec_fn=lambda: die_with_parent(signal.SIGKILL),
            )  # fmt: skip

    def _queue(self) -> None:
        """Queue the next job: the real ones lie scattered over the first third."""
        index = len(self.jobs)
        places = {round(n * self.options.jobs / 3 / max(1, self.options.real)) for n in range(self.options.real)}
        if index in places:
            recipe = self._real_recipe(f"real {index}", 1 + index % len(self._real_seeds()))
        else:
            steps = self.random.randrange(20, 90)
            recipe = self._recipe(f"{FAKE}{index}", seed=index, max_steps=steps)
        key = uuid.uuid5(uuid.NAMESPACE_OID, str(index)).hex
        self.jobs.append(
            patiently(
                lambda: queue_job(
                    team=self.team, user=self.user, recipe=recipe, base_model=self.base_model,
                    dataset_version=self.version, idempotency_key=key,
                )
            )
        )  # fmt: skip

    # --- the run ------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        next_fault = time.monotonic() + 2 * self.options.gap
        next_look = next_line = 0.0
        while True:
            now = time.monotonic()
            self._resume_zombies(now)
            self._keep_workers()
            if now >= next_look:
                next_look = now + 1
                if self._look():
                    return
            if now >= next_line:
                next_line = now + 10
                self._sample()
                self._print(self._progress())
            if self.left and now >= next_fault and self._inject(now):
                next_fault = time.monotonic() + self.random.expovariate(1 / self.options.gap)
            if now > self.started_at + self.options.limit:
                self.violations.append(f"The soak did not end within {self.options.limit:.0f} s.")
                return
            time.sleep(0.05)

    def _look(self) -> bool:
        """Note which workers are up, queue more jobs while faults are left; whether all is over."""
        pids = patiently(lambda: set(Worker.objects.order_by("-started_at").values_list("process_id", flat=True)[:50]))
        for worker in self.workers:
            worker.is_ready = worker.is_ready or worker.process.pid in pids
        states = patiently(lambda: Counter(Job.objects.values_list("state", flat=True)))
        self.states = states
        waiting = states[JobState.QUEUED] + states[JobState.RETRY_WAIT]
        if self.left and waiting < 2 * self.options.workers:
            for _ in range(2 * self.options.workers):
                self._queue()
            return False
        self.num_finals = states[JobState.SUCCEEDED] + states[JobState.FAILED] + states[JobState.CANCELLED]
        is_paused = any(worker.paused for worker in self.workers)
        return not self.left and not is_paused and self.num_finals == len(self.jobs)

    def _sample(self) -> None:
        """What must hold at every moment; what two looks ten seconds apart show is no passing state."""
        paused = {one.pid for worker in self.workers for one in worker.paused}
        found: set[str] = set()
        if not paused:
            # A trainer whose supervisor is paused outlives its lease: nobody is there to end it.
            checks = (invariants.trainers_without_supervisor, invariants.trainers_per_slot)
            found |= {sentence for check in checks for sentence in patiently(lambda check=check: list(check()))}
        found |= set(patiently(lambda: list(invariants.expired_leases())))
        self.violations += sorted(found & self._suspects)
        self._suspects = found

    def _progress(self) -> str:
        running = sum(self.states[state] for state in LEASED_STATES)
        kills = sum(self.done[kind] for kind in set(KILLS))
        zombies = sum(self.done[kind] for kind in PAUSES)
        return (
            f"{self.states[JobState.SUCCEEDED]} of {len(self.jobs)} jobs succeeded, {running} run,"
            f" {self.states[JobState.RETRY_WAIT]} wait to retry; {kills} kills, {zombies} zombies,"
            f" {self.done['postgres']} Postgres and {self.done['redis']} Redis kills;"
            f" {len(self.workers)} workers"
        )

    def _print(self, text: str) -> None:
        print(f"{time.monotonic() - self.started_at:5.0f} s  {text}", flush=True)

    # --- workers ------------------------------------------------------------------------------------------------------

    def _keep_workers(self) -> None:
        for worker in list(self.workers):
            if worker.process.poll() is not None:
                # As `up` does it: a worker that ends is started again.
                self.workers.remove(worker)
                self.num_ended += 1
        while sum(not worker.paused for worker in self.workers) < self.options.workers:
            taken = {worker.slot for worker in self.workers}
            self.workers.append(self._start_worker(next(slot for slot in range(1000) if slot not in taken)))

    def _start_worker(self, slot: int) -> LiveWorker:
        self.num_starts += 1
        with (self.logs / f"worker-{self.num_starts}-slot-{slot}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *WORKER, "--hostname", f"soak{self.num_starts}@soak"],
                env=os.environ | {"STUDIO_SLOT": str(slot)}, cwd=settings.ROOT, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True, preexec_fn=lambda: die_with_parent(signal.SIGKILL),
            )  # fmt: skip
        return LiveWorker(process, slot)

    # --- faults -------------------------------------------------------------------------------------------------------

    def _faults(self) -> Counter[str]:
        """How many faults of each kind are left to inject."""
        kills = Counter(KILLS[index % len(KILLS)] for index in range(self.options.kills))
        pauses = Counter(PAUSES[index % 2] for index in range(self.options.zombies))
        servers = {"postgres": self.options.postgres_kills, "redis": self.options.redis_kills}
        return +(kills + pauses + Counter(servers))

    def _inject(self, now: float) -> bool:
        """Inject one of the faults that are possible now, each as likely as there are many of it left."""
        possible = dict(self.left)
        if now < self.server_killed_at + SECONDS_BETWEEN_SERVER_KILLS:
            possible = {kind: n for kind, n in possible.items() if kind not in {"postgres", "redis"}}
        num_paused = sum(bool(worker.paused) for worker in self.workers)
        num_starting = sum(not worker.is_ready for worker in self.workers)
        if num_paused >= MAX_PAUSED or num_starting >= self.options.workers / 2:
            possible = {kind: n for kind, n in possible.items() if kind not in PAUSES}
        if num_starting >= self.options.workers / 2:
            possible = {kind: n for kind, n in possible.items() if kind not in {"worker", "tree"}}
        if not possible:
            return False
        [kind] = self.random.choices(list(possible), list(possible.values()))
        if kind == "postgres":
            self._restart("postgres", signal.SIGQUIT)
        elif kind == "redis":
            self._restart("valkey", signal.SIGKILL)
        elif not self._hit(kind, now):
            return False
        self.done[kind] += 1
        self.left -= Counter([kind])
        return True

    def _restart(self, name: str, how: int) -> None:
        os.kill(self.servers.pids()[name], how)
        while name in self.servers.pids():
            time.sleep(0.01)
        self.servers.revive()
        connections.close_all()
        self.server_killed_at = time.monotonic()

    def _hit(self, kind: str, now: float) -> bool:
        """Kill or pause a random worker or trainer; False when there is none that may be hit now."""
        trainers: dict[int, list[Trainer]] = defaultdict(list)
        for trainer in find_trainers():
            trainers[trainer.supervisor].append(trainer)
        may_be_hit = patiently(lambda: self._may_be_hit({one.job_id for ones in trainers.values() for one in ones}))
        victims = [
            worker
            for worker in self.workers
            if worker.is_ready and not worker.paused and all(
                trainer.job_id in may_be_hit for trainer in trainers[worker.process.pid]
            ) and (trainers[worker.process.pid] or kind in {"worker", "tree"})
        ]  # fmt: skip
        if not victims:
            return False
        # A real training that was not interrupted shows nothing: each is hit once before any other gets its turn.
        reals = self._untouched_reals()
        urgent = [
            worker for worker in victims if any(trainer.job_id in reals for trainer in trainers[worker.process.pid])
        ]  # fmt: skip
        if not urgent and kind == "trainer" and self.left["trainer"] <= len(reals):
            return False
        worker = self.random.choice(urgent or victims)
        own = trainers[worker.process.pid]
        self.hits.update(trainer.job_id for trainer in own)
        match kind:
            case "trainer":
                with contextlib.suppress(psutil.NoSuchProcess):
                    own[0].process.kill()
            case "worker":
                worker.process.kill()
            case "tree":
                kill_tree(worker.process.pid)
            case _:
                paused = [psutil.Process(worker.process.pid)]
                if kind == "pause tree":
                    paused += [trainer.process for trainer in own]
                for process in paused:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.suspend()
                worker.paused, worker.resume_at = paused, now + 2 * settings.LEASE_SECONDS
        if kind in {"worker", "tree"}:
            worker.process.wait()
            self.workers.remove(worker)
        return True

    def _untouched_reals(self) -> set[UUID]:
        """Real trainings under way or to come that no fault has hit yet."""
        reals = {job.pk for job in self.jobs if not job.name.startswith(FAKE) and not self.hits[job.pk]}
        return patiently(lambda: set(Job.objects.filter(pk__in=reals).exclude(state__in=FINAL_STATES).values_list(
            "pk", flat=True
        )))  # fmt: skip

    def _may_be_hit(self, job_ids: set[UUID]) -> set[UUID]:
        """Jobs of which another interrupted attempt is no reason to give them up.

        A job whose attempts end again and again without a step is given up as poison. So whatever has been hit twice
        in a row without a step is left alone until it has gained one, and so is every real training.
        """
        found = set()
        for job in Job.objects.filter(pk__in=job_ids):
            is_real = not job.name.startswith(FAKE)
            if is_real and self.hits[job.pk] >= MAX_HITS_OF_REAL:
                continue
            last = JobAttempt.objects.filter(job=job).exclude(ended_at=None).order_by("-number")[: POISON_ATTEMPTS - 1]
            gained = [attempt.last_step > attempt.from_step for attempt in last]
            now = MetricPoint.objects.filter(job=job, attempt=job.attempt).count()
            if now or (not is_real and (len(gained) < POISON_ATTEMPTS - 1 or any(gained))):
                found.add(job.pk)
        return found

    def _resume_zombies(self, now: float) -> None:
        for worker in self.workers:
            if worker.paused and now >= worker.resume_at:
                for process in worker.paused:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.resume()
                worker.paused = []

    # --- the verdict --------------------------------------------------------------------------------------------------

    def _judge(self) -> Verdict:
        self._print("judging")
        seconds = time.monotonic() - self.began_at
        self.violations += broken_invariants(patience=20)
        jobs = {job.pk: job for job in Job.objects.select_related("adapter")}
        lost = [job for job in jobs.values() if job.state != JobState.SUCCEEDED]
        self.violations += [f"{job.name} is {job.state}: {job.failure_code} {job.failure_message}" for job in lost]
        missing = {job.pk for job in self.jobs} - set(jobs)
        self.violations += [f"Job {job_id} was queued and is gone." for job_id in sorted(missing)]
        doubled = self._doubled()
        late = sum(n for _, _, n in invariants.late_points()) + sum(n for _, _, n in invariants.late_entries())
        fake = [job for job in jobs.values() if job.name.startswith(FAKE) and job.adapter]
        real = [job for job in jobs.values() if not job.name.startswith(FAKE) and job.adapter]
        equal_fakes, equal_reals = sum(map(self._is_as_undisturbed, fake)), sum(map(self._is_as_undisturbed, real))
        if equal_fakes + equal_reals != len(fake) + len(real):
            self.violations.append("Some adapters differ from those of undisturbed runs.")
        self.violations += [f"{n} x {KILL_NAMES[kind]} could not be injected." for kind, n in self.left.items()]
        real_hits = sorted((self.hits[job.pk] for job in real), reverse=True)
        ended = JobAttempt.objects.exclude(outcome="succeeded").values_list("outcome", "failure_code")
        rows: list[tuple[str, str]] = [
            ("jobs", f"{len(jobs)}, {len(real)} of them real trainings"),
            ("succeeded", str(sum(job.state == JobState.SUCCEEDED for job in jobs.values()))),
            ("lost", str(len(lost) + len(missing))),
            ("doubled", str(doubled)),
            ("progress rows from fenced attempts", str(late)),
            ("  of points and stream entries", f"{MetricPoint.objects.count()} and {self._num_entries()}"),
            ("attempts", str(JobAttempt.objects.count())),
            *(
                (f"  ended as {outcome or 'nothing'}, {code or 'no failure'}", str(count))
                for outcome, code, count in ended.order_by().annotate(n=Count("pk")).order_by("-n")
            ),
            *((KILL_NAMES[kind], str(self.done[kind])) for kind in KILL_NAMES),
            ("kill -9 in all", str(sum(self.done[kind] for kind in set(KILLS)))),
            ("zombies in all", str(sum(self.done[kind] for kind in PAUSES))),
            ("worker starts", f"{self.num_starts}; {self.num_ended} workers ended by themselves"),
            ("adapters of real trainings byte-equal", f"{equal_reals} of {len(real)}, interrupted {real_hits} times"),
            ("products of fake trainings byte-equal", f"{equal_fakes} of {len(fake)}"),
            ("processor time", f"{_processor_seconds():.0f} s, as far as processes were waited for"),
            ("wall time", f"{time.monotonic() - self.started_at:.0f} s, {seconds:.0f} s of it under faults"),
        ]
        return Verdict(rows, self.violations)

    def _num_entries(self) -> int:
        with redis.Redis.from_url(settings.REDIS_URL) as client:
            return sum(int(client.xlen(stream_key(job.pk))) for job in self.jobs)

    def _doubled(self) -> int:
        """Jobs with more than one product, by rows of adapters and by attempts that ended with one."""
        of_attempts = Counter(JobAttempt.objects.filter(outcome="succeeded").values_list("job_id", flat=True))
        # The storage key of a product is <team>/<job>-<attempt>.
        of_adapters = Counter(
            UUID(key[key.index("/") + 1 :][:36]) for key in Adapter.objects.values_list("folder", flat=True)
        )
        return sum(1 for job_id in {*of_attempts, *of_adapters} if max(of_attempts[job_id], of_adapters[job_id]) > 1)

    def _is_as_undisturbed(self, job: Any) -> bool:
        folder = storage.adapter_folder(job.adapter.folder)
        training = job.recipe["training"]
        if job.name.startswith(FAKE):
            expected = weights_file(expected_state(training["seed"], training["max_steps"]))
            return (folder / WEIGHTS).read_bytes() == expected
        undisturbed = self.references[training["seed"]]
        return all((folder / name).read_bytes() == (undisturbed / name).read_bytes() for name in (WEIGHTS, CONFIG))
