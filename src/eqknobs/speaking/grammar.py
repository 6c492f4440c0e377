"""Sentences that tiny-moshi is told to say: a small grammar, and the part that each sentence belongs to.

Words that the codec garbles were left out (docs/tiny-moshi.md). Standard library only: tools that synthesise import it.
"""

import hashlib
import random
from collections.abc import Collection

NAMES = "Peter Robert Henry John Thomas Michael Emily Rachel Oliver Charlie Jennifer Sarah".split()
VERBS = """lost painted visited saw covered counted described discovered chose held took broke caught
remembered""".split()
ADJECTIVES = """red green yellow black small heavy golden empty beautiful little brown silver friendly strange famous
ancient purple dirty modern perfect""".split()
NOUNS = """basket letter picture horse apple orange kitchen teacher doctor soldier button garden village pencil monkey
sister brother mother father bicycle river castle cookie engine hospital jacket market office pocket rabbit sailor
tiger uncle computer piano""".split()
NUMBERS = "five six nine ten twelve thirty fifty".split()
PLACES = [
    "in the garden",
    "at the station",
    "behind the church",
    "under the bridge",
    "across the street",
    "on the mountain",
    "beside the fire",
    "inside the castle",
    "at the airport",
    "in the forest",
    "in the city",
    "at the office",
    "in the village",
    "behind the hospital",
    "by the ocean",
]
TIMES = [
    "yesterday",
    "this morning",
    "last night",
    "after dinner",
    "on Monday",
    "before Friday",
    "every evening",
    "last winter",
    "on Saturday",
    "last Tuesday",
    "after breakfast",
    "in October",
    "every weekend",
]


def sentence(rng: random.Random) -> str:
    """One sentence of 5 to 10 words, without punctuation."""
    w = rng.choice
    form = rng.randrange(7)
    if form == 0:
        return f"{w(NAMES)} {w(VERBS)} the {w(ADJECTIVES)} {w(NOUNS)} {w(PLACES)}"
    if form == 1:
        return f"{w(NAMES)} {w(VERBS)} the {w(ADJECTIVES)} {w(NOUNS)} {w(TIMES)}"
    if form == 2:
        return f"{w(TIMES)} {w(NAMES)} {w(VERBS)} the {w(NOUNS)} with the {w(NOUNS)}"
    if form == 3:
        return f"the {w(ADJECTIVES)} {w(NOUNS)} {w(VERBS)} the {w(ADJECTIVES)} {w(NOUNS)}"
    if form == 4:
        return f"{w(NAMES)} {w(VERBS)} {w(NUMBERS)} {w(ADJECTIVES)} people {w(TIMES)}"
    if form == 5:
        return f"there were {w(NUMBERS)} {w(ADJECTIVES)} people {w(PLACES)}"
    return f"my {w(ADJECTIVES)} {w(NOUNS)} {w(VERBS)} {w(NAMES)} {w(PLACES)}"


def words() -> list[str]:
    """Every word of the grammar, sorted."""
    parts = [NAMES, VERBS, ADJECTIVES, NOUNS, NUMBERS, PLACES, TIMES, ["the there were people my with"]]
    return sorted({word for part in parts for text in part for word in text.split()})


def part_of(text: str) -> str:
    """`test` or `val` for a fiftieth of the sentences each, else `train`: by the sentence's SHA-256."""
    return {0: "test", 1: "val"}.get(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % 50, "train")


def drawn(part: str, count: int, seed: int, without: Collection[str] = ()) -> list[str]:
    """`count` unlike sentences of a part, none of them in `without`."""
    rng, found = random.Random(f"{part}-{seed}"), dict[str, None]()
    while len(found) < count:
        text = sentence(rng)
        if part_of(text) == part and text not in without:
            found[text] = None
    return list(found)
