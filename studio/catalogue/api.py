"""REST endpoints of the catalogue: adapters, their scores and files, and base models."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from django.http import HttpResponseBase
from django.shortcuts import get_object_or_404
from ninja import Query, Router, Status
from pydantic import Field

from studio.accounts.models import Role, Scope, record
from studio.api.auth import ApiRequest, Token, may_write
from studio.api.errors import ERRORS, ApiError
from studio.api.paging import Page, PageQuery, page_of, require_cursor
from studio.api.schemas import Body, Out
from studio.cards import MAX_CHARACTERS, CardConflictError, card_version
from studio.catalogue import blind, listing
from studio.catalogue.base_checks import ask_for_check, check_of
from studio.catalogue.bundles import manifest_sha256
from studio.catalogue.downloads import download_response
from studio.catalogue.file_checks import check_now
from studio.catalogue.findings import Finding, Level, findings_of, thresholds_of
from studio.catalogue.importing import allowed_folder, register_base_model
from studio.catalogue.model_card import adapter_front_matter, card_body, edit_card
from studio.catalogue.models import Adapter, BaseFileCheck, BaseModel, Sample
from studio.keyset import read_page
from workers.evaluations import evaluations
from workers.verdicts import Verdict

router = Router(tags=["catalogue"])


class FileOut(Out):
    """A file with its sha256 and its size in bytes."""

    name: str
    sha256: str
    num_bytes: int


class ScoreOut(Out):
    """An evaluation of the adapter beside the base on the same held-out rows; intervals are 95 %."""

    evaluation: str
    label: str
    unit: str
    higher_is_better: bool
    num_rows: int
    value: float
    low: float
    high: float
    base_value: float
    base_low: float
    base_high: float
    difference: float
    difference_low: float
    difference_high: float
    interval_method: str
    p_value: float | None = Field(description="Of the paired randomisation test")
    verdict: Verdict
    rows_recommended: int | None = Field(description="As many rows would show the smallest difference worth telling")
    is_better: bool | None = Field(description="null: no difference, or too few rows to tell")

    @staticmethod
    def resolve_verdict(score: Any) -> Verdict:
        result: Verdict = score.verdict()
        return result

    @staticmethod
    def resolve_is_better(score: Any) -> bool | None:
        result: bool | None = score.is_better()
        return result


class SampleOut(Out):
    """A held-out row as the base and the adapter answered it."""

    source: int = Field(description="Which of the adapter's datasets; 0 is the main one, 1 the first of its mix.")
    line: int
    prompt: str
    reference: str
    base_answer: str
    adapter_answer: str
    figure: str = Field(description="Evaluation that tells regressions from improvements; empty: not measured yet")
    base_figure: float | None
    adapter_figure: float | None = Field(description="null: the row has no part in the figure")


class FindingOut(Out):
    """Something that was looked for in an adapter, and what was found."""

    code: str
    level: Level
    title: str
    sentence: str
    next_step: str
    anchor: str


class AdapterOut(Out):
    """A trained adapter in a list."""

    id: int
    name: str
    version: int
    state: str
    tags: list[str]
    aliases: list[str]
    base_model_id: int
    dataset_version_id: int
    method: str
    num_trainable: int
    num_bytes: int
    stopped_at_step: int | None
    created_at: datetime

    @staticmethod
    def resolve_aliases(adapter: Adapter) -> list[str]:
        return sorted(alias.name for alias in adapter.aliases.all())


class MixOut(Out):
    """A further dataset that an adapter was trained on."""

    dataset_version_id: int
    weight: float


class AdapterDetailOut(AdapterOut):
    """A trained adapter with its recipe, scores, files and history."""

    sha256: str = Field(description="Digest over the names and checksums of all files.")
    recipe: dict[str, Any]
    provenance: dict[str, Any]
    files: list[FileOut]
    scores: list[ScoreOut]
    findings: list[FindingOut] = Field(description="What can be wrong with it, the worst first")
    mix: list[MixOut] = Field(description="Further datasets that it was trained on, in the order of the recipe's mix.")
    sources: list[dict[str, Any]] = Field(
        description="Of a mixture: each dataset's part in training and its own scores, the main one first."
    )
    overlap: dict[str, Any] = Field(description="Held-out rows that it was trained on; empty: not looked for")
    suspicious: list[dict[str, Any]] = Field(description="Training rows that may be wrong, the worst first")

    @staticmethod
    def resolve_findings(adapter: Adapter) -> list[Finding]:
        return findings_of(adapter, thresholds_of(adapter.team))

    @staticmethod
    def resolve_sha256(adapter: Adapter) -> str:
        return manifest_sha256(adapter)


class CardOut(Out):
    """A model card: front matter, which the studio writes, and the text, which people may edit."""

    front_matter: str
    body: str
    version: str = Field(description="Of the text; send it as `seen` with an edit.")
    is_edited: bool


class CardBody(Body):
    """A new text of a card."""

    body: str = Field(max_length=MAX_CHARACTERS, description="Markdown; empty brings the generated text back.")
    seen: str = Field(max_length=64, description="`version` of the text that the edit began with.")


class BlindPairOut(Out):
    """A sample whose two answers do not say whose they are."""

    sample_id: int
    line: int
    prompt: str
    reference: str
    a: str
    b: str


class TallyOut(Out):
    """All blind choices; the share is the adapter's of those that were not "same"."""

    num_adapter: int
    num_base: int
    num_neither: int
    num_people: int
    share: float | None
    interval: tuple[float, float] | None = Field(description="95 %, Clopper-Pearson")
    p_value: float | None = Field(description="Of the exact two-sided sign test")


