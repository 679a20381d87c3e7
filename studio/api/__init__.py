"""What REST endpoints share: tokens, errors and paging.

An app's router lives in its own `api.py` and is named as a string in `settings.API_ROUTERS`. All are mounted at
`/api/v1/`, so a router names its whole path. This is all that one needs:

    from ninja import Query, Router
    from pydantic import Field

    from studio.api.auth import ApiRequest, may_write
    from studio.api.errors import ERRORS
    from studio.api.paging import Page, PageQuery, page_of
    from studio.api.schemas import Body, Out

    router = Router(tags=["datasets"])

    class DatasetOut(Out):
        id: int
        name: str

    class DatasetFilters(PageQuery):            # a field that is not declared here is refused by name
        name: str = Field("", max_length=120)

    @router.get("datasets/", response={200: Page[DatasetOut], **ERRORS})
    def list_datasets(request: ApiRequest, filters: Query[DatasetFilters]):
        return page_of(request.team.datasets.filter(name__icontains=filters.name), filters)

    @router.get("datasets/{int:dataset_id}/", response={200: DatasetOut, **ERRORS})
    def get_dataset(request: ApiRequest, dataset_id: int):
        return get_object_or_404(request.team.datasets, pk=dataset_id)

    @router.patch("datasets/{int:dataset_id}/", response={200: DatasetOut, **ERRORS}, auth=may_write)
    def rename_dataset(request: ApiRequest, dataset_id: int, body: RenameBody):   # class RenameBody(Body)
        ...                                      # raise ExplainedError, StorageError, Http404 or ApiError

Reading is allowed to every token (`may_read` is the API's default); what changes anything says `auth=may_write`,
or `Token(Scope.WRITE, Role.ADMIN)`. `request.team`, `request.user`, `request.membership` and `request.token` are set.
"""
