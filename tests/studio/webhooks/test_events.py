"""What a webhook can be told of is what the studio records: no kind of event is forgotten, and none is made up."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from studio.webhooks.managing import EVENTS, UNTOLD

ROOT = Path(__file__).resolve().parent.parent.parent.parent
RECORDING = {"record", "_record", "_tell_end"}


def texts(node: ast.expr, tree: ast.Module) -> Iterator[str]:
    """The texts that an argument may be: itself, both sides of a condition, or what its name is set to."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body, tree)
        yield from texts(node.orelse, tree)
    elif isinstance(node, ast.JoinedStr):
        raise AssertionError(f"line {node.lineno}: name audit events in full, so that they can be found")
    elif isinstance(node, ast.Name):
        for one in ast.walk(tree):
            if isinstance(one, ast.Assign) and any(isinstance(t, ast.Name) and t.id == node.id for t in one.targets):
                yield from texts(one.value, tree)


def recorded() -> set[str]:
    """Every action of an audit event in the source."""
    found: set[str] = set()
    for folder in ("studio", "jobs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text("utf-8"))
            for node in ast.walk(tree):
                name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
                if name in RECORDING and isinstance(node, ast.Call):
                    found.update(text for one in node.args for text in texts(one, tree))
    return found


def test_the_source_is_read_as_it_is_written() -> None:
    known = {"job.succeeded", "dataset.uploaded", "review.thread_resolved", "worker.drained", "webhook.switched_on"}
    assert known <= recorded()


def test_every_kind_of_audit_event_is_offered_or_said_to_be_untold() -> None:
    kinds = {action.partition(".")[0] for action in recorded()}
    offered = {name.removesuffix(".*") for name in EVENTS if name.endswith(".*")}
    assert kinds - offered - set(UNTOLD) == set(), "offer them in managing.EVENTS, or say in UNTOLD why not"
    assert offered & set(UNTOLD) == set()
    assert (offered | set(UNTOLD)) - kinds == set(), "nothing records them"


def test_every_single_event_that_is_offered_is_recorded_somewhere() -> None:
    assert {name for name in EVENTS if not name.endswith(".*")} - recorded() == set()
