import pytest

from diffusers_dim.designers import DesignError
from diffusers_dim.designers.cache import BlueprintCache
from diffusers_dim.designers.function import FunctionDesigner
from diffusers_dim.tiny import sample_edits


EDITS = sample_edits(3, seed=0)


def design(designer, **options):
    return designer.design([edit.source for edit in EDITS], [edit.instruction for edit in EDITS], **options)


def blueprint_of(image, instruction):
    return next(edit.blueprint for edit in EDITS if (edit.source, edit.instruction) == (image, instruction))


def test_function_writes_the_blueprint_of_each_picture_and_instruction():
    assert design(FunctionDesigner(blueprint_of)) == [edit.blueprint for edit in EDITS]


def test_words_are_told_as_they_are_there():
    told = []
    design(FunctionDesigner(blueprint_of), on_text=lambda index, text: told.append((index, text)))
    assert told == [(index, edit.blueprint) for index, edit in enumerate(EDITS)]


def test_text_that_is_no_blueprint_is_asked_for_once_more():
    asked = []

    def careless(image, instruction):
        asked.append(instruction)
        return blueprint_of(image, instruction) if asked.count(instruction) == 2 else "a picture of shapes"

    designs = list(FunctionDesigner(careless).design_each([EDITS[0].source], [EDITS[0].instruction]))
    assert designs[0].blueprint == EDITS[0].blueprint
    assert designs[0].repaired


def test_text_that_stays_no_blueprint_is_an_error_with_the_words():
    with pytest.raises(DesignError, match="a picture of shapes") as error:
        design(FunctionDesigner(lambda image, instruction: "a picture of shapes"))
    assert error.value.text == "a picture of shapes"


def test_design_error_of_the_function_is_of_its_picture_alone():
    def picky(image, instruction):
        if instruction == EDITS[1].instruction:
            raise DesignError("not this one")
        return blueprint_of(image, instruction)

    images, instructions = [edit.source for edit in EDITS], [edit.instruction for edit in EDITS]
    found = {made.index: made for made in FunctionDesigner(picky).design_each(images, instructions)}
    assert [found[index].blueprint for index in range(3)] == [EDITS[0].blueprint, None, EDITS[2].blueprint]
    assert str(found[1].error) == "not this one"


def test_other_errors_of_the_function_come_through():
    def broken(image, instruction):
        raise KeyError("a mistake in it")

    with pytest.raises(KeyError, match="a mistake in it"):
        design(FunctionDesigner(broken))


def test_prompt_is_rewritten_without_a_picture():
    designer = FunctionDesigner(lambda image, prompt: f"{prompt}, seen from {image}")
    assert designer.rewrite(["a bowl"]) == ["a bowl, seen from None"]


def test_cache_keeps_what_a_version_wrote(tmp_path):
    asked = []

    def counted(image, instruction):
        asked.append(instruction)
        return blueprint_of(image, instruction)

    for version in ("1", "1", "2"):
        design(FunctionDesigner(counted, version=version, cache=BlueprintCache(tmp_path)))
    assert len(asked) == 2 * len(EDITS)


def test_cache_without_a_version_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give `version`, too"):
        FunctionDesigner(blueprint_of, cache=BlueprintCache(tmp_path))


def test_what_cannot_be_called_is_refused():
    with pytest.raises(ValueError, match="has to be callable, but is 'gpt-4o'"):
        FunctionDesigner("gpt-4o")


def test_function_that_returns_no_text_is_refused():
    with pytest.raises(ValueError, match="has to return a text, but returned NoneType"):
        design(FunctionDesigner(lambda image, instruction: None))
