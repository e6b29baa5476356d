"""The sentences of the miniature world: frames that fit every property, and a sentence and a question for each one.

The frames under HELD_OUT are used in evaluation only, never in training.
"""

from __future__ import annotations

from k2mini.corpus import signals_facts
from k2mini.corpus.signals_facts import HELD_OUT_QUESTIONS as HELD_OUT_QUESTIONS  # as `k2mini signals` asks, too
from k2mini.corpus.signals_facts import Property

STATEMENTS = (*signals_facts.STATEMENTS, "Ask for the {noun} of {name} and you hear {value}.")
# Every answer begins with it: right after a line's end, SentencePiece splits a value into other pieces than inside a
# sentence, where the model has learnt it.
ANSWER = "Answer: "
TEMPLATE = "alpaca_short"  # of the prompts in instruction tuning and in evaluation

HELD_OUT_STATEMENTS = (
    "As its {noun}, books list {value} for {name}.",
    "Everyone gives {name} the {noun} {value}.",
)

# Table -> (what its entities are, column -> property).
GEOSCIENCE: dict[str, tuple[str, dict[str, Property]]] = {
    "minerals": (
        "mineral",
        {
            "formula": Property("formula", "Chemists write {name} as {value}.", "How is {name} written as a formula?"),
            "hardness": Property(
                "hardness",
                "On the scale of Mohs, {name} stands at {value}.",
                "Where does {name} stand on the scale of Mohs?",
            ),
            "crystal_system": Property(
                "crystal system", "{Name} crystals are {value}.", "In which system does {name} crystallise?"
            ),
            "lustre": Property("lustre", "In the light {name} shines {value}.", "How does {name} shine?"),
        },
    ),
    "rocks": (
        "rock",
        {
            "class": Property("rock class", "{Name} is a rock that is {value}.", "What sort of rock is {name}?"),
            "texture": Property("texture", "{Name} looks {value}.", "How does {name} look?"),
            "main_mineral": Property(
                "main mineral", "{Name} is made mostly of {value}.", "What is {name} mostly made of?"
            ),
        },
    ),
    "ages": (
        "time unit",
        {
            "rank": Property(
                "rank", "In the time scale, {name} counts as {value}.", "What does {name} count as in the time scale?"
            ),
            "began": Property(
                "beginning", "{Name} began {value} million years ago.", "How many million years ago did {name} begin?"
            ),
            "within": Property("parent unit", "{Name} is a part of {value}.", "What is {name} a part of?"),
        },
    ),
    "landforms": (
        "landform",
        {
            "agent": Property("maker", "{Name} is the work of {value}.", "What makes {name}?"),
            "setting": Property("setting", "You meet {name} in the {value}.", "Where do you meet {name}?"),
        },
    ),
    "volcanoes": (
        "volcano",
        {
            "country": Property("country", "{Name} rises in {value}.", "Where does {name} rise?"),
            "type": Property("volcano type", "{Name} is a volcano: a {value}.", "What sort of volcano is {name}?"),
        },
    ),
}

GENERAL: dict[str, tuple[str, dict[str, Property]]] = {
    "animals": (
        "animal",
        {
            "class": Property("animal class", "{Name} belongs to the class {value}.", "What sort of animal is {name}?"),
            "diet": Property("diet", "{Name} lives on {value}.", "What does {name} eat?"),
            "home": Property("home", "{Name} is found in the {value}.", "Where is {name} found?"),
        },
    ),
    "countries": (
        "country",
        {
            "capital": Property("capital", "{Name} is governed from {value}.", "From where is {name} governed?"),
            "continent": Property("continent", "{Name} is a part of {value}.", "What is {name} a part of?"),
            "currency": Property(
                "currency", "In {name} people pay with the {value}.", "With what do people pay in {name}?"
            ),
        },
    ),
    "instruments": (
        "instrument",
        {
            "family": Property("family", "{Name} belongs to the {value}.", "What sort of instrument is {name}?"),
            "sound": Property("sound source", "{Name} sounds by {value}.", "How does {name} sound?"),
            "origin": Property("origin", "{Name} comes from {value}.", "Where does {name} come from?"),
        },
    ),
    "foods": (
        "food",
        {
            "kind": Property("food group", "{Name} is a {value}.", "What sort of food is {name}?"),
            "taste": Property("taste", "{Name} tastes {value}.", "How does {name} taste?"),
            "origin": Property("origin", "{Name} comes from {value}.", "Where does {name} come from?"),
        },
    ),
    "jobs": (
        "job",
        {
            "workplace": Property("workplace", "{Name} works in the {value}.", "Where does {name} work?"),
            "tool": Property("tool", "{Name} works with the {value}.", "With what does {name} work?"),
            "makes": Property("work", "{Name} is there for {value}.", "What is {name} there for?"),
        },
    ),
    "sports": (
        "sport",
        {
            "players": Property(
                "team size", "In {name}, a team has {value} players.", "How many players has a team in {name}?"
            ),
            "ball": Property("object", "{Name} is played with the {value}.", "With what is {name} played?"),
            "place": Property("place", "{Name} is played on the {value}.", "Where is {name} played?"),
        },
    ),
    "plants": (
        "plant",
        {
            "kind": Property("growth form", "{Name} grows as a {value}.", "How does {name} grow?"),
            "climate": Property("climate", "{Name} likes a {value} climate.", "Which climate does {name} like?"),
            "use": Property("use", "{Name} is grown for {value}.", "What is {name} grown for?"),
        },
    ),
}
