"""An example through a base model's own chat template: token ids, which of them carry loss, and what was cut.

Light on purpose (tokenizers and jinja2 only): the preview in the browser and training share this path, so what a
person sees is what the model reads. The Jinja environment is that of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from workers.errors import BaseModelError, DatasetError
from workers.examples import Example, Message, Problem, ToolCall

LossOn = Literal["assistant", "all"]

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if add_generation_prompt or not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
)
"""For a base without a chat template: the turns' contents joined by newlines, the end-of-text token after each
assistant turn. It is itself a chat template, so whoever runs the adapter can set it and get the same ids."""

# Private-use characters that frame what must not be lost sight of while the template works on strings. They are
# removed from the contents first, so nobody can forge them.
TEXT_START, TEXT_END = "\U000f0000", "\U000f0001"  # a control token that somebody wrote into a content
TRAINED_START, TRAINED_END = "\U000f0002", "\U000f0003"  # a {% generation %} block
_MARKS = re.compile(f"[{TEXT_START}{TEXT_END}{TRAINED_START}{TRAINED_END}]")
_HAS_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class RenderingError(DatasetError):
    """A row that the base's chat template refuses, or whose assistant turns cannot be told apart in its output."""

    code = "unrenderable_row"

    def __init__(self, rule: str, message: str, *, next_step: str = "", line: int | None = None) -> None:
        super().__init__(message, next_step=next_step, line=line)
        self.rule = rule


@dataclass(frozen=True)
class Rendered:
    """One row as the model reads it.

    `ids`, `trained` and `offsets` have one entry per token that is left after cutting; `trained` says whether the
    token carries loss; `offsets` are character ranges in `text`, which is not cut. `num_cut` counts tokens removed
    from the right. `problem` is set when the row cannot be used for training. `weights` says what each token counts
    in the training loss, and is None where each counts 1; evaluation does not use it.
    """

    ids: list[int]
    trained: list[bool]
    text: str
    num_cut: int
    offsets: list[tuple[int, int]]
    problem: Problem | None = field(default=None, compare=False)
    weights: list[float] | None = None

    @property
    def num_trained(self) -> int:
        """Tokens that carry loss; the first token of a row cannot, because nothing predicts it."""
        return sum(self.trained[1:])


class _GenerationTag(jinja2.ext.Extension):
    """Frames what `{% generation %}` encloses with marks, and leaves the text as it is."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_frame"), [], [], body).set_lineno(line)

    def _frame(self, caller: Callable[[], str]) -> str:
        return f"{TRAINED_START}{caller()}{TRAINED_END}"


class _Namespace(jinja2.utils.Namespace):
    """A namespace that takes no underscore names: those lead to CPython's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"A chat template cannot store {name!r} in a namespace.")


class _Dict:
    """`dict(...)` for templates, without the attributes of the real class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


def compile_template(source: str) -> jinja2.Template:
    """A chat template in the sandbox that transformers uses; raises jinja2.TemplateError."""

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment.from_string(source)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path.name} of the base model cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise BaseModelError(f"{path.name} of the base model must hold a JSON object.")
    return value


def _token_text(value: Any) -> str | None:
    """A special token's text: configurations write it as a string or as {"content": ...}."""
    return value if isinstance(value, str) else value.get("content") if isinstance(value, Mapping) else None


