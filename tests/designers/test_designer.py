import logging

import pytest
from PIL import Image

from diffusers_dim.designers import Blueprint, BlueprintCache, Designer, DesignError, Draft
from diffusers_dim.designers.designer import is_blueprint


PARTS = ("Make it red.", "A ball on grass.", "It is round.", "The ball.", "A red ball on grass.")
GOOD = Blueprint(*PARTS)
NO_FIFTH = GOOD.rsplit("\n", 1)[0]


class Scripted(Designer):
    """Gives each instruction's answers in turn, the last conversation's first, and remembers what it was asked."""

    def __init__(self, answers, **kwargs):
        super().__init__(**kwargs)
        self.answers = {text: list(given) for text, given in answers.items()}
        self.asked = []

    def write(self, conversations, on_text):
        for index in reversed(range(len(conversations))):
            self.asked.append(conversations[index])
            answer = self.answers[conversations[index].instruction].pop(0)
            if isinstance(answer, str):
                on_text(index, answer[:5])
                on_text(index, answer)
                answer = Draft(answer, tokens=7)
            yield index, answer


def picture(shade=0):
    return Image.new("RGB", (8, 6), (shade, 0, 0))


def design(designer, *instructions, **kwargs):
    return designer.design([picture(shade) for shade in range(len(instructions))], list(instructions), **kwargs)


def blueprint_of(text):
    return Blueprint(text, *PARTS[1:])


def test_blueprints_come_in_the_order_of_the_instructions():
    designer = Scripted({text: [blueprint_of(text)] for text in "abc"})
    assert design(designer, *"abc") == [blueprint_of(text) for text in "abc"]
    assert all(isinstance(found, Blueprint) for found in design(Scripted({"a": [str(GOOD)]}), "a"))


def test_the_model_is_asked_for_the_picture_and_the_instruction():
    designer = Scripted({"paint {it} red": [GOOD]})
    design(designer, "paint {it} red")
    (asked,) = designer.asked
    assert len(asked.turns) == 1 and "paint {it} red" in asked.turns[0] and asked.image.size == (8, 6)
    assert asked.messages()[0]["content"][0] == {"type": "image"}


def test_a_blueprint_that_lacks_a_part_is_asked_for_once_more_with_what_was_wrong():
    designer = Scripted({"a": [f"<think>Hm.</think>{NO_FIFTH}", GOOD], "b": [GOOD]})
    assert design(designer, "a", "b") == [GOOD, GOOD]
    first, answer, again = designer.asked[-1].turns
    assert len(designer.asked) == 3 and first == designer.asked[1].turns[0]
    assert answer == NO_FIFTH and "Edited Image Imagination" in again.split("\n")[0]
    assert designer.asked[-1].messages()[1]["role"] == "assistant" and designer.asked[-1].image is not None


def test_the_error_after_two_bad_answers_holds_the_words():
    designer = Scripted({"a": ["I would rather not.", "Still not."]})
    with pytest.raises(DesignError, match="(?s)'a'.*Still not") as caught:
        design(designer, "a")
    assert caught.value.text == "Still not."


def test_the_plain_instruction_stands_in_with_a_warning_if_the_user_chose_so(caplog):
    designer = Scripted({"a": ["No.", "No!"], "b": [GOOD]}, on_failure="instruction")
    with caplog.at_level(logging.WARNING):
        assert design(designer, "a", "b") == ["a", GOOD]
    assert "No!" in caplog.text and "plain instruction" in caplog.text


def test_an_answer_that_was_cut_off_is_asked_for_again():
    designer = Scripted({"a": [Draft(str(GOOD), finished=False), GOOD]}, max_new_tokens=99)
    assert design(designer, "a") == [GOOD]
    assert "99 tokens" in designer.asked[-1].turns[-1]


def test_what_fails_for_one_picture_leaves_the_others_finished(tmp_path):
    cache = BlueprintCache(tmp_path)
    designer = Scripted({"a": [GOOD], "b": [DesignError("The server refused it.")], "c": [GOOD]}, cache=cache)
    with pytest.raises(DesignError, match="refused"):
        design(designer, *"abc")
    assert len(designer.asked) == 3  # and it is not asked for again
    designer.answers["b"] = [GOOD]
    assert design(designer, *"abc") == [GOOD] * 3 and len(designer.asked) == 4


def test_results_tell_repairs_tokens_and_failures():
    designer = Scripted({"a": [GOOD], "b": [NO_FIFTH, GOOD], "c": ["", ""]})
    found = {design.index: design for design in designer.design_each([picture()] * 3, list("abc"))}
    assert [found[i].repaired for i in range(3)] == [False, True, True]
    assert [found[i].tokens for i in range(3)] == [7, 14, 14]
    assert found[2].blueprint is None and isinstance(found[2].error, DesignError)


@pytest.mark.parametrize(
    "change", [{"instruction": "b"}, {"shade": 9}, {"prompt": "Do {instruction}"}, {"max_new_tokens": 9}]
)
def test_the_cache_tells_pictures_instructions_and_settings_apart(tmp_path, change):
    cache, shade, instruction = BlueprintCache(tmp_path), change.pop("shade", 0), change.pop("instruction", "a")
    first = Scripted({"a": [GOOD]}, cache=cache)
    first.design([picture()], ["a"])
    again = Scripted({}, cache=cache)
    assert again.design([picture()], ["a"]) == [GOOD] and not again.asked
    other = Scripted({instruction: [blueprint_of("other")]}, cache=cache, **change)
    assert other.design([picture(shade)], [instruction]) == [blueprint_of("other")]


def test_bad_answers_are_not_cached(tmp_path):
    cache = BlueprintCache(tmp_path)
    design(Scripted({"a": ["no", "no"]}, cache=cache, on_failure="instruction"), "a")
    assert design(Scripted({"a": [GOOD]}, cache=cache), "a") == [GOOD]


def test_growing_text_is_told_with_the_place_of_its_instruction(tmp_path):
    cache, told = BlueprintCache(tmp_path), []
    design(Scripted({"a": [GOOD]}, cache=cache), "a")
    designer = Scripted({"b": [GOOD], "c": [NO_FIFTH, GOOD]}, cache=cache)
    design(designer, *"abc", on_text=lambda index, text: told.append((index, text)))
    assert told == [(2, NO_FIFTH[:5]), (2, NO_FIFTH), (1, GOOD[:5]), (1, GOOD), (2, GOOD[:5]), (2, GOOD)]


def test_prompts_are_rewritten_to_one_paragraph():
    designer = Scripted({"fruit": ['<think>A bowl.</think>"A bowl\n of fruit."'], "tree": ["", "An oak."]})
    assert designer.rewrite(["fruit", "tree"]) == ["A bowl of fruit.", "An oak."]
    assert all(asked.image is None and asked.messages()[0]["content"][0]["type"] == "text" for asked in designer.asked)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"on_failure": "ignore"}, '"error" or "instruction", but is \'ignore\''),
        ({"max_new_tokens": 0}, "at least 1, but is 0"),
        ({"prompt": "Design it."}, "has to hold {instruction}"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Scripted({}, **settings)


def test_as_many_images_as_instructions_are_needed():
    with pytest.raises(ValueError, match="1 images for 2 instructions"):
        Scripted({}).design([picture()], ["a", "b"])


@pytest.mark.parametrize("text, found", [(str(GOOD), True), (NO_FIFTH, False), ("Make the ball red.", False)])
def test_a_text_of_five_parts_is_a_blueprint(text, found):
    assert is_blueprint(text) is found
