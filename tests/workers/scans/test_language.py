"""Rows in another language, at planted lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workers.scans.planting import clean_rows, found, scan

PLANTED = {
    "German": "Der Gärtner gießt am Morgen die Rosen, und danach geht er mit seinem Hund in den nahen Wald.",
    "French": "Le jardinier arrose les roses le matin, puis il se promène avec son chien dans la forêt voisine.",
    "Spanish": "El jardinero riega las rosas por la mañana y después pasea con su perro por el bosque cercano.",
    "Russian": "Утром садовник поливает розы, потом долго гуляет возле леса, взяв рыжую собаку.",
    "Japanese": "庭師は朝バラに水をやり、それから犬を連れて近くの森を散歩します。",
    "Chinese": "园丁早上给玫瑰浇水。然后他带着狗在附近的森林里散步。直到太阳下山他才回家。",
    "Arabic": "يسقي البستاني الورود في الصباح ثم يتجول مع كلبه في الغابة القريبة حتى المساء.",
    "Hindi": "माली सुबह गुलाबों को पानी देता है और फिर अपने कुत्ते के साथ पास के जंगल में घूमता है।",
}


@pytest.mark.parametrize("language", PLANTED)
def test_it_finds_rows_in_another_language(language: str, tmp_path: Path) -> None:
    rows = clean_rows(60)
    text = PLANTED[language]
    rows[13] = {"prompt": text, "completion": text}
    rows[44] = {"prompt": text, "completion": text}
    events = scan("language", rows, tmp_path)
    assert {one["finding"]["line"]: one["finding"]["kind"] for one in events[:-1]} == {14: language, 45: language}
    assert events[-1]["kinds"] == {language: 2}
    assert f"English 96.7%, {language} 3.3%" in events[-1]["notes"][0]


def test_a_language_of_a_tenth_of_the_rows_is_the_data_sets_own(tmp_path: Path) -> None:
    rows = clean_rows(60)
    for number in range(20):
        text = list(PLANTED.values())[number % 2]
        rows[number] = {"prompt": text, "completion": text}
    assert found("language", rows, tmp_path) == {}


def test_code_names_and_short_answers_have_no_language(tmp_path: Path) -> None:
    rows = clean_rows(60)
    rows[3] = {"prompt": "¿Qué?", "completion": "Sí."}
    rows[4]["completion"] += "\n```python\n" + "für_alle = [größe for größe in über]\n" * 40 + "```"
    rows[5] = {"prompt": "12 + 30 = ?", "completion": "42"}
    rows[6]["completion"] += " They say “Guten Morgen” there."
    assert found("language", rows, tmp_path) == {}


def test_it_counts_the_rows_of_each_language(tmp_path: Path) -> None:
    *_, done = scan("language", clean_rows(30), tmp_path)
    assert done["counts"] == {"English": 30}


def test_a_file_of_short_rows_says_so(tmp_path: Path) -> None:
    events = scan("language", [{"prompt": f"{n}?", "completion": str(n)} for n in range(12)], tmp_path)
    assert events == [
        {
            "kind": "done",
            "num_findings": 0,
            "num_rows": 0,
            "kinds": {},
            "counts": {},
            "notes": ["No row is long enough to tell its language."],
        }
    ]
