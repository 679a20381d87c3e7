"""Choosing between two answers without knowing whose they are, and what all the choices say together."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import ClassVar, Literal

from django.conf import settings
from django.db import IntegrityError, transaction
from django.db.models import Count, Exists, F, OuterRef, Q

from studio.accounts.models import ApiToken, User, record
from studio.catalogue.models import Adapter, Preference, Sample, SampleChoice
from workers.errors import ExplainedError
from workers.proportions import clopper_pearson, sign_test

Letter = Literal["a", "b", "same"]
LETTERS = ("a", "b", "same")


class ChoiceError(ExplainedError):
    """A choice that cannot be counted."""

    code = "no_such_choice"


def adapter_is_a(user: User, sample_id: int) -> bool:
    """Whether the adapter's answer stands first for this person: by the toss of a keyed coin, so that it is the same
    whenever they look and nobody without the studio's key can tell it."""
    key = settings.SECRET_KEY.encode()
    return bool(hmac.digest(key, f"blind choice {user.pk} {sample_id}".encode(), sha256)[0] & 1)


@dataclass(frozen=True)
class BlindPair:
    """A sample whose answers are called A and B."""

    sample_id: int
    source: int
    line: int
    prompt: str
    reference: str
    a: str
    b: str


def blind_pair(sample: Sample, user: User) -> BlindPair:
    """A sample as this person is asked about it."""
    answers = (sample.adapter_answer, sample.base_answer)
    a, b = answers if adapter_is_a(user, sample.pk) else answers[::-1]
    return BlindPair(sample.pk, sample.source, sample.line, sample.prompt, sample.reference, a, b)


def next_sample(adapter: Adapter, user: User) -> Sample | None:
    """The next sample that this person has not chosen on and whose two answers differ, in the order of the file."""
    chosen = SampleChoice.objects.filter(sample=OuterRef("pk"), user=user)
    rows = Sample.objects.filter(adapter=adapter).exclude(base_answer=F("adapter_answer")).filter(~Exists(chosen))
    return rows.order_by("source", "line", "pk").first()


def choose(sample: Sample, user: User, letter: str, *, token: ApiToken | None = None) -> SampleChoice:
    """Store a person's choice: "a", "b" or "same". The first choice counts; whoever has seen the answer to the riddle
    cannot choose anew.

    Raises:
        ChoiceError: there is no such choice.
    """
    if letter not in LETTERS:
        raise ChoiceError(f'There is no choice "{letter}".', next_step='Choose "a", "b" or "same".', field="choice")
    preferred = Preference.NEITHER
    if letter != "same":
        preferred = Preference.ADAPTER if (letter == "a") == adapter_is_a(user, sample.pk) else Preference.BASE
    try:
        with transaction.atomic():
            choice = SampleChoice.objects.create(sample=sample, user=user, preferred=preferred)
            record(
                "adapter.answers_compared", team=sample.adapter.team, user=user, token=token, target=sample.adapter,
                line=sample.line, preferred=preferred,
            )  # fmt: skip
    except IntegrityError:
        return SampleChoice.objects.get(sample=sample, user=user)
    return choice


@dataclass(frozen=True)
class Tally:
    """What people chose. The share, its interval and the test leave out "same"."""

    num_adapter: int
    num_base: int
    num_neither: int
    num_people: int

    @classmethod
    def from_counts(cls, counts: Mapping[str, int] | None) -> Tally:
        """The tally of counts by preference, with the number of "people"; of no choices for None."""
        counts = counts or {}
        return cls(*(counts.get(name, 0) for name in (*Preference.values, "people")))

    METHOD: ClassVar = "Clopper-Pearson interval; exact two-sided sign test, without ties"

    @property
    def num(self) -> int:
        return self.num_adapter + self.num_base + self.num_neither

    @property
    def num_decided(self) -> int:
        return self.num_adapter + self.num_base

    @property
    def share(self) -> float | None:
        """Of the decided choices, the share that went to the adapter."""
        return self.num_adapter / self.num_decided if self.num_decided else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The exact 95 % interval of `share`."""
        return clopper_pearson(self.num_adapter, self.num_decided) if self.num_decided else None

    @property
    def p_value(self) -> float | None:
        """How often a coin would be as clear."""
        return sign_test(self.num_adapter, self.num_decided) if self.num_decided else None


def tally(adapter: Adapter) -> Tally:
    """All blind choices on an adapter's samples."""
    found = SampleChoice.objects.filter(sample__adapter=adapter).aggregate(
        people=Count("user", distinct=True), **{name: _count(preferred=name) for name in Preference.values}
    )
    return Tally.from_counts(found)


def tallies(adapter: Adapter, user: User) -> tuple[Tally, Tally]:
    """All blind choices on an adapter's samples, and one person's of them; one query."""
    found = SampleChoice.objects.filter(sample__adapter=adapter).aggregate(
        people=Count("user", distinct=True),
        **{name: _count(preferred=name) for name in Preference.values},
        **{f"own_{name}": _count(preferred=name, user=user) for name in Preference.values},
    )
    own = {name: found[f"own_{name}"] for name in Preference.values}
    return Tally.from_counts(found), Tally.from_counts(own | {"people": 1})


def _count(**condition: object) -> Count:
    return Count("pk", filter=Q(**condition))
