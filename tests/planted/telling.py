"""Whether what was said is what was planted, and both in a table."""

from __future__ import annotations

from collections.abc import Sequence

from tests.planted.making import Made

FAULTS = (
    "Damaged", "Gives other answers", "Trained on its test rows", "Forgets", "Worse than its base",
    "No better than its base",
)  # fmt: skip
"""How the findings that accuse an adapter begin."""


def wrongs(made: Made) -> list[str]:
    """Everything that the two pages say wrongly or do not say, in sentences; empty when all is as it was planted."""
    assert made.screen is not None, "review it first"
    plant, screen, found = made.plant, made.screen, []
    titles = screen.red if plant.gate else screen.green
    if not any(title.startswith(plant.words) for title in titles) or plant.words not in screen.words:
        found.append(f'the first screen does not say "{plant.words}": {[*screen.red, *screen.yellow, *screen.green]}')
    if plant.headline not in screen.headline:
        found.append(f'the scores are summed up as "{screen.headline}" and not "{plant.headline}"')
    if plant.is_damaged and not screen.is_headline_red:
        found.append(f'"{screen.headline}" does not say that this was before the damage')
    if not plant.gate and (screen.is_headline_red or screen.yellow):
        found.append(f'there is nothing to warn of, and it is warned: "{screen.headline}", {screen.yellow}')
    may_stand = (*plant.may_also, *([plant.words] if plant.gate else []))
    found += [f'it is accused: "{title}"' for title in screen.red if not title.startswith(may_stand)]
    found += [f'the first screen says "{one}"' for one in FAULTS if one in screen.words and not _allows(may_stand, one)]
    for gate in made.gates:
        expected = "failed" if gate.name == plant.gate else "passed"
        if gate.state != expected and gate.name not in plant.may_fail:
            found.append(f"the gate {gate.name} {gate.state}: {gate.sentence}")
    said = {gate.name: gate.sentence for gate in made.gates}
    if plant.gate and plant.gate_words not in said.get(plant.gate, ""):
        found.append(f'the gate {plant.gate} does not say "{plant.gate_words}": {said}')
    return [f"{plant.name}: {one}" for one in found]


def _allows(may_stand: Sequence[str], fault: str) -> bool:
    return any(one.startswith(fault) for one in may_stand)


def table(made: Sequence[Made]) -> str:
    """For each adapter what was planted, what its first screen says, and what each gate says."""
    lines = []
    for one in made:
        assert one.screen is not None, "review it first"
        colours = {"red": one.screen.red, "yellow": one.screen.yellow, "green": one.screen.green}
        said = " | ".join(f"{colour}: {', '.join(titles)}" for colour, titles in colours.items() if titles)
        lines += [
            f"{one.plant.name}: {'WRONG' if wrongs(one) else 'as planted'}",
            f"  planted        {one.plant.truth}",
            f"  first screen   {said}",
            f"                 {one.screen.headline}",
            *(f"  {gate.name:<14} {gate.state}: {gate.sentence}" for gate in one.gates),
        ]
    return "\n".join(lines)