class BlindOut(Out):
    """What to choose on next; null when everything was."""

    sample: BlindPairOut | None
    tally: TallyOut


class ChoiceBody(Body):
    """A choice on a sample of GET."""

    sample_id: int = Field(ge=1, le=2**62)
    choice: str = Field(max_length=4, description='"a", "b" or "same"')


class ChoiceOut(Out):
    """The choice that counts, and whose answers they were."""

    sample_id: int
    preferred: str = Field(description='"adapter", "base" or "neither"')
    adapter_was: str = Field(description='"a" or "b"')


class BaseModelOut(Out):
    """A frozen model that adapters are trained on."""

    id: int
    name: str
    hub_id: str
    licence: str
    revision: str
    num_bytes: int
    has_chat_template: bool
    shape: dict[str, Any]
    created_at: datetime


class BaseCheckOut(Out):
    """When a base model's files were last read, and what was found; an empty `damage` then says that all is whole."""

    checked_at: datetime | None
    damage: str
    asked_at: datetime | None = Field(description="Since when a check is waiting or under way; null: none is.")


class BaseModelDetailOut(BaseModelOut):
    """A base model with its files."""

    files: list[FileOut]
    file_check: BaseCheckOut | None = Field(description="null: not checked since it was registered")

    @staticmethod
    def resolve_file_check(base: BaseModel) -> BaseFileCheck | None:
        return check_of(base)


class AdapterFilters(PageQuery):
    """What a list of adapters can be narrowed by."""

    base_model_id: int | None = None
    dataset_id: int | None = None
    method: str = Field("", max_length=40)
    q: str = Field("", max_length=200, description="Beginnings of words of names, tags and cards; all must occur")
    state: Literal["", "draft", "in_review", "approved", "rejected", "archived"] = Field(
        "", description="Empty: all but the archived"
    )
    alias: str = Field("", max_length=40)
    tag: str = Field("", max_length=40)
    newest_versions: bool = Field(False, description="Only the newest version of each name")
    sort: str = Field("updated", max_length=80, description="updated, name, size, or an evaluation: best first")


class RegisterBody(Body):
    """A folder below one of the studio's base model folders."""

    folder: str = Field(min_length=1, max_length=1000)
    name: str = Field(min_length=1, max_length=120)
    hub_id: str = Field("", max_length=200)
    licence: str = Field("", max_length=80)


@router.get("adapters/", response={200: Page[AdapterOut], **ERRORS}, summary="A team's adapters")
def list_adapters(request: ApiRequest, query: Query[AdapterFilters]) -> dict[str, Any]:
    """The newest first unless `sort` says otherwise."""
    if query.sort not in {*evaluations(), *listing.OTHER_SORTS}:
        known = ", ".join([*listing.OTHER_SORTS, *evaluations()])
        raise ApiError(422, "invalid", f"There is no order {query.sort}. There are: {known}.", field="sort")
    filters = listing.Filters(
        text=query.q, state=query.state, base=str(query.base_model_id or ""), dataset=str(query.dataset_id or ""),
        method=query.method, alias=query.alias, tag=query.tag, is_every_version=not query.newest_versions,
        sort=query.sort,
    )  # fmt: skip
    keys = listing.order_of(filters)
    require_cursor(query.after, keys)
    rows = listing.with_columns(request.team.adapters.all(), filters).prefetch_related("aliases")
    page = read_page(rows, keys, {"after": query.after}, size=query.limit)
    return {"items": page.rows, "next": page.after or None}


@router.get("adapters/{int:adapter_id}/", response={200: AdapterDetailOut, **ERRORS}, summary="One adapter")
def get_adapter(request: ApiRequest, adapter_id: int) -> Adapter:
    rows = request.team.adapters.select_related("file_check").prefetch_related("scores__run")
    return get_object_or_404(rows, pk=adapter_id)


@router.get("adapters/{int:adapter_id}/scores/", response={200: list[ScoreOut], **ERRORS}, summary="Its scores")
def list_scores(request: ApiRequest, adapter_id: int) -> Any:
    return get_object_or_404(request.team.adapters, pk=adapter_id).scores.order_by("evaluation")


@router.get("adapters/{int:adapter_id}/samples/", response={200: list[SampleOut], **ERRORS}, summary="Its answers")
def list_samples(request: ApiRequest, adapter_id: int) -> Any:
    return get_object_or_404(request.team.adapters, pk=adapter_id).samples.all()


@router.get("adapters/{int:adapter_id}/card/", response={200: CardOut, **ERRORS}, summary="Its model card")
def get_card(request: ApiRequest, adapter_id: int) -> dict[str, Any]:
    return _card(get_object_or_404(request.team.adapters.select_related("base_model"), pk=adapter_id))


