import json
import logging

import pytest
from PIL import Image

from diffusers_dim.designers import DesignError
from diffusers_dim.designers.replay import ReplayDesigner
from diffusers_dim.tiny import sample_edits


EDITS = sample_edits(4, seed=0)
FIRST, SECOND = EDITS[:2]


@pytest.fixture
def folder(tmp_path):
    for number, edit in enumerate(EDITS):
        edit.source.save(tmp_path / f"{number}.png")
    return tmp_path


def write(folder, *rows):
    path = folder / "blueprints.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def full_rows():
    return [
        {"id": n, "image_path": f"{n}.png", "prompt": edit.blueprint, "instruction": edit.instruction}
        for n, edit in enumerate(EDITS)
    ]


def design(designer, *edits):
    return designer.design([edit.source for edit in edits], [edit.instruction for edit in edits])


def test_blueprints_are_found_by_picture_and_instruction(folder):
    designer = ReplayDesigner(write(folder, *full_rows()))
    assert design(designer, *reversed(EDITS)) == [edit.blueprint for edit in reversed(EDITS)]


def test_one_instruction_of_two_pictures_has_two_blueprints(folder):
    rows = [{**row, "instruction": "make it night"} for row in full_rows()]
    found = ReplayDesigner(write(folder, *rows)).design([SECOND.source, FIRST.source], ["make it night"] * 2)
    assert found == [SECOND.blueprint, FIRST.blueprint]


def test_two_instructions_of_one_picture_have_two_blueprints(folder):
    rows = [{**row, "image_path": "0.png"} for row in full_rows()[:2]]
    found = ReplayDesigner(write(folder, *rows)).design([FIRST.source] * 2, [FIRST.instruction, SECOND.instruction])
    assert found == [FIRST.blueprint, SECOND.blueprint]


def test_lines_of_dim_edit_are_found_by_the_picture(folder):
    rows = [{name: row[name] for name in ("id", "image_path", "prompt")} for row in full_rows()]
    found = ReplayDesigner(write(folder, *rows)).design([SECOND.source], ["whatever it is"])
    assert found == [SECOND.blueprint]


def test_lines_without_pictures_are_found_by_the_instruction(folder):
    rows = [{"prompt": row["prompt"], "instruction": row["instruction"]} for row in full_rows()]
    found = ReplayDesigner(write(folder, *rows)).design([FIRST.source], [f" {SECOND.instruction}\n"])
    assert found == [SECOND.blueprint]


def test_prompt_beside_a_blueprint_is_the_instruction(folder):
    row = {"image_path": "0.png", "prompt": "make it night", "blueprint": FIRST.blueprint}
    designer = ReplayDesigner(write(folder, row))
    assert designer.design([FIRST.source], ["make it night"]) == [FIRST.blueprint]
    with pytest.raises(DesignError):
        designer.design([FIRST.source], ["make it day"])


def test_what_is_for_just_this_comes_before_what_is_for_the_picture_or_the_instruction(folder):
    rows = [
        {"instruction": FIRST.instruction, "blueprint": EDITS[3].blueprint},
        {"image_path": "0.png", "prompt": EDITS[2].blueprint},
        full_rows()[0],
    ]
    designer = ReplayDesigner(write(folder, *rows))
    assert design(designer, FIRST) == [FIRST.blueprint]
    assert designer.design([FIRST.source], ["make it day"]) == [EDITS[2].blueprint]
    assert designer.design([SECOND.source], [FIRST.instruction]) == [EDITS[3].blueprint]


def test_pictures_are_relative_to_image_dir(folder, tmp_path_factory):
    elsewhere = write(tmp_path_factory.mktemp("elsewhere"), *full_rows())
    assert design(ReplayDesigner(elsewhere, image_dir=folder), FIRST) == [FIRST.blueprint]


