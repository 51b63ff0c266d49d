"""
Answers in the shapes that vision-language models give, written by hand after the habits of ten families (no model was
run for them): their numbers, heads, emphasis, fences, tags, thoughts, JSON, and what goes wrong.
"""

import json
from pathlib import Path

import pytest

from diffusers_dim.designers.blueprint import HEADS, Blueprint, BlueprintError


FAMILIES = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(Path(__file__).parent.glob("corpus/*"))}
ANSWERS = [
    pytest.param(answer, id=f"{family}: {answer['name']}")
    for family, answers in FAMILIES.items()
    for answer in answers
]
GOOD = [param for param in ANSWERS if "parts" in param.values[0]]
BAD = [param for param in ANSWERS if "missing" in param.values[0]]


@pytest.mark.parametrize("answer", GOOD)
def test_an_answer_is_read_as_its_five_parts(answer):
    parts = tuple("\n".join(lines) for lines in answer["parts"])

    blueprint = Blueprint.parse("\n".join(answer["text"]))

    assert blueprint.parts == parts
    assert blueprint == "\n".join(f"{n}. {head}: {part}" for n, (head, part) in enumerate(zip(HEADS, parts), 1))
    assert Blueprint.parse(blueprint.format()).parts == parts


@pytest.mark.parametrize("answer", BAD)
def test_an_answer_that_lacks_parts_is_refused_and_they_are_named(answer):
    text = "\n".join(answer["text"])

    with pytest.raises(BlueprintError) as caught:
        Blueprint.parse(text)

    assert caught.value.missing == answer["missing"]
    assert caught.value.text == text
    assert all(head in str(caught.value) for head in answer["missing"])


def test_the_corpus_has_sixty_answers_and_six_families_at_least():
    assert len(ANSWERS) >= 60
    assert len(FAMILIES) >= 6
