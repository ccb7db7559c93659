"""The table of Twenty Questions: what it says, that it parts every pair, and that it refuses contradictions."""

from __future__ import annotations

import itertools
import re

import pytest

from archer_fast.envs.twenty_questions_table import build_table, fact_table, normalise

# Pairs of objects that no attribute tells apart. None is left: even ocean and sea differ, in that an
# ocean is the largest kind of body of water. A pair that a later edit merges must be argued for here.
NOT_SEPARATED: list[tuple[str, str]] = []

FACTS = {
    "alive": "cat dog sheep elephant tree cactus | apple rock doll river couch",
    "man-made": "car canvas knife locket pillow | rock mango horse cactus meteorite",
    "eat": "tomato grape peas cantaloupe | toothpaste cactus cat plate glue",
    "fruit": "banana strawberry mango | tomato cucumber corn tree",
    "wear": "socks watch helmet headphone gloves scarf | pillow key cup",
    "electric": "blender smartphone drill watch printer | guitar scissors toothbrush key bus",
    "instrument": "piano drum harp clarinet | headphone television pan",
    "vehicle": "scooter ship helicopter | horse kite lawn mower",
    "engine": "boat bus lawn mower motorcycle | kite drill horse",
    "wheels": "airplane train scooter lawn mower | helicopter ship boat",
    "fly": "airplane helicopter kite | meteorite baseball bus",
    "metal": "trumpet fork hammer ring ship rake | violin pillow potato boat chopstick",
    "wooden": "desk violin baseball bat pencil chopstick | trumpet couch spinach",
    "cloth": "shirt skirt canvas gloves | belt boots bed paper",
    "round": "orange golf ball peas onion | football banana plate potato",
    "long and thin": "flute celery river train scarf | drum apple cup",
    "bigger person": "horse bus couch lake | dog chair scooter banana violin",
    "bigger house": "ship ocean mountain | elephant tree bus",
    "pocket": "key grape ring eraser | pillow basketball hammer shovel",
    "sharp": "knife cactus saw | spoon pillow hammer",
    "pair": "pants scissors earring chopstick | necklace hat knife",
    "strings": "violin tennis racket kite piano | flute drum necklace",
    "blow": "flute trombone saxophone | drum violin whisk",
    "keys": "piano calculator clarinet | trombone key mattress",
    "write": "pencil sharpie | eraser paper computer keyboard",
    "tree": "apple peach banana | strawberry grape carrot",
    "underground": "carrot potato onion | corn spinach rock",
    "meat": "lion cat bear | rabbit elephant knife",
    "water": "ocean sea lake river | boat cup forest",
    "salt": "ocean sea | lake river potato",
    "cook food": "pan cooking pot microwave | refrigerator whisk bowl",
    "prongs": "fork rake cactus | spoon shovel comb",
}
QUESTIONS = {
    "alive": "Is it alive?",
    "man-made": "Is it man-made?",
    "eat": "Can you eat it?",
    "fruit": "Is it a fruit?",
    "wear": "Can you wear it?",
    "electric": "Is it an electric device?",
    "instrument": "Is it a musical instrument?",
    "vehicle": "Is it a vehicle?",
    "engine": "Does it have an engine?",
    "wheels": "Does it have wheels?",
    "fly": "Can it fly?",
    "metal": "Is it made of metal?",
    "wooden": "Is it usually wooden?",
    "cloth": "Is it made of cloth?",
    "round": "Is it round like a ball?",
    "long and thin": "Is it long and thin?",
    "bigger person": "Is it bigger than a person?",
    "bigger house": "Is it bigger than a house?",
    "pocket": "Does it fit in a pocket?",
    "sharp": "Is it sharp?",
    "pair": "Do you call it a pair?",
    "strings": "Does it have strings?",
    "blow": "Do you blow into it?",
    "keys": "Do you press keys or buttons to use it?",
    "write": "Do you write with it?",
    "tree": "Does it grow on a tree?",
    "underground": "Does it grow underground?",
    "meat": "Does it eat meat?",
    "water": "Is it a body of water?",
    "salt": "Is it salt water?",
    "cook food": "Is it used to cook food?",
    "prongs": "Does it have prongs or spikes?",
}


def named(text: str) -> list[str]:
    """Object names in a text of names parted by blanks, the longest reading first: "golf ball peas" -> 2."""
    names = sorted((thing.name for thing in fact_table().objects), key=len, reverse=True)
    return re.findall("|".join(rf"\b{re.escape(name)}\b" for name in names), text)