def test_pictures_are_compared_by_what_a_person_sees(folder):
    turned = Image.linear_gradient("L").convert("RGB").resize((32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "0.png", exif=exif)
    designer = ReplayDesigner(write(folder, full_rows()[0]))
    upright = turned.transpose(Image.Transpose.ROTATE_270)
    assert designer.design([upright], [FIRST.instruction]) == [FIRST.blueprint]


def test_missing_blueprint_is_an_error_of_that_picture_alone(folder):
    designer = ReplayDesigner(write(folder, *full_rows()[1:]))
    images, instructions = [edit.source for edit in EDITS[:2]], [edit.instruction for edit in EDITS[:2]]
    found = {made.index: made for made in designer.design_each(images, instructions)}
    assert "blueprints.jsonl holds no blueprint for" in str(found[0].error) and found[0].blueprint is None
    assert found[1].blueprint == SECOND.blueprint


def test_missing_blueprint_may_leave_the_instruction(folder):
    designer = ReplayDesigner(write(folder, full_rows()[1]), on_failure="instruction")
    assert design(designer, FIRST) == [FIRST.instruction]


def test_text_that_is_no_blueprint_is_an_error_with_the_words(folder):
    designer = ReplayDesigner(write(folder, {**full_rows()[0], "prompt": "a picture of shapes"}))
    with pytest.raises(DesignError, match="a picture of shapes"):
        design(designer, FIRST)


def test_no_more_pictures_are_read_than_needed(folder):
    rows = [{**row, "instruction": "make it night"} for row in full_rows()]
    designer = ReplayDesigner(write(folder, *rows))
    (folder / "2.png").write_bytes(b"not looked at")
    assert designer.design([SECOND.source], ["make it night"]) == [SECOND.blueprint]
    (folder / "0.png").unlink()  # looked at, and known from now on
    assert designer.design([FIRST.source], ["make it night"]) == [FIRST.blueprint]


def test_broken_picture_is_passed_over_with_a_warning(folder, caplog):
    (folder / "0.png").write_bytes(b"no picture")
    rows = [{**row, "instruction": "make it night"} for row in full_rows()]
    with caplog.at_level(logging.WARNING):
        found = ReplayDesigner(write(folder, *rows)).design([SECOND.source], ["make it night"])
    assert found == [SECOND.blueprint]
    assert "blueprints.jsonl, line 1 is left out" in caplog.text and "0.png cannot be read" in caplog.text


def test_same_line_twice_is_one(folder):
    assert design(ReplayDesigner(write(folder, full_rows()[0], full_rows()[0])), FIRST) == [FIRST.blueprint]


def test_two_blueprints_for_one_path_are_refused(folder):
    rows = [full_rows()[1], full_rows()[0], {**full_rows()[0], "prompt": SECOND.blueprint}]
    with pytest.raises(ValueError, match="blueprints.jsonl, lines 2 and 3: two blueprints for the same"):
        ReplayDesigner(write(folder, *rows))


def test_two_blueprints_for_copies_of_a_picture_are_refused(folder):
    FIRST.source.save(folder / "copy.png")
    rows = [full_rows()[0], {**full_rows()[0], "image_path": "copy.png", "prompt": SECOND.blueprint}]
    designer = ReplayDesigner(write(folder, *rows))
    with pytest.raises(ValueError, match="lines 1 and 2: two blueprints for the same"):
        designer.design([SECOND.source], [FIRST.instruction])


def test_prompts_are_rewritten_by_the_text_alone(folder):
    designer = ReplayDesigner(write(folder, {"instruction": "a bowl", "prompt": "A blue bowl."}))
    assert designer.rewrite(["a bowl"]) == ["A blue bowl."]
    with pytest.raises(DesignError, match="no blueprint for 'a cup'.$"):
        designer.rewrite(["a cup"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is no JSON object"),
        ({"image_path": "0.png"}, "line 2: the blueprint has to be a text, but is None"),
        ({"image_path": "0.png", "prompt": " "}, "line 2: the blueprint has to be a text, but is ' '"),
        ({"image_path": 7, "prompt": "x"}, "line 2: the image_path has to be a text, but is 7"),
        ({"instruction": 7, "prompt": "x"}, "line 2: the instruction has to be a text, but is 7"),
        ({"prompt": "x"}, "line 2 has neither an `instruction` nor an `image_path`"),
    ],
)
def test_bad_line_is_named(folder, line, message):
    path = write(folder, full_rows()[0], line)
    with pytest.raises(ValueError) as error:
        ReplayDesigner(path)
    assert f"{path}, {message}" in str(error.value)


def test_file_without_lines_is_refused(folder):
    with pytest.raises(ValueError, match="blueprints.jsonl holds no samples"):
        ReplayDesigner(write(folder))
