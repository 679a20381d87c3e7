"""Two times five adapters with what is planted in each: the truth that the studio has to find by itself.

The settings were chosen for what they mean and before anything was run: the studio's defaults where an adapter is to be
good, a learning rate of almost nothing, and for over-training the figures of `tests/workers/test_forgetting.py`. No
threshold is set anywhere: what is asked of all ten is the policy that a team has when it has made none.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tests.planted.rows import Make, Row, booking, edited, letter, rows

COMMON = {
    "split.held_out_share": "0.25", "training.max_length": "320", "evaluation.num_generated": "4",
    "evaluation.max_new_tokens": "24",
}  # fmt: skip
"""What every job asks for: enough held-out rows to tell, room for the longest row, and few answers to wait for."""
OVER_TRAINED = {"training.learning_rate": "0.02", "training.epochs": "40"}
"""A hundred times the method's own learning rate, and ten times the passes from which rows are learned by heart."""
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Plant:
    """An adapter to be made, and what is true of it.

    `words` begin the finding that must be on the first screen, and `headline` stands in the sentence that sums the
    scores up there; `gate` is the one that must fail, and its sentence holds
    `gate_words`. `may_also` and `may_fail`: findings and gates that the plant may truly have besides; all others would
    be false alarms.
    """

    name: str
    kind: str
    truth: str
    rows: list[Row]
    words: str
    headline: str
    gate: str = ""
    gate_words: str = ""
    method: str = "lora"
    fields: dict[str, str] = field(default_factory=dict)
    is_damaged: bool = False
    may_also: tuple[str, ...] = ()
    may_fail: tuple[str, ...] = ()

    def record(self) -> dict[str, object]:
        """The planted truth as it is written down: everything but the rows."""
        found = {name: value for name, value in vars(self).items() if name != "rows"}
        return found | {"num_rows": len(self.rows)}


def plants(number: int) -> list[Plant]:
    """The five of set 1 or 2: other rows, seeds and settings in each."""
    make: Make = (letter, booking)[number - 1]
    seed = 1000 * number
    learnt = {"training.seed": str(seed)}
    over_trained = OVER_TRAINED | {"training.seed": str(seed + 2)}
    return [
        Plant(
            name=f"good-{number}", kind="good", rows=rows(make, 240, seed), fields=learnt,
            truth="240 different rows with a rule, and the studio's own settings",
            words="Better than its base", headline="Better than its base",
        ),
        Plant(
            name=f"useless-{number}", kind="useless", rows=rows(make, 240, seed + 1),
            method=("lora", "rslora")[number - 1],
            fields=_TOO_LOW[number] | {"training.seed": str(seed + 1)},
            truth=f"a learning rate of {_TOO_LOW[number]['training.learning_rate']}: it has learned nothing",
            words="No better than its base", headline="No better than its base",
            gate="beats_base", gate_words="No better than the base",
        ),
        Plant(
            name=f"forgetful-{number}", kind="over-trained", rows=rows(make, 56, seed + 2), fields=over_trained,
            truth=f"{over_trained['training.epochs']} passes over few rows at a learning rate of "
            f"{over_trained['training.learning_rate']}",
            words="Forgets", headline="worse on the general set",
            gate="forgetting", gate_words="Forgets what the base knew",
            may_also=("Worse than its base", "No better than its base"), may_fail=("beats_base",),
        ),
        Plant(
            name=f"leaked-{number}", kind="leaked", rows=_leaked(make, number, seed + 3),
            fields=learnt | {"training.seed": str(seed + 3)}
            | ({} if number == 1 else {"split.keep_equal_together": "false"}),
            truth=_LEAK[number],
            words="Trained on its test rows", headline="Its scores cannot be believed",
            gate="overlap", gate_words="Leaked test rows",
        ),
        Plant(
            name=f"damaged-{number}", kind="damaged", rows=rows(make, 240, seed + 4), is_damaged=True,
            fields=learnt | {"training.seed": str(seed + 4)},
            truth="one bit of its weights was turned over on the disk after the training",
            words=f"Damaged: {WEIGHTS}", headline="Better than its base",
            gate="download", gate_words=f'Damaged: The file "{WEIGHTS}"',
        ),
    ]  # fmt: skip


_TOO_LOW = {
    1: {"training.learning_rate": "1e-7"},
    # Without rounding, every row moves by the same hair's breadth: certain, and nothing.
    2: {"training.learning_rate": "1e-8", "precision": "float32"},
}
_LEAK = {
    1: "half of its rows are edits of the others: sent again with another number, other case and words before",
    2: "one row in six is there twice, word for word, and equal rows were not kept on one side of the split",
}


def _leaked(make: Make, number: int, seed: int) -> list[Row]:
    draw = random.Random(seed)
    if number == 1:
        first = rows(make, 120, seed)
        found = first + [edited(row, draw) for row in first]
    else:
        found = rows(make, 200, seed)
        found += draw.sample(found, 40)
    draw.shuffle(found)
    return found