@pytest.mark.parametrize("fact", FACTS)
def test_facts_written_down_apart_from_the_table(fact: str) -> None:
    table = fact_table()
    attribute = table.attributes[table.questions[normalise(QUESTIONS[fact])]]
    members, others = (named(side) for side in FACTS[fact].split("|"))
    index = {thing.name: i for i, thing in enumerate(table.objects)}
    assert [name for name in members if not attribute.mask >> index[name] & 1] == []
    assert [name for name in others if attribute.mask >> index[name] & 1] == []
    assert len(members) >= 2 and len(others) >= 2


def test_every_pair_of_objects_is_separated() -> None:
    table = fact_table()
    rows = [tuple(a.mask >> i & 1 for a in table.attributes) for i in range(len(table.objects))]
    same = [
        (table.objects[i].name, table.objects[j].name)
        for i, j in itertools.combinations(range(len(rows)), 2)
        if rows[i] == rows[j]
    ]
    assert same == NOT_SEPARATED


def test_size_and_balance() -> None:
    table = fact_table()
    assert [len(table.objects), len({thing.name for thing in table.objects})] == [157, 157]
    assert len({thing.category for thing in table.objects}) == 17
    assert len(table.attributes) >= 60
    assert all(2 <= len(attribute.phrasings) <= 4 for attribute in table.attributes)
    assert len(table.questions) == sum(len(attribute.phrasings) for attribute in table.attributes)  # all distinct
    assert len({attribute.mask for attribute in table.attributes}) == len(table.attributes)  # none says the same
    share = [attribute.mask.bit_count() / 157 for attribute in table.attributes]
    assert sum(0.15 <= s <= 0.85 for s in share) >= 15  # enough that a random question tells something
    assert min(share) > 0 and max(share) < 1


def test_attribute_shares_of_the_paper_subset() -> None:
    """Ten objects: enough questions split them 3:7 or better that a player can learn to prefer them."""
    subset = [1, 11, 21, 31, 41, 51, 61, 71, 81, 91]
    table = fact_table()
    counts = [sum(attribute.mask >> i & 1 for i in subset) for attribute in table.attributes]
    assert sum(3 <= count <= 7 for count in counts) >= 8
    assert sum(2 <= count <= 8 for count in counts) >= 20


@pytest.mark.parametrize(
    ("question", "guess"),
    [
        ("Is it a dog?", "dog"),
        ("is it DOG", "dog"),
        ("Is it the dog?", "dog"),
        ("Are they dogs?", "dog"),
        ("Could it be a dog?", "dog"),
        ("Is the object a dog?", "dog"),
        ("a dog", "dog"),
        ("Dog!", "dog"),
        ("Is it a soccer ball?", "soccer ball"),
        ("Is it a pair of scissors?", "scissors"),
        ("Is it a plane?", "airplane"),
        ("Are they strawberries?", "strawberry"),
        ("Are they knives?", "knife"),
        ("Is it a TV?", "television"),
        ("Is it orange?", "orange"),
        ("Is it a chopstick?", "chopstick"),
        ("Does a dog eat it?", None),
        ("Does it eat a dog?", None),
        ("Is it bigger than a dog?", None),
        ("Is it a dog or a cat?", None),
        ("Is it a hotdog?", None),
        ("Is it a ball?", None),
        ("Is it a dog house?", None),
        ("Is it a house dog?", None),
        ("Is it a", None),
        ("", None),
        ("Is it a dög?", None),
        ("Is it aàdog?", None),
    ],
)
def test_which_questions_are_guesses(question: str, guess: str | None) -> None:
    table = fact_table()
    index = table.guessed(normalise(question))
    assert (None if index is None else table.objects[index].name) == guess


def test_normalise() -> None:
    assert normalise("  Is it,  a\tDOG?!\n") == "is it a dog"
    assert normalise("Isn't it man-made?") == "isnt it man made"
    assert normalise("Is_it a dog") == "is it a dog"
    assert normalise("?!") == ""


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ([{"name": "a", "phrasings": ["Is it a cat?"], "true": ["cat"]}], "'is it a cat' of 'a' is a guess"),
        ([{"name": "a", "phrasings": ["Is it x?"], "true": ["dgo"]}], "attribute 'a': 'dgo' names no object"),
        (
            [
                {"name": "a", "phrasings": ["Is it x?"], "true": ["cat"]},
                {"name": "b", "phrasings": ["is it X"], "true": ["dog"]},
            ],
            "'is it x' stands for two entries",
        ),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(attributes: list[dict[str, object]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build_table({"Animals": [["cat"], ["dog"]]}, {"without_article": [], "attributes": attributes})


def test_shorthand_is_read_from_left_to_right() -> None:
    categories = {"Animals": [["cat"], ["dog"]], "Tools": [["saw"], ["drill"]]}
    entry = {"name": "a", "phrasings": ["Is it x?"], "true": ["*", "-@Animals", "dog", "-saw"]}
    table = build_table(categories, {"without_article": [], "attributes": [entry]})
    assert table.attributes[0].mask == 0b1010  # dog, drill
