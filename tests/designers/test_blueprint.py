import copy
import json
import pickle
import re
import time
from timeit import timeit

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diffusers_dim.designers.blueprint import HEADS, Blueprint, BlueprintError, strip_thoughts
from diffusers_dim.tiny.world import sample_edits


PARTS = (
    "Paint the door red.",
    "A door in the middle.\n\n- a lamp\n2. a step",
    "**Door**: green.",
    "The door.",
    "A red door.",
)
TEXT = """\
1. Edit Instruction: Paint the door red.
2. Global Layout Perception: A door in the middle.

- a lamp
2. a step
3. Local Object Perception: **Door**: green.
4. Edit Area Localization: The door.
5. Edited Image Imagination: A red door."""


@pytest.fixture
def blueprint():
    return Blueprint(*PARTS)


def survives(part):
    """Whether the constructor takes a part."""
    try:
        Blueprint("x", part, "x", "x", part)
    except BlueprintError:
        return False
    return True


def read(text):
    """The blueprint in a text, or None."""
    try:
        return Blueprint.parse(text)
    except BlueprintError:
        return None


# Lines as they stand in parts, and any text at all.
LINES = st.one_of(
    st.text(),
    st.sampled_from(
        [
            "",
            "- a door",
            "  - its handle",
            "2. the step",
            "10) b",
            "**Lamp**: lit",
            "# x",
            "---",
            "```",
            "| a | b |",
            "{",
        ]
    ),
    st.builds("{}{}".format, st.sampled_from(["1. ", "2. ", "- ", "**", "(3) ", "5、", "> ", "_", "* "]), st.text()),
)
PART = st.lists(LINES, min_size=1, max_size=6).map("\n".join).filter(survives)
BLUEPRINT = st.builds(Blueprint, PART, PART, PART, PART, PART)


def test_text_is_the_layout_that_the_painter_was_trained_on(blueprint):
    assert blueprint == TEXT
    assert blueprint.format() == TEXT
    assert type(blueprint.format()) is str


def test_fields_are_the_parts(blueprint):
    fields = [getattr(blueprint, head.lower().replace(" ", "_")) for head in HEADS]

    assert tuple(fields) == blueprint.parts == PARTS


def test_fields_cannot_be_changed(blueprint):
    with pytest.raises(AttributeError, match="edit_instruction"):
        blueprint.edit_instruction = "another"
    with pytest.raises(AttributeError, match="parts"):
        blueprint.parts = PARTS


def test_is_equal_to_its_text_and_has_its_hash(blueprint):
    assert {blueprint: 1}[TEXT] == 1
    assert json.loads(json.dumps(blueprint)) == TEXT


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_is_pickled(blueprint, protocol):
    again = pickle.loads(pickle.dumps(blueprint, protocol))

    assert type(again) is Blueprint and again == blueprint and again.parts == PARTS


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_is_copied(blueprint, copied):
    again = copied(blueprint)

    assert type(again) is Blueprint and again == blueprint and again.parts == PARTS


def test_repr_makes_an_equal_one(blueprint):
    assert "edit_area_localization='The door.'" in repr(blueprint)
    assert eval(repr(blueprint)).parts == PARTS


def test_blanks_and_rulers_at_the_ends_of_a_part_are_dropped():
    blueprint = Blueprint(" a\t", "\n\nb\n", "c\r\nd\r\n", "---\ne\n\n---\n", "f\n</blueprint>")

    assert blueprint.parts == ("a", "b", "c\nd", "e", "f")


@pytest.mark.parametrize("empty", ["", " \n\t", "---"])
def test_an_empty_part_is_refused(empty):
    with pytest.raises(ValueError, match=HEADS[3]) as caught:
        Blueprint("a", "b", "c", empty, "e")

    assert caught.value.missing == [HEADS[3]]


@pytest.mark.parametrize(
    "part",
    [
        "a\n1. Edit Instruction: b",
        "a\n  **Edit Area Localization**",
        "a\nedit instruction: b",
        "a\n```\nb",
        "a <think> b",
        "a </think> b",
        "a <answer> b",
        "a <|im_end|>",
    ],
)
def test_a_part_that_would_be_read_otherwise_is_refused(part):
    with pytest.raises(ValueError, match=HEADS[2]) as caught:
        Blueprint("a", "b", part, "d", "e")

    assert caught.value.missing == [HEADS[2]]


def test_parse_gives_a_blueprint_back_as_it_is(blueprint):
    assert Blueprint.parse(blueprint) is blueprint


def test_parse_reads_the_picture_worlds_blueprints():
    for sample in sample_edits(50, seed=0):
        assert Blueprint.parse(sample.blueprint) == sample.blueprint


@settings(deadline=None)
@given(BLUEPRINT)
@example(Blueprint(*PARTS))
@example(Blueprint("a", "2. b\n3. c", "* d\n  * e", "f  \n\n\n  g", "1. **h**: i: j - k"))
@example(Blueprint("{}", "Edit the instruction: a", '{"Edit Instruction": 1}', "** a", "**"))
def test_parse_reads_what_format_wrote(blueprint):
    again = Blueprint.parse(blueprint.format())

    assert again == blueprint
    assert again.parts == blueprint.parts