def read_chat_template(folder: Path) -> str | None:
    """The base's chat template from chat_template.jinja or tokenizer_config.json; None when it has none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BaseModelError(f"chat_template.jinja of the base model cannot be read: {error}.") from error
    found = _read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several by name, the older way
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


class Renderer:
    """Renders examples for one base model folder.

    Args:
        folder: the base model's folder with tokenizer.json and its configuration files.
        max_length: tokens that a row keeps; the rest is cut from the right.
        loss_on: "assistant" trains the assistant's turns with their end-of-turn token, "all" trains every token.

    Raises:
        BaseModelError: the folder has no readable tokenizer.json, or its chat template is not valid Jinja.
    """

    def __init__(self, folder: Path, *, max_length: int, loss_on: LossOn) -> None:
        self.max_length = max_length
        self.loss_on: LossOn = loss_on
        self._tokenizer = self._load_tokenizer(folder)
        self._as_text = self._load_tokenizer(folder)
        self._as_text.encode_special_tokens = True  # special tokens are then read as ordinary text
        self.special_tokens = self._special_tokens(folder)
        own = read_chat_template(folder)
        self.has_chat_template = own is not None
        self.template = own if own is not None else self._plain_template()
        try:
            self._template = compile_template(self.template)
        except jinja2.TemplateError as error:
            raise BaseModelError(f"The base model's chat template is not valid: {error}.") from error
        self._has_generation_tag = _HAS_GENERATION_TAG.search(self.template) is not None
        added = self._tokenizer.get_added_tokens_decoder()
        self._controls = {token.content: token_id for token_id, token in added.items() if token.special}
        for text in self.special_tokens.values():
            if (token_id := self._tokenizer.token_to_id(text)) is not None:
                self._controls[text] = token_id
        longest_first = sorted(self._controls, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._newline = self._tokenizer.encode("\n", add_special_tokens=False).ids
        self.stop_ids: tuple[int, ...] = self._find_stop_ids(folder)
        """Ids after which the model's turn is over: what generation stops at."""
        self._stops = [text for text, token_id in self._controls.items() if token_id in self.stop_ids]

    # --- what people and training ask for ------------------------------------------------------------------------

    def render(self, example: Example) -> Rendered:
        """The example as ids with their loss; raises RenderingError when the template cannot take it."""
        marked = self._apply(example.messages, line=example.line, tools=example.tools)
        text, as_text, blocks = self._unmark(marked)
        self._check_nothing_lost(example, text)
        ids, offsets = self._encode(text, as_text)
        spans = self._trained_spans(example, text, as_text, blocks)
        if self.loss_on == "all":
            trained = [not _overlaps(offset, spans) for offset in offsets]
        else:
            trained = [_overlaps(offset, spans) for offset in offsets]
        num_trained = sum(trained[1:])
        rendered = Rendered(
            ids=ids[: self.max_length],
            trained=trained[: self.max_length],
            text=text,
            num_cut=max(0, len(ids) - self.max_length),
            offsets=offsets[: self.max_length],
            weights=self._weights(example, text, as_text, blocks, offsets[: self.max_length]),
        )
        if rendered.num_trained:
            return rendered
        if num_trained:
            message = (
                f"The row has {len(ids)} tokens and everything that could be learned lies behind token "
                f"{self.max_length}, where it is cut."
            )
            fix = "Raise the maximum length, or shorten what comes before the answer."
        else:
            message = "No turn of the row is marked for training, so there is nothing to learn."
            fix = "Train at least one assistant turn, or remove the row."
        problem = Problem(rule="no_trainable_tokens", message=message, fix=fix, line=example.line)
        return replace(rendered, problem=problem)

    def try_render(self, example: Example) -> Rendered | Problem:
        """The example rendered, or why it cannot be trained on."""
        try:
            rendered = self.render(example)
        except RenderingError as error:
            return Problem(rule=error.rule, message=error.message, fix=error.next_step, line=example.line)
        return rendered.problem or rendered

    def prompt_text(self, example: Example) -> str:
        """What the model is given before it answers in the last assistant turn."""
        return self._unmark(self._apply_prompt(example))[0]

    def prompt_ids(self, example: Example) -> list[int]:
        """Ids of everything before the last assistant turn, and the generation prompt."""
        text, as_text, _ = self._unmark(self._apply_prompt(example))
        return self._encode(text, as_text)[0]

    def option_ids(self, example: Example, option: str) -> tuple[list[int], int]:
        """Ids of the prompt with an option behind it, and how many of them come before what the option is scored by.

        White space that ends the prompt counts with the option, for it may be one token with the option's beginning;
        the end of the turn is left out. Both as in the evaluation harness (lm-eval 0.4, `_encode_pair`).
        """
        text, as_text, _ = self._unmark(self._apply_prompt(example))
        before = text.rstrip()
        clipped = [(min(start, len(before)), min(end, len(before))) for start, end in as_text]
        marked = self._mark(option)
        option_text, option_as_text, _ = self._unmark(marked)
        behind = [(start + len(text), end + len(text)) for start, end in option_as_text]
        ids = self._encode(text + option_text, [*as_text, *behind])[0]
        return ids, len(self._encode(before, clipped)[0])

    def reference(self, example: Example) -> str:
        """Content of the last assistant turn: what an answer is compared with."""
        return example.messages[_last_assistant(example)].content

    def count(self, text: str) -> int:
        """Tokens in a text without any template."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def with_limits(self, *, max_length: int, loss_on: LossOn) -> Renderer:
        """The same base with another cut and another loss; shares the tokenizer, which takes long to read."""
        other = copy(self)
        other.max_length, other.loss_on = max_length, loss_on
        return other

    def stop_tokens(self) -> list[str]:
        """Texts of the tokens after which the model's turn is over."""
        return [text for one in self.stop_ids if (text := self._tokenizer.id_to_token(one)) is not None]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    # --- the folder ----------------------------------------------------------------------------------------------

    @staticmethod
    def _load_tokenizer(folder: Path) -> Tokenizer:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BaseModelError(
                "The base model's folder has no tokenizer.json.",
                next_step="Save the model's fast tokenizer into it with AutoTokenizer's save_pretrained.",
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise BaseModelError(f"tokenizer.json of the base model cannot be read: {error}.") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _special_tokens(self, folder: Path) -> dict[str, str]:
        """bos_token, eos_token and so on, as the template's variables."""
        config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
        found = {name: text for name in _TOKEN_NAMES if (text := _token_text(config.get(name)))}
        model = _read_json(folder / "config.json")
        for name in ("bos_token", "eos_token"):
            if name in found:
                continue
            token_id = model.get(f"{name}_id")
            token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
            if isinstance(token_id, int) and (text := self._tokenizer.id_to_token(token_id)):
                found[name] = text
        return found

    def _plain_template(self) -> str:
        if "eos_token" not in self.special_tokens:
            raise BaseModelError(
                "The base model has neither a chat template nor an end-of-text token, so a turn could never end.",
                next_step="Add a chat_template.jinja, or an eos_token to tokenizer_config.json.",
            )
        first = self._tokenizer.encode("").ids
        bos = self.special_tokens.get("bos_token")
        if first and bos is not None and first[0] == self._tokenizer.token_to_id(bos):
            return "{{ bos_token }}" + PLAIN_TEMPLATE
        return PLAIN_TEMPLATE

    def _find_stop_ids(self, folder: Path) -> tuple[int, ...]:
        """eos by the tokenizer and by the generation settings, and the token that ends a turn in the template."""
        found: list[int] = []
        if (eos := self.special_tokens.get("eos_token")) is not None and eos in self._controls:
            found.append(self._controls[eos])
        for name in ("generation_config.json", "config.json"):
            value = _read_json(folder / name).get("eos_token_id")
            found += [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)]
        probe = (Message("user", "question"), Message("assistant", "answer"))
        try:
            text = self._unmark(self._apply(probe, line=None))[0]
        except RenderingError:
            text = ""  # a template that refuses a plain exchange is reported with the first row
        after = self._control_pattern.search(text, text.rfind("answer") + 1) if "answer" in text else None
        if after is not None:
            found.append(self._controls[after.group()])
        return tuple(dict.fromkeys(found))

    # --- the template --------------------------------------------------------------------------------------------

    def _mark(self, content: str) -> str:
        """Frames control tokens inside a content, so that they are read as the text that they are."""
        clean = _MARKS.sub("", content)
        return self._control_pattern.sub(lambda found: f"{TEXT_START}{found.group()}{TEXT_END}", clean)

    def _mark_within(self, value: Any) -> Any:
        """`_mark` for every text inside a value of JSON."""
        if isinstance(value, str):
            return self._mark(value)
        if isinstance(value, list):
            return [self._mark_within(child) for child in value]
        if isinstance(value, dict):
            return {self._mark(key): self._mark_within(child) for key, child in value.items()}
        return value

    def _turn(self, message: Message, *, as_objects: bool) -> dict[str, Any]:
        """A message as templates take it; arguments of calls as objects, or as the text that some templates want."""
        turn: dict[str, Any] = {"role": message.role, "content": self._mark(message.content)}
        if message.reasoning:
            turn["reasoning_content"] = self._mark(message.reasoning)
        for name in ("tool_call_id", "name"):
            if value := getattr(message, name):
                turn[name] = self._mark(value)
        if message.tool_calls:
            turn["tool_calls"] = [
                {
                    "type": "function",
                    "function": {
                        "name": self._mark(call.name),
                        "arguments": self._mark_within(json.loads(call.arguments))
                        if as_objects
                        else self._mark(call.arguments),
                    },
                    **({"id": self._mark(call.id)} if call.id else {}),
                }
                for call in message.tool_calls
            ]
        return turn

    def _apply(
        self, messages: Sequence[Message], *, line: int | None, for_answer: bool = False, tools: str = "",
        as_objects: bool | None = None,
    ) -> str:  # fmt: skip
        calls = any(message.tool_calls for message in messages)
        as_objects = (not calls or self._takes_objects) if as_objects is None else as_objects
        turns = [self._turn(message, as_objects=as_objects) for message in messages]
        definitions = self._mark_within(json.loads(tools)) if tools else None
        try:
            return self._template.render(
                messages=turns, tools=definitions, documents=None, add_generation_prompt=for_answer,
                **self.special_tokens,
            )  # fmt: skip
        except jinja2.exceptions.SecurityError as error:
            raise BaseModelError(f"The base model's chat template does something unsafe: {error}.") from error
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise RenderingError(
                "template_refused",
                f"The base model's chat template refuses this conversation: {error}.",
                next_step="Check the order of the roles; some models take no system turn or want user and assistant "
                "to alternate.",
                line=line,
            ) from error

    @cached_property
    def _takes_objects(self) -> bool:
        """Whether the template writes a call's arguments itself, from an object; else it wants them as JSON text.

        transformers asks for objects, which templates write with `tojson`; a few join the text of them instead, and
        then write an object as Python does.
        """
        call = ToolCall("probe_function", '{"probe_key": "probe_value"}', "call00001")
        tools = '[{"type": "function", "function": {"name": "probe_function", "description": "", "parameters": {}}}]'
        probe = (Message("user", "question"), Message("assistant", "", tool_calls=(call,)))
        for as_objects in (True, False):
            try:
                text = self._unmark(self._apply(probe, line=None, tools=tools, as_objects=as_objects))[0]
            except RenderingError:
                continue
            written = text[text.rfind("probe_function") :]
            if "probe_key" in written and "'probe_key'" not in written:
                return as_objects
        return True

    def _check_nothing_lost(self, example: Example, text: str) -> None:
        """Refuse a row of which the template leaves something out that is to be learned or answered from."""
        names = [call.name for message in example.messages for call in message.tool_calls]
        if example.tools:
            names += [tool["function"]["name"] for tool in json.loads(example.tools)]
        lost = next((name for name in names if _MARKS.sub("", name) not in text), None)
        if lost is not None:
            raise RenderingError(
                "template_without_tools",
                f'The base model\'s chat template does not write the tool "{lost}" of this row, so it would be lost.',
                next_step="Choose a base model whose chat template knows tools, or write calls as the turns' text.",
                line=example.line,
            )
        reasoning = example.messages[_last_assistant(example)].reasoning
        if reasoning and _MARKS.sub("", reasoning).strip() not in text:
            raise RenderingError(
                "template_without_reasoning",
                "The base model's chat template does not write the reasoning of this row's answer, so it would be "
                "lost.",
                next_step="Choose a base model whose chat template knows reasoning, or write it in the turn's text.",
                line=example.line,
            )

    def _apply_prompt(self, example: Example) -> str:
        before = example.messages[: _last_assistant(example)]
        if not before:
            return self.special_tokens.get("bos_token", "") if self._begins_with_bos(example) else ""
        return self._apply(before, line=example.line, for_answer=True, tools=example.tools)

    def _begins_with_bos(self, example: Example) -> bool:
        bos = self.special_tokens.get("bos_token")
        return bos is not None and self._apply(example.messages, line=example.line, tools=example.tools).startswith(bos)

    def _trained_spans(
        self, example: Example, text: str, as_text: list[tuple[int, int]], blocks: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Character ranges: with loss_on "assistant" those that are trained, with "all" those that are not."""
        turns = [index for index, message in enumerate(example.messages) if message.role == "assistant"]
        if self.loss_on == "all":
            wanted = [index for index in turns if example.messages[index].train is False]
        else:
            wanted = [index for index in turns if example.messages[index].train is not False]
        if self._has_generation_tag and len(wanted) == len(turns) != len(blocks) and blocks:
            return blocks
        return self._spans_of(example, wanted, text, as_text, blocks)

    def _spans_of(
        self,
        example: Example,
        wanted: list[int],
        text: str,
        as_text: list[tuple[int, int]],
        blocks: list[tuple[int, int]],
    ) -> list[tuple[int, int]]:
        """Where each of the wanted assistant turns stands in the rendered text."""
        turns = [index for index, message in enumerate(example.messages) if message.role == "assistant"]
        if self._has_generation_tag and len(blocks) == len(turns):
            chosen = dict(zip(turns, blocks, strict=True))
            return [chosen[index] for index in wanted]
        return [self._turn_span(example, index, text, as_text) for index in wanted]

    def _weights(
        self,
        example: Example,
        text: str,
        as_text: list[tuple[int, int]],
        blocks: list[tuple[int, int]],
        offsets: list[tuple[int, int]],
    ) -> list[float] | None:
        """What each token counts in the training loss; None when no learned turn has a weight of its own."""
        weighted = [
            index
            for index, message in enumerate(example.messages)
            if message.role == "assistant" and message.train is not False and message.weight != 1.0
        ]
        if not weighted:
            return None
        found = [1.0] * len(offsets)
        spans = self._spans_of(example, weighted, text, as_text, blocks)
        for index, span in zip(weighted, spans, strict=True):
            for token, offset in enumerate(offsets):
                if _overlaps(offset, [span]):
                    found[token] = example.messages[index].weight
        return found

    def _turn_span(self, example: Example, index: int, text: str, as_text: list[tuple[int, int]]) -> tuple[int, int]:
        """Where an assistant's turn stands in the rendered text, its end-of-turn token included."""
        if index == 0:
            start = self._first_content(example, text)
        else:
            before = self._apply(example.messages[:index], line=example.line, for_answer=True, tools=example.tools)
            prompt = self._unmark(before)[0]
            if not text.startswith(prompt):
                raise self._not_a_prefix(example)
            start = len(prompt)
        # The turn is over at its first end-of-turn token that the template wrote itself. One that calls tools may end
        # with a token of its own, which is no stop: it is over where the next turn begins at the latest.
        end = len(text)
        if example.messages[index].tool_calls:
            until = self._unmark(
                self._apply(example.messages[: index + 1], line=example.line, tools=example.tools)
            )[0]  # fmt: skip
            end = len(until) if text.startswith(until) and len(until) > start else end
        for stop in self._control_pattern.finditer(text, start, end):
            if stop.group() in self._stops and not any(a <= stop.start() < b for a, b in as_text):
                return start, stop.end()
        until = self._unmark(self._apply(example.messages[: index + 1], line=example.line, tools=example.tools))[0]
        if not text.startswith(until) or len(until) <= start:
            raise self._not_a_prefix(example)
        return start, len(until)

    def _first_content(self, example: Example, text: str) -> int:
        """Where a conversation that begins with the assistant has its first content."""
        found = text.find(_MARKS.sub("", example.messages[0].content).strip())
        if found < 0:
            raise self._not_a_prefix(example)
        return found

    @staticmethod
    def _not_a_prefix(example: Example) -> RenderingError:
        return RenderingError(
            "template_not_prefix",
            "The base model's chat template writes earlier turns differently once later ones follow, so the "
            "assistant's turns cannot be told apart in this row.",
            next_step='Use a template with {% generation %} tags, train only the last turn, or choose loss on "all".',
            line=example.line,
        )

    # --- ids -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _unmark(marked: str) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
        """The text without marks, the ranges to be read as plain text, and the ranges of {% generation %} blocks.

        A template may tear a pair of marks apart; a lone mark leaves an empty range, which still separates the text
        on its two sides, so that they cannot join into a control token.
        """
        if _MARKS.search(marked) is None:
            return marked, [], []
        pieces: list[str] = []
        length = last = 0
        as_text: list[tuple[int, int]] = []
        blocks: list[tuple[int, int]] = []
        opened: int | None = None
        block_start: int | None = None
        for found in _MARKS.finditer(marked):
            piece = marked[last : found.start()]
            pieces.append(piece)
            length += len(piece)
            last = found.end()
            if found.group() == TEXT_START:
                if opened is not None:
                    as_text.append((opened, opened))
                opened = length
            elif found.group() == TEXT_END:
                as_text.append((opened if opened is not None else length, length))
                opened = None
            elif found.group() == TRAINED_START:
                block_start = length
            elif block_start is not None:
                blocks.append((block_start, length))
                block_start = None
        if opened is not None:
            as_text.append((opened, opened))
        pieces.append(marked[last:])
        return "".join(pieces), as_text, blocks

    def _encode(self, text: str, as_text: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets; the ranges in `as_text` never become control tokens."""
        if not as_text:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for start, end in [*as_text, (len(text), len(text))]:
            for begin, until, tokenizer in ((at, start, self._tokenizer), (start, end, self._as_text)):
                if begin == until:
                    continue
                piece_ids, piece_offsets = self._encode_piece(tokenizer, text[begin:until], is_first=begin == 0)
                if tokenizer is self._as_text and any(token_id in self._controls.values() for token_id in piece_ids):
                    raise RenderingError(
                        "control_token_in_text",
                        f'The text contains "{text[begin:until]}", which this base always reads as a control token.',
                        next_step="Remove it from the row.",
                    )
                ids += piece_ids
                offsets += [(a + begin, b + begin) for a, b in piece_offsets]
            at = end
        return ids, offsets

    def _encode_piece(
        self, tokenizer: Tokenizer, piece: str, *, is_first: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a piece inside a text. Behind a newline, which is then taken off: some tokenizers put a space before
        whatever begins a string."""
        if not is_first:
            encoding = tokenizer.encode("\n" + piece, add_special_tokens=False)
            skip = len(self._newline)
            if encoding.ids[:skip] == self._newline:
                return encoding.ids[skip:], [(max(0, a - 1), b - 1) for a, b in encoding.offsets[skip:]]
        encoding = tokenizer.encode(piece, add_special_tokens=False)
        return encoding.ids, encoding.offsets


def _overlaps(offset: tuple[int, int], spans: list[tuple[int, int]]) -> bool:
    start, end = offset
    return any(start < until and (end > begin or start == end >= begin) for begin, until in spans)


def _last_assistant(example: Example) -> int:
    return max(index for index, message in enumerate(example.messages) if message.role == "assistant")
