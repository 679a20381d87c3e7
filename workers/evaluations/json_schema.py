"""JSON schema: whether an answer is JSON of the form that a program downstream will accept."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import jsonschema
import orjson
from jsonschema.validators import validator_for
from pydantic import Field, field_validator
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012, EMPTY_REGISTRY
from referencing.jsonschema import specification_with as _by_id

from workers.evaluations import MeanEvaluation, MetricSettings, RowValue, ScoredRow
from workers.patterns import compile_pattern, storable

MAX_CHARACTERS = 20_000
MAX_FOLLOWED = 10_000
"""References that checking one answer follows at most: definitions that name each other twice grow without end."""
_num_followed: ContextVar[list[int]] = ContextVar("num_followed")
_DRAFTS = (
    jsonschema.Draft6Validator,
    jsonschema.Draft7Validator,
    jsonschema.Draft201909Validator,
    jsonschema.Draft202012Validator,
)
_REFUSED = {
    "$id": "Leave it out: everything that is referred to stands in the schema itself",
    "$dynamicRef": "Use $ref",
    "$recursiveRef": "Use $ref",
    "patternProperties": "Name the properties, or use propertyNames with a pattern",
}


class JsonSchemaSettings(MetricSettings):
    """The schema that answers are held to."""

    definition: str = Field(
        "",
        max_length=MAX_CHARACTERS,
        title="JSON schema",
        description="An answer counts when the whole of it is JSON that this schema accepts (JSON Schema 2020-12, or "
        "the draft that its $schema names). References stay within it: nothing is fetched. Patterns are RE2's.",
        json_schema_extra={"source": "none: every task has its own", "is_long": True},
    )

    @field_validator("definition")
    @classmethod
    def _is_schema(cls, text: str) -> str:
        _validator(text)
        return text


class JsonSchema(MeanEvaluation):
    name = "json_schema"
    label = "JSON schema"
    help = (
        "Share of generated answers that are JSON and nothing else, and that a JSON schema of yours accepts. Every "
        "generated answer counts, whatever its reference is."
    )
    higher_is_better = True
    needs = "answer"
    smallest_effect = 0.05
    bounds = (0.0, 1.0)
    Settings = JsonSchemaSettings

    def described(self) -> str:
        """The schema's title, else nothing."""
        schema = orjson.loads(self.settings.definition)
        return str(schema.get("title", "")) if isinstance(schema, dict) else ""

    def row_value(self, row: ScoredRow) -> RowValue:
        """1 for an answer that the schema accepts, else 0."""
        try:
            answer = orjson.loads(row.answer or "")
        except orjson.JSONDecodeError:
            return RowValue(0.0)
        return RowValue(float(_accepts(_validator(self.settings.definition), answer)))


class _TooDeep(Exception):  # noqa: N818 - an outcome: the answer is not accepted
    """References were followed more often than any sensible schema asks for."""


@lru_cache(maxsize=64)
def _validator(text: str) -> Any:
    """A validator that fetches nothing and ends in time; raises ValueError for what is no schema of that kind."""
    if not text.strip():
        raise ValueError("Write a JSON schema")
    try:
        schema = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"The schema is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ValueError('A JSON schema is an object, as in {"type": "object"}')
    standard = validator_for(schema, default=jsonschema.Draft202012Validator)
    if schema.get("$schema") and standard not in _DRAFTS:
        raise ValueError("Its $schema names none of the drafts 6, 7, 2019-09 and 2020-12")
    try:
        standard.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"This is no valid JSON schema: {error.message[:200]}") from error
    for part in _parts(schema):
        for word, remedy in _REFUSED.items():
            if word in part:
                raise ValueError(f"The schema uses {word}. {remedy}")
        if isinstance(part.get("pattern"), str):
            compile_pattern(part["pattern"])
        if isinstance(part.get("$ref"), str):
            _check_reference(part["$ref"], schema)
    extended = jsonschema.validators.extend(standard, {"pattern": _pattern, "$ref": _reference(standard)})
    return extended(schema, registry=EMPTY_REGISTRY)


def _accepts(validator: Any, answer: object) -> bool:
    token = _num_followed.set([0])
    try:
        return bool(validator.is_valid(answer))
    except (_TooDeep, RecursionError):
        return False
    finally:
        _num_followed.reset(token)


def _parts(value: object) -> Iterator[dict[str, Any]]:
    """Every object of a schema, itself first."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield one
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _check_reference(reference: str, schema: dict[str, Any]) -> None:
    if not reference.startswith("#"):
        raise ValueError(f"The schema refers to {reference[:80]}, which would be fetched. Put it under $defs")
    try:
        specification = _by_id(str(schema.get("$schema", "")), default=DRAFT202012)
        EMPTY_REGISTRY.resolver_with_root(specification.create_resource(schema)).lookup(reference)
    except Unresolvable as error:
        raise ValueError(f"The schema refers to {reference[:80]}, which is not in it") from error


def _pattern(validator: Any, pattern: str, instance: object, schema: object) -> Iterator[Any]:
    if isinstance(instance, str) and compile_pattern(pattern).search(storable(instance)) is None:
        yield jsonschema.ValidationError("the text does not have the pattern")


def _reference(standard: Any) -> Any:
    usual = standard.VALIDATORS["$ref"]

    def follow(validator: Any, reference: str, instance: object, schema: object) -> Any:
        counter = _num_followed.get()
        counter[0] += 1
        if counter[0] > MAX_FOLLOWED:
            raise _TooDeep
        return usual(validator, reference, instance, schema)

    return follow


PLUGIN = JsonSchema()