@router.put(
    "adapters/{int:adapter_id}/card/",
    response={200: CardOut, **ERRORS},
    auth=may_write,
    summary="Edit its model card, unless somebody else did since it was read",
)
def put_card(request: ApiRequest, adapter_id: int, body: CardBody) -> dict[str, Any]:
    adapter = get_object_or_404(request.team.adapters.select_related("base_model", "team"), pk=adapter_id)
    try:
        edit_card(adapter, body.body, request.user, seen=body.seen, token=request.token)
    except CardConflictError as error:
        again = "Read the card again and send yours with its version."
        raise ApiError(409, error.code, error.message, field="seen", help=again) from error
    return _card(adapter)


def _card(adapter: Adapter) -> dict[str, Any]:
    body = card_body(adapter)
    return {
        "front_matter": adapter_front_matter(adapter),
        "body": body or "",
        "version": card_version(body),
        "is_edited": bool(adapter.card),
    }


@router.get(
    "adapters/{int:adapter_id}/blind/",
    response={200: BlindOut, **ERRORS},
    summary="The next sample to choose on blindly, and what was chosen so far",
)
def get_blind(request: ApiRequest, adapter_id: int) -> dict[str, Any]:
    adapter = get_object_or_404(request.team.adapters, pk=adapter_id)
    sample = blind.next_sample(adapter, request.user)
    return {
        "sample": blind.blind_pair(sample, request.user) if sample else None,
        "tally": blind.tally(adapter),
    }


@router.post(
    "adapters/{int:adapter_id}/blind/",
    response={200: ChoiceOut, **ERRORS},
    auth=may_write,
    summary="Choose the better one of two answers; the first choice counts",
)
def post_blind(request: ApiRequest, adapter_id: int, body: ChoiceBody) -> dict[str, Any]:
    adapter = get_object_or_404(request.team.adapters, pk=adapter_id)
    sample = get_object_or_404(Sample.objects.select_related("adapter__team"), adapter=adapter, pk=body.sample_id)
    choice = blind.choose(sample, request.user, body.choice, token=request.token)
    is_a = blind.adapter_is_a(request.user, sample.pk)
    return {"sample_id": sample.pk, "preferred": choice.preferred, "adapter_was": "a" if is_a else "b"}


@router.get("adapters/{int:adapter_id}/download/", response={200: bytes, **ERRORS}, summary="The adapter as a zip")
def download(request: ApiRequest, adapter_id: int) -> HttpResponseBase:
    adapter = get_object_or_404(request.team.adapters.select_related("team"), pk=adapter_id)
    return download_response(request, adapter, user=request.user, token=request.token)


class FileCheckOut(Out):
    """When an adapter's files were last read, and what was found; an empty text says that all is whole."""

    checked_at: datetime
    damage: str


@router.post(
    "adapters/{int:adapter_id}/check/",
    response={200: FileCheckOut, **ERRORS},
    auth=Token(Scope.WRITE, Role.TRAINER),
    summary="Read its files now and compare them with their checksums",
)
def check_files(request: ApiRequest, adapter_id: int) -> Any:
    adapter = get_object_or_404(request.team.adapters.select_related("team"), pk=adapter_id)
    return check_now(adapter, user=request.user, token=request.token)


@router.get("base-models/", response={200: Page[BaseModelOut], **ERRORS}, summary="The studio's base models")
def list_base_models(request: ApiRequest, filters: Query[PageQuery]) -> dict[str, Any]:
    return page_of(BaseModel.objects.all(), filters)


@router.get("base-models/{int:base_model_id}/", response={200: BaseModelDetailOut, **ERRORS}, summary="One base model")
def get_base_model(request: ApiRequest, base_model_id: int) -> BaseModel:
    return get_object_or_404(BaseModel.objects.select_related("file_check"), pk=base_model_id)


@router.post(
    "base-models/{int:base_model_id}/check/",
    response={202: BaseCheckOut, **ERRORS},
    auth=may_write,
    summary="Have a base model's files read and compared with their checksums",
)
def check_base_files(request: ApiRequest, base_model_id: int) -> Status[BaseFileCheck]:
    """It takes minutes for a large one: ask for the base model again until `asked_at` is null."""
    base = get_object_or_404(BaseModel, pk=base_model_id)
    return Status(202, ask_for_check(base, team=request.team, user=request.user, token=request.token))


@router.post(
    "base-models/",
    response={201: BaseModelDetailOut, **ERRORS},
    auth=Token(Scope.WRITE, Role.ADMIN),
    summary="Register a base model from a folder on the studio's machine",
)
def register(request: ApiRequest, body: RegisterBody) -> tuple[int, BaseModel]:
    base = register_base_model(
        folder=allowed_folder(body.folder), name=body.name, hub_id=body.hub_id, licence=body.licence, user=request.user
    )
    record(
        "base_model.registered",
        team=request.team, user=request.user, token=request.token, target=base, revision=base.revision,
    )  # fmt: skip
    return 201, base
