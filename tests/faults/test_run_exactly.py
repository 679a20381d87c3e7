"""The same recipe on the same base and rows gives the same bytes, by real trainers; and the page says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from django.test import Client
from django.urls import reverse

from jobs.models import Job, JobState
from tests.faults.trainers import run_attempt

pytestmark = pytest.mark.django_db(transaction=True)


def test_an_adapter_that_is_made_again_exactly_has_the_same_bytes(
    queue: Callable[..., Job], bob_client: Client
) -> None:
    first = run_attempt(queue("tiny-lora", max_steps=8))
    assert first.state == JobState.SUCCEEDED
    answer = bob_client.post(reverse("jobs:run_exactly", args=[first.pk]))
    again = Job.objects.get(parent=first)
    assert answer["Location"] == again.get_absolute_url()
    again = run_attempt(again)
    assert again.state == JobState.SUCCEEDED
    assert (again.adapter.name, again.adapter.version) == (first.adapter.name, 2)
    weights = [
        next(file["sha256"] for file in job.adapter.files if file["name"] == "adapter_model.safetensors")
        for job in (first, again)
    ]
    assert weights[0] == weights[1]
    of_first = " ".join(bob_client.get(first.adapter.get_absolute_url()).content.decode().split())
    assert "Its recipe was run again as" in of_first
    of_again = " ".join(bob_client.get(again.adapter.get_absolute_url()).content.decode().split())
    assert "Made from the very recipe of" in of_again
    for page in (of_first, of_again):
        assert "<strong>byte-equal</strong>, adapter_model.safetensors has the same checksum" in page
    diff = bob_client.get(reverse("jobs:diff"), {"a": str(first.pk), "b": str(again.pk)})
    assert "The two adapters are <strong>byte-equal</strong>" in diff.content.decode()
