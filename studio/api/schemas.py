"""The base classes of what goes in and out."""

from __future__ import annotations

from typing import Any, Self

from ninja import Schema
from pydantic import BaseModel, ConfigDict, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from workers.texts import find_unstorable

# Each endpoint's models are built when it is first called: all of them together take 15 MiB, and a web process calls
# few of them. On ninja's own class, because it wraps every answer in one of that kind.
Schema.model_config["defer_build"] = True


class Out(Schema):
    """What an endpoint answers; reads from model instances and from dicts."""


class Body(BaseModel):
    """A JSON body. A field that it does not declare is refused, so that a typing error never passes in silence."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def refuse_unstorable_text(cls, data: Any) -> Any:
        _refuse_unstorable(data)
        return data


def _refuse_unstorable(data: Any) -> None:
    if (found := find_unstorable(data)) is not None:
        raise PydanticCustomError("unstorable_text", "{sentence}", {"sentence": found.sentence(), "name": found.field})


class QueryFields(BaseModel):
    """The fields of a URL's query; others are refused by name. One per endpoint, as `filters: Query[MyFilters]`."""

    @model_validator(mode="wrap")
    @classmethod
    def refuse_unknown_fields(cls, data: Any, handler: Any, info: ValidationInfo) -> Self:
        # The framework hands over the declared fields alone, so the request itself is asked.
        request = (info.context or {}).get("request")
        unknown = sorted(set(request.GET) - set(cls.model_fields)) if request is not None else []
        if unknown:
            raise PydanticCustomError(
                "unknown_field",
                'There is no field "{name}" here. The fields are: {known}.',
                {"name": unknown[0], "known": ", ".join(cls.model_fields)},
            )
        if request is not None:
            _refuse_unstorable({name: "".join(values) for name, values in request.GET.lists()})
        result: Self = handler(data)
        return result