# Each keeps all words; the parts must have no line that is taken for more than it is.
PLAIN = st.lists(st.from_regex(r"[a-z]{1,9}[.,;:!?]?", fullmatch=True), min_size=1).map(" ".join)
DRESSES = [
    "{n}. {head}: {part}\n",
    "**{n}. {head}:** {part}\n\n",
    "{n}. **{head}**: {part}\n",
    "### {n}. {head}\n{part}\n\n---\n\n",
    "**{head}**\n\n{part}\n\n",
    "{head} - {part}\n",
    "({n}) {head}：{part}\n",
    "* **{n}) {head}:** {part}\n",
    "**{n}. {head}: {part}**\n",
    "{n}. {head}: {part} ",
]


@settings(deadline=None)
@given(st.tuples(PLAIN, PLAIN, PLAIN, PLAIN, PLAIN), st.sampled_from(DRESSES))
def test_parse_keeps_every_word_in_any_dress(parts, dress):
    text = "".join(dress.format(n=n, head=head, part=part) for n, (head, part) in enumerate(zip(HEADS, parts), 1))

    assert Blueprint.parse(text).parts == parts


@settings(deadline=None)
@given(st.lists(LINES, min_size=1, max_size=6).map("\n".join), st.integers(0, 4))
def test_parse_keeps_every_word_of_what_it_reads(part, place):
    parts = ["x"] * 5
    parts[place] = part
    text = "\n".join(f"{n}. {head}: {words}" for n, (head, words) in enumerate(zip(HEADS, parts), 1))
    found = read(text)

    if found:
        words = re.findall(r"\w+", re.sub(r"^[ \t]*```.*$", "", text, flags=re.MULTILINE))
        assert re.findall(r"\w+", found) == words


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.sampled_from(
            [
                "<think>",
                "</think>",
                "<answer>",
                "</answer>",
                "<|a",
                "|>",
                "```",
                "\n",
                "**",
                "1. ",
                " ",
                "x",
                ":",
                "- ",
            ]
            + ['{"', '": "', '"}', "---", "(", ")", *HEADS, *(f"\n{n}. {head}: y" for n, head in enumerate(HEADS, 1))]
        ),
        max_size=60,
    ).map("".join)
)
def test_parse_gives_a_blueprint_or_its_own_error(text):
    found = read(text)

    if found is not None:
        assert Blueprint.parse(str(found)).parts == found.parts


def test_the_last_complete_set_of_parts_counts():
    first, last = (Blueprint(f"{n} a", f"{n} b", f"{n} c", f"{n} d", f"{n} e") for n in ("first", "last"))
    begun = "1. Edit Instruction: begun\n2. Global Layout Perception: begun"

    assert Blueprint.parse(f"{first}\n\n{last}") == last
    assert Blueprint.parse(f"{last}\n\n{begun}") == last
    assert Blueprint.parse(f"{begun}\n\n{last}") == last


@pytest.mark.parametrize(
    ("text", "missing", "said"),
    [
        ("", list(HEADS), "missing: Edit Instruction, Global Layout Perception"),
        (TEXT.replace("The door.", ""), ["Edit Area Localization"], "empty: Edit Area Localization"),
        (TEXT.replace("4. Edit Area", "4. Area"), ["Edit Area Localization"], "missing: Edit Area Localization"),
        (
            TEXT.replace("4. ", "3. Local Object Perception: again\n4. "),
            ["Local Object Perception"],
            "more than once: Local Object Perception",
        ),
    ],
)
def test_parse_says_what_is_wrong(text, missing, said):
    with pytest.raises(BlueprintError) as caught:
        Blueprint.parse(text)

    assert caught.value.missing == missing
    assert said in str(caught.value)
    assert caught.value.text == text


def test_the_error_is_pickled():
    error = pickle.loads(pickle.dumps(BlueprintError("wrong", HEADS[:1], "text")))

    assert (str(error), error.missing, error.text) == ("wrong", [HEADS[0]], "text")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("A red door.", "A red door."),
        ("<think>Hm.</think>\n\nA red door.", "A red door."),
        ("Hm.</think>A red door.", "A red door."),
        ("<think>Hm. A red door.", ""),
        ("A red door. <think>Hm.", "A red door."),
        ("<think>a</think>A red <think>b</think>door.", "A red door."),
        ("<think>In <answer>.</think><answer>A red door.</answer>", "A red door."),
        ("<think>Hm.<answer>A red door.</answer>", "A red door."),
        ("Here: <answer>A red door.</answer> Done.", "A red door."),
        ("A red door.</answer>", "A red door."),
        ("<answer></answer>A red door.", "A red door."),
        ("<|begin_of_box|>A red door.<|end_of_box|>", "A red door."),
        ("```text\nA red door.\n```", "A red door."),
        ("◁think▷Hm.◁/think▷A red door.<|im_end|>", "A red door."),
    ],
)
def test_strip_thoughts_leaves_the_answer(text, answer):
    assert strip_thoughts(text) == answer


@pytest.mark.parametrize("start", ["", "<think>", '{"Edit Instruction": ', TEXT, "1. Edit Instruction: "])
@pytest.mark.parametrize(
    "repeated",
    ["<think>", "</think>", "<answer>", '{"a":', "[", "\n", " ", " \n", "\t", "*", "_", "```\n", "-\n", "1. ", "<|a"]
    + [
        "Edit Instruction:",
        "Edit Instruction (",
        "1. Edit Instruction: a ",
        "\n\nLet me know.",
        "Edit \n",
        TEXT + "\n",
    ],
)
def test_hostile_text_is_read_or_refused_within_a_second(start, repeated):
    text = start + (repeated * 100_000)[:100_000] + "x"

    # `timeit` holds back the garbage collector, which would walk through what all tests before have left.
    assert timeit(lambda: (read(text), strip_thoughts(text)), timer=time.process_time, number=1) < 1
