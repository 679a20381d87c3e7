"""Rows with a rule to learn: letters to a shop and notes to a hotel, each put together from many words at random.

A row has so many places with a word of its own that no two come out nearly alike unless one is copied.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

Row = dict[str, str]
Make = Callable[[random.Random], Row]

PEOPLE = (
    "Ada", "Boris", "Carla", "Dmitri", "Elena", "Farid", "Greta", "Hassan", "Ines", "Jonas", "Kira", "Luis", "Mona",
    "Nils", "Olga", "Pavel", "Quinn", "Rosa", "Samir", "Tilda", "Umar", "Vera", "Walter", "Xenia", "Yusuf", "Zoe",
)  # fmt: skip
TOWNS = (
    "Bergen", "Cork", "Delft", "Essen", "Fulda", "Graz", "Haifa", "Izmir", "Jena", "Kyoto", "Lyon", "Mainz", "Nantes",
    "Oslo", "Porto", "Quito", "Riga", "Split", "Turku", "Utrecht", "Varna", "Warsaw", "York", "Zadar",
)  # fmt: skip
THINGS = (
    "kettle", "lamp", "drill", "mower", "heater", "radio", "mixer", "pump", "scale", "fan", "toaster", "printer",
    "camera", "clock", "oven", "fridge", "vacuum", "speaker", "router", "monitor", "keyboard", "charger",
)  # fmt: skip
COLOURS = (
    "red", "green", "black", "white", "silver", "yellow", "purple", "brown", "orange", "grey", "golden", "pink",
)  # fmt: skip
FAULTS = {
    "does not start any more": "power", "never turns on": "power", "stays dark when I press the button": "power",
    "is far too loud at night": "noise", "rattles like an old train": "noise", "hums all day long": "noise",
    "came with a deep dent": "return", "arrived broken in its box": "return", "has a long scratch on top": "return",
    "smells of smoke": "danger", "gave me an electric shock": "danger", "got so hot that it melted": "danger",
}  # fmt: skip
OPENINGS = (
    "Good morning", "Dear team", "Hello there", "To whom it may concern", "Hi all", "Good evening", "Dear shop",
    "Greetings", "Dear helpers", "Good day",
)  # fmt: skip
WISHES = (
    "please tell me what to do next", "I would like my money back", "can somebody look at it soon",
    "a quick answer would be kind", "please send a new one", "I need it before the weekend", "who can repair it",
    "my neighbour has the same trouble", "I have kept the receipt", "let me know where to send it",
    "it was a present for my sister", "I do hope you can help",
)  # fmt: skip
ROOMS = (
    "single",
    "double",
    "family",
    "attic",
    "garden",
    "corner",
    "quiet",
    "sunny",
    "lake",
    "tower",
    "studio",
    "cabin",
)
MEALS = {
    "eats no meat": "vegetarian", "lives on plants alone": "vegan", "cannot have nuts": "no nuts",
    "gets ill from milk": "no milk", "takes whatever the kitchen cooks": "any", "must avoid wheat": "no gluten",
    "keeps halal": "halal", "never touches fish": "no fish",
}  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
TRIPS = (
    "by the night train", "on a bicycle", "with two children", "after a long hike", "in an old van", "with a small dog",
    "straight from the airport", "for a wedding", "with a choir", "on the last ferry", "for a chess match",
    "with too many books",
)  # fmt: skip
EXTRAS = (
    "a parking place", "a late breakfast", "an extra blanket", "a view of the harbour", "a cot", "a desk by the window",
    "a room far from the lift", "an early key", "a packed lunch", "a firm pillow", "two towels more", "a map",
)  # fmt: skip


def letter(draw: random.Random) -> Row:
    """A complaint, to be answered with the queue that it belongs to and what it is about."""
    fault, thing, town = draw.choice(list(FAULTS)), draw.choice(THINGS), draw.choice(TOWNS)
    text = (
        f"{draw.choice(OPENINGS)}, {draw.choice(PEOPLE)} from {town} here. The {draw.choice(COLOURS)} {thing} that I "
        f"bought in {draw.choice(MONTHS)} from {draw.choice(PEOPLE)} {fault}; {draw.choice(WISHES)}. My order has the "
        f"number {draw.randrange(1000, 10_000)}."
    )
    return {"instruction": text, "input": "", "output": f"queue={FAULTS[fault]}; item={thing}; town={town}"}


def booking(draw: random.Random) -> Row:
    """A note about a guest, to be answered with the booking as JSON."""
    room, meal, nights = draw.choice(ROOMS), draw.choice(list(MEALS)), draw.randrange(2, 15)
    text = (
        f"{draw.choice(PEOPLE)} of {draw.choice(TOWNS)} arrives {draw.choice(TRIPS)} on {draw.choice(DAYS)} "
        f"{draw.randrange(1, 29)} {draw.choice(MONTHS)}, stays for {nights} nights, asks for the {room} room and "
        f"{draw.choice(EXTRAS)}, and {meal}."
    )
    answer = json.dumps({"room": room, "nights": nights, "meal": MEALS[meal]})
    return {"instruction": text, "input": "", "output": answer}


def rows(make: Make, num: int, seed: int) -> list[Row]:
    """`num` rows by the seed."""
    draw = random.Random(seed)
    return [make(draw) for _ in range(num)]


def edited(row: Row, draw: random.Random) -> Row:
    """The row as a person sends it again: words before it, its first number another one, other case and punctuation."""
    text = row["instruction"].replace(";", ",")
    number = next(word.strip(".,") for word in text.split() if word.strip(".,").isdigit())
    text = text.replace(number, str(int(number) + draw.randrange(1, 9)), 1)
    return row | {"instruction": f"{draw.choice(('Once more', 'Again', 'See below', 'Forwarded'))}: {text.upper()}"}
