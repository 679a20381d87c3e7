"""What a model learns of a row: each token trained, context or cut off, as the trainer's batch has it.

Rendering and cutting are the Renderer's own, which training uses; here they are only told apart and counted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from workers.examples import AnyExample, Example, PreferenceExample, UnpairedExample

if TYPE_CHECKING:
    # The web process knows only the shape of the answer; a child process renders.
    from workers.rendering import Rendered, Renderer

TokenKind = Literal["trained", "context", "cut"]
MAX_CHARACTERS = 1_000_000
"""Characters of a row beyond which it is not rendered for display; training takes it all the same."""
WHOLE = 2**31


@dataclass(frozen=True)
class LearnedToken:
    """One token: its id, the characters that it shows, and what becomes of it.

    `text` is empty where several tokens share one character, which the first of them shows. `is_end` marks a token
    after which the model's turn is over. `weight` is what a trained token counts in the loss.
    """

    id: int
    text: str
    kind: TokenKind
    is_end: bool
    weight: float


@dataclass(frozen=True)
class Conversation:
    """A conversation as a model reads it; a preference pair is two of them, told apart by `label`.

    The counts are of the whole row, `tokens` holds its first ones. `num_cut_trained` are tokens that would carry loss
    had they not been cut off. `problem` says why training leaves it out, `end_problem` why it does not teach the model
    to end its turn; both are empty when there is nothing to say.
    """

    label: str
    tokens: list[LearnedToken]
    num_tokens: int
    num_trained: int
    num_context: int
    num_cut: int
    num_cut_trained: int
    problem: str
    end_problem: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def learned(renderer: Renderer, example: AnyExample, *, max_tokens: int) -> list[Conversation]:
    """What a base model learns of a row, with at most `max_tokens` tokens listed.

    Empty for plain text, which no chat template frames.

    Raises:
        BaseModelError: the base's chat template does something unsafe.
    """
    num = sum(_size(one) for one in example.conversations())
    if num > MAX_CHARACTERS:
        return [
            _unrendered(
                f"The row has {num:,} characters, and rows of up to {MAX_CHARACTERS:,} are shown. Training renders it "
                "all the same, and cuts it at the maximum length."
            )
        ]
    labels = _labels(example)
    return [
        _conversation(renderer, one, label, max_tokens)
        for one, label in zip(example.conversations(), labels, strict=True)
    ]


def _size(example: Example) -> int:
    calls = sum(len(call.arguments) for message in example.messages for call in message.tool_calls)
    return calls + len(example.tools) + sum(len(one.content) + len(one.reasoning) for one in example.messages)


def _labels(example: AnyExample) -> list[str]:
    if isinstance(example, PreferenceExample):
        return ["Chosen", "Rejected"]
    if isinstance(example, UnpairedExample):
        return ["Wanted answer" if example.label else "Unwanted answer"]
    return [""] if isinstance(example, Example) else []


def _unrendered(problem: str, label: str = "") -> Conversation:
    return Conversation(label, [], 0, 0, 0, 0, 0, problem, "")


def _conversation(renderer: Renderer, example: Example, label: str, max_tokens: int) -> Conversation:
    from workers.rendering import RenderingError

    try:
        kept = renderer.render(example)
        whole = renderer.with_limits(max_length=WHOLE, loss_on=renderer.loss_on).render(example)
    except RenderingError as error:
        return _unrendered(f"{error.message} {error.next_step}".strip(), label)
    num_kept, num_trained = len(kept.ids), kept.num_trained
    return Conversation(
        label=label,
        tokens=_tokens(renderer, kept, whole, max_tokens),
        num_tokens=len(whole.ids),
        num_trained=num_trained,
        num_context=num_kept - num_trained,
        num_cut=kept.num_cut,
        num_cut_trained=whole.num_trained - num_trained,
        problem=f"{kept.problem.message} {kept.problem.fix}" if kept.problem else "",
        end_problem="" if kept.problem else _end_problem(renderer, kept, whole),
    )


def _tokens(renderer: Renderer, kept: Rendered, whole: Rendered, max_tokens: int) -> list[LearnedToken]:
    found: list[LearnedToken] = []
    shown = 0
    for index, token_id in enumerate(whole.ids[:max_tokens]):
        start, end = whole.offsets[index]
        # Tokens of one character (an emoji in bytes) share its place: the first of them shows it.
        text = whole.text[max(start, shown) : end]
        shown = max(shown, end)
        is_cut = index >= len(kept.ids)
        # The first token is predicted by nothing, so no batch trains it.
        is_trained = not is_cut and index > 0 and kept.trained[index]
        found.append(
            LearnedToken(
                id=token_id,
                text=text,
                kind="cut" if is_cut else "trained" if is_trained else "context",
                is_end=token_id in renderer.stop_ids,
                weight=kept.weights[index] if is_trained and kept.weights else 1.0,
            )
        )
    return found


def _end_problem(renderer: Renderer, kept: Rendered, whole: Rendered) -> str:
    """Why the row does not teach the model to end its turn; empty when it does."""
    if _ends_turn(renderer, kept):
        return ""
    if kept.num_cut and _ends_turn(renderer, whole):
        return (
            f"The end of the last learned turn lies behind token {renderer.max_length}, where the row is cut, so this "
            "row does not teach the model to stop. Raise the maximum length, or shorten the row."
        )
    stops = ", ".join(renderer.stop_tokens()) or "no token at all"
    return (
        f"The last learned turn does not end in an end-of-turn token (this base stops at {stops}). An adapter that "
        "learns from such rows never stops by itself. Choose a base whose chat template ends each answer with its "
        "end-of-turn token."
    )


def _ends_turn(renderer: Renderer, rendered: Rendered) -> bool:
    """Whether the last trained token, but for white space behind it, is one that ends a turn."""
    for index in range(len(rendered.ids) - 1, 0, -1):
        if not rendered.trained[index]:
            continue
        if rendered.ids[index] in renderer.stop_ids:
            return True
        start, end = rendered.offsets[index]
        if rendered.text[start:end].strip():
            return False
    return False
