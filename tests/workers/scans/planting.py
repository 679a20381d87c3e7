"""Files with findings planted at known lines, scanned as the studio scans them: in a child process."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

_SUBJECTS = ("gardener", "captain", "painter", "doctor", "pilot", "farmer", "baker", "teacher", "sailor", "writer")
_VERBS = ("waters", "repairs", "visits", "measures", "describes", "photographs", "sells", "moves", "studies", "cleans")
_THINGS = ("roses", "engines", "bridges", "clouds", "letters", "boats", "lamps", "maps", "gardens", "stones")
_PLACES = ("harbour", "valley", "market", "museum", "station", "forest", "island", "library", "tower", "village")


def sentence(dice: random.Random) -> str:
    """One English sentence, capital and full stop included."""
    return (
        f"The {dice.choice(_SUBJECTS)} {dice.choice(_VERBS)} the {dice.choice(_THINGS)} near the "
        f"{dice.choice(_PLACES)} before the {dice.choice(_SUBJECTS)} {dice.choice(_VERBS)} the {dice.choice(_THINGS)}."
    )


def clean_rows(num: int = 60, *, seed: int = 1) -> list[dict[str, Any]]:
    """Conversations in which no scan has anything to find."""
    dice = random.Random(seed)
    return [
        {
            "prompt": f"Tell me what happens in scene {number}. {sentence(dice)} Why is that?",
            "completion": f"{sentence(dice)} {sentence(dice)} {sentence(dice)} That is all of scene {number}.",
        }
        for number in range(1, num + 1)
    ]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scan(name: str, rows: list[Any], folder: Path, *, format_name: str = "prompt_completion") -> list[dict[str, Any]]:
    """The events of a scan over such rows: findings, then "done"."""
    done = subprocess.run(
        [sys.executable, "-m", "workers.scanning", name, str(write(folder / "rows.jsonl", rows)),
         "--format", format_name],
        capture_output=True, check=False, timeout=300,
        env={**os.environ, "RAYON_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    events = [json.loads(line) for line in done.stdout.splitlines()]
    return [event for event in events if event["kind"] != "progress"]


def found(name: str, rows: list[Any], folder: Path, **more: Any) -> dict[int, str]:
    """Line -> kind of everything that a scan finds; each line once."""
    *findings, done = scan(name, rows, folder, **more)
    assert done["kind"] == "done"
    assert done["num_findings"] == len(findings)
    lines = {event["finding"]["line"]: event["finding"]["kind"] for event in findings}
    assert len(lines) == len(findings)
    return lines
