"""The catalogue of rules that dataset rows are held to: a stable code, a title, a level and what helps.

F: the file and its rows; C: conversations; P: preference pairs; K: answers with a verdict; T: tokens; Q: quality;
S: the dataset as a whole. An error sets its row aside; a warning leaves it usable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Rule:
    """One rule. `repair` says what a corrected version does about it; empty where only a person can decide."""

    code: str
    title: str
    level: Level
    fix: str
    repair: str = ""


_E: Level = "error"
_W: Level = "warning"

CATALOGUE: dict[str, Rule] = {
    rule.code: rule
    for rule in (
        Rule("F001", "Not UTF-8", _E, "Save the file as UTF-8.", "Bytes are read as Windows-1252."),
        Rule("F002", "Broken JSON", _E, "Write rows with a JSON library.",
             "Trailing commas are removed, single quotes and Python's None, True and False become JSON."),
        Rule("F003", "Not an object", _E, "Write each row as an object with named fields.",
             "A list of turns becomes a row of messages; an object written as text is unpacked."),
        Rule("F004", "The same key twice", _E, "Keep one of the two.", "Equal values are joined."),
        Rule("F005", "Characters that cannot be stored", _E, "Remove them.", "NUL characters are removed."),
        Rule("F006", "NaN or Infinity", _E, "Write null or leave the field out.", "They become null."),
        Rule("F007", "Nested too deeply", _E, "Flatten the row."),
        Rule("F008", "Number too long", _E, "Put it in quotes when it is a name or an identifier."),
        Rule("F009", "Row too long", _E, "Split texts that are longer than any context."),
        Rule("F010", "Fields are missing", _E, "Add what is missing, or choose other columns."),
        Rule("F011", "A row of another format", _E, "Upload each format as a file of its own."),
        Rule("F013", "Text that was decoded wrongly", _W, "Write the file as UTF-8 once.",
             "The text is decoded again."),
        Rule("F014", "Replacement characters", _W, "Export the text again from where it is whole."),
        Rule("F015", "Control characters in a text", _W, "Remove them.", "Control characters are removed."),
        Rule("F016", "A structure written as text", _E, "Write it as JSON, not as text that holds JSON.",
             "The text is unpacked."),
        Rule("F020", "Wrong number of cells", _E, "Quote cells that hold the delimiter."),
        Rule("F021", "Broken quotes", _E, "Write the file with a CSV library."),
        Rule("F022", "Cell too long", _E, "Split texts that are longer than any context."),
        Rule("C101", "Unknown role", _E, "Use system, user, assistant or tool.",
             "A role that differs from a known one in a letter or two is corrected."),
        Rule("C102", "Missing, empty or non-text content", _E, "Fill it in, or remove the row."),
        Rule("C103", "No reply to learn from", _E, "Add the reply, or remove the row."),
        Rule("C104", "Unusual order of turns", _W, "Join turns of one role; begin with the user."),
        Rule("C105", "System message is not first", _W, "Put it first, once."),
        Rule("C106", "Unusable weight", _E, "Write 0 or 1.", 'Weights written as text ("1") become numbers.'),
        Rule("C107", "Unusable tool calls", _E, "Give each call a function's name and its arguments."),
        Rule("C108", "White space around a text", _W, "Remove it.", "White space around texts is removed."),
        Rule("C109", "Unusual role name", _W, "Write system, user, assistant or tool.", "Roles get their usual names."),
        Rule("C110", "A tool's reply that answers no call", _E, "Give it the id of the call that it answers."),
        Rule("C111", "A tool that is not defined", _E, "Define it in tools."),
        Rule("C112", "Arguments that are not JSON", _E, "Write them as a JSON object."),
        Rule("C113", "Unusable tool definitions", _E, "Give a list of functions with names."),
        Rule("C114", "A call without a reply", _W, "Add the tool's reply."),
        Rule("C115", "A content part that is no text", _E, "Remove the row: only text is learned."),
        Rule("C116", "Images, audio or video", _E, "Remove the row: only text is learned."),
        Rule("P201", "One side of the pair is missing", _E, "Give both answers."),
        Rule("P202", "Both sides are equal", _E, "Remove the row: it says nothing."),
        Rule("P203", "The sides answer different prompts", _E, "Give both sides the same turns before the answer."),
        Rule("P204", "The chosen side is nearly always the longer one", _W, "Add pairs whose shorter side is better."),
        Rule("P205", "Ranks that choose nothing", _E, "Give at least two answers different ranks."),
        Rule("P206", "A side that is no answer", _E, "End each side with the assistant's turn."),
        Rule("K301", "The verdict is not true or false", _E, "Write true or false.",
             '"true", "false", 1 and 0 become true and false.'),
        Rule("K302", "Every verdict is the same", _W, "Add answers of the other kind."),
        Rule("T405", "Control tokens of chat templates in a text", _W, "Remove them: templates write them themselves."),
        Rule("Q501", "The same row again", _W, "Keep one of them.", "Repeated rows are left out."),
        Rule("Q503", "A secret", _W, "Remove it, and revoke it where it is valid."),
        Rule("Q504", "An e-mail address", _W, "Remove or replace personal data."),
        Rule("Q506", "The answer repeats the question", _W, "Check how the columns were exported."),
        Rule("S601", "Too few rows", _W, "At least 10 usable rows are needed to train and to measure."),
    )
}  # fmt: skip

RULES: dict[str, str] = {code: rule.title for code, rule in CATALOGUE.items()}


def rule_title(code: str) -> str:
    """What a rule is about, for people; raises KeyError for a code that is not in the catalogue."""
    return CATALOGUE[code].title
