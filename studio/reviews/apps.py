from typing import Any

from django.apps import AppConfig
from django.db.models.signals import post_save


class ReviewsConfig(AppConfig):
    name = "studio.reviews"
    label = "reviews"

    def ready(self) -> None:
        from studio.catalogue.file_checks import files_checked
        from studio.catalogue.models import AliasMove, EvaluationRun

        post_save.connect(_measured_again, sender=EvaluationRun, dispatch_uid="check_gates_after_a_run")
        post_save.connect(_alias_moved, sender=AliasMove, dispatch_uid="check_gates_after_a_move")
        files_checked.connect(_files_checked, dispatch_uid="check_gates_after_a_look_at_files")


def _measured_again(instance: Any, created: bool, **_kwargs: object) -> None:
    """An adapter was evaluated: what the gates of its reviews found is out of date."""
    from studio.reviews.checking import ask_again_for

    if created and instance.adapter is not None:
        ask_again_for(instance.adapter)


def _files_checked(check: Any, **_kwargs: object) -> None:
    """Files were looked at: where the gate of a review says otherwise, it is out of date."""
    from studio.reviews.checking import CHECKED_STATES, ask_again
    from studio.reviews.models import GateOutcome

    outcomes = GateOutcome.objects.filter(
        gate="download", review__adapter_id=check.adapter_id, review__state__in=CHECKED_STATES
    )
    ask_again(*[one.review_id for one in outcomes if one.figures.get("is_damaged", False) != bool(check.damage)])


def _alias_moved(instance: Any, created: bool, **_kwargs: object) -> None:
    """Open reviews of this name were compared with another adapter than they would be now."""
    from studio.reviews.checking import ask_again
    from studio.reviews.models import Review, ReviewState

    if created:
        open_ones = Review.objects.filter(
            team_id=instance.team_id, adapter__name=instance.adapter_name, state=ReviewState.OPEN
        )
        ask_again(*open_ones.values_list("pk", flat=True))
