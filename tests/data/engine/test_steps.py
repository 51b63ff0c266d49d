"""
What the steps ask, and what they read in answers of the shapes that vision-language models give, written by hand after
the habits of their families (no model was run for them).
"""

import io
import json
import time

import pytest
from PIL import Image

from diffusers_dim.data.engine.records import EngineSample, answer_key
from diffusers_dim.data.engine.steps import (
    ASPECTS,
    EDIT_STEPS,
    Assess,
    Caption,
    Imagine,
    Optimise,
    caption_steps,
)
from diffusers_dim.designers import Blueprint, BlueprintError


def write(color):
    file = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(file, "PNG")
    return file.getvalue()


def edit(instruction="Make it red.", **columns):
    return EngineSample("7", write("red"), write("blue"), instruction, columns=columns)


PLAIN = "Verdict: {}\nReason: The car turned red.\nEdit type: recolor"


@pytest.mark.parametrize(
    "text, verdict, reason, edit_type",
    [
        (PLAIN.format("fits"), "fits", "The car turned red.", "recolor"),
        (PLAIN.format("Partly"), "partly", "The car turned red.", "recolor"),
        (PLAIN.format("MISFITS."), "misfits", "The car turned red.", "recolor"),
        # GPT-4o: bold, sometimes with the colon outside.
        ("**Verdict:** fits\n**Reason:** A.\n**Edit type:** Recolor", "fits", "A.", "recolor"),
        ("**Verdict**: **partly**  \n**Reason**: A.  \n**Edit Type**: color change", "partly", "A.", "color change"),
        (
            "**Verdict: misfits**\n\n**Reason: The dog is gone.**\n\n**Edit type: remove**",
            "misfits",
            "The dog is gone.",
            "remove",
        ),
        # Qwen2.5-VL: fences, JSON, small ones all in a line.
        ('```json\n{"verdict": "fits", "reason": "A.", "edit_type": "add"}\n```', "fits", "A.", "add"),
        ('{"Verdict": "partly", "Reason": "A: \\"x\\".", "Edit type": "add"}', "partly", 'A: "x".', "add"),
        ('{"assessment": {"verdict": "misfits", "reason": "A.", "editType": "add"}}', "misfits", "A.", "add"),
        ("{'verdict': 'fits', 'reason': 'It is red.', 'edit_type': 'recolor'}", "fits", "It is red.", "recolor"),
        ('{\n  "verdict": "partly",\n  "reason": "A.",\n  "edit_type": "add",\n}', "partly", "A.", "add"),
        ("Verdict: partly Reason: No colour is named. Edit type: recolor", "partly", "No colour is named.", "recolor"),
        ("Verdict: fits. Reason: A. Edit type: add.", "fits", "A.", "add"),
        # Qwen3-VL, GLM-4.1V, MiMo-VL, Kimi: thoughts and boxes.
        (f"<think>Verdict: misfits? No.</think>\n\n{PLAIN.format('fits')}", "fits", "The car turned red.", "recolor"),
        (f"The car... Verdict: misfits.\n</think>\n{PLAIN.format('fits')}", "fits", "The car turned red.", "recolor"),
        (
            f"<think>Hm.</think><answer><|begin_of_box|>{PLAIN.format('partly')}<|end_of_box|></answer>",
            "partly",
            "The car turned red.",
            "recolor",
        ),
        ("Verdict: \\boxed{fits}\nReason: A.\nEdit type: add", "fits", "A.", "add"),
        # InternVL, Gemma: headings, lists, tables.
        ("### Verdict\nfits\n\n### Reason\nA.\nB.\n\n### Edit type\nadd", "fits", "A. B.", "add"),
        ("- Verdict: misfits\n- Reason: A.\n- Edit type: style", "misfits", "A.", "style"),
        ("1. **Verdict:** partly\n2. **Reason:** A.\n3. **Edit type:** `add`", "partly", "A.", "add"),
        ("| Verdict | fits |\n| Reason | A. |\n| Edit type | add |", "fits", "A.", "add"),
        ("Here is my assessment:\n\nVerdict – partly\nReason – A.\nEdit type – add", "partly", "A.", "add"),
        ("Verdict： fits\nReason： A.\nEdit type： add", "fits", "A.", "add"),
        # LLaVA, Llama: the word first, or its own words.
        ("Partly. The colour is not named.", "partly", "The colour is not named.", ""),
        ("misfits\nReason: A.", "misfits", "A.", ""),
        ("Verdict: fits", "fits", "", ""),
        ("Verdict: fits (the car is red)", "fits", "the car is red", ""),
        ("Verdict: The instruction does not fit the change.\nReason: A.", "misfits", "A.", ""),
        ("Verdict: It doesn't fully fit\nReason: A.", "partly", "A.", ""),
        ("Verdict: Partially fits\nReason: A.\nEdit type: add / remove", "partly", "A.", "add"),
        ("Verdict: misfits, since it is only partly visible\nReason: A.", "misfits", "A.", ""),
        ("Verdict: fits, but vague\nReason: A.", "partly", "A.", ""),
        ("Verdict: ambiguous\nReason: A.", "partly", "A.", ""),
        ("Verdict: No, it is unrelated\nReason: A.", "misfits", "A.", ""),
        ("Verdict: Yes, it matches\nReason: A.\nEdit type: Object Removal (single)", "fits", "A.", "object removal"),
        (
            "Final verdict: mismatch\nExplanation: A.\nType of edit: Background\n\nLet me know!",
            "misfits",
            "A.",
            "background",
        ),
        (
            "Verdict: partly\nReason: A.\n\nOn second thought:\nVerdict: fits\nReason: B.\nEdit type: add",
            "fits",
            "B.",
            "add",
        ),
        ("Verdict: fits\r\nReason: A.\r\nEdit type: add\r\n", "fits", "A.", "add"),
        ("> Verdict: fits\n> Reason: A.\n> Edit type: text", "fits", "A.", "text"),
        (
            "Verdict: fits\nReason: It says the type of car: red.\nEdit type: add",
            "fits",
            "It says the type of car: red.",
            "add",
        ),
    ],
)
def test_assessments_are_read(text, verdict, reason, edit_type):
    assert Assess().read(text, edit()) == {
        "assessment": verdict,
        "assessment_reason": reason,
        "edit_type": edit_type,
    }


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "no answer"),
        ("<think>Verdict: fits", "no answer"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("The two pictures are nice.", "Verdict"),
        ("Verdict: fits, partly or misfits\nReason: A.", "fits, partly or misfits"),
        ("Verdict: fits | partly | misfits\nReason: A.", "has to be one of"),
        ('{"verdict": "fits/partly/misfits", "reason": "A."}', "has to be one of"),
        ("Verdict: banana\nReason: A.", "banana"),
        ("Verdict: particularly nice\nReason: A.", "particularly nice"),
        ("Verdict: misfits", "Reason"),
        ('{"verdict": []}', "verdict is ''"),
        ("[1, 2]", "Verdict"),
        ("{" * 5000, "Verdict"),
    ],
)
def test_what_is_no_assessment_is_refused_and_the_error_says_why(text, problem):
    with pytest.raises(ValueError, match=problem):
        Assess().read(text, edit())


def test_misfits_are_dropped_with_the_judges_reason():
    step = Assess()
    columns = step.read(PLAIN.format("misfits"), edit())

    assert step.drop_reason(edit(), columns) == "misfits: The car turned red."
    assert step.drop_reason(edit(), step.read(PLAIN.format("partly"), edit())) is None
    assert step.drop_reason(edit(), step.read(PLAIN.format("fits"), edit())) is None


GOOD = "Paint the car in the center red."


@pytest.mark.parametrize(
    "text, instruction",
    [
        (GOOD, GOOD),
        (f'"{GOOD}"', GOOD),
        (f"“{GOOD}”", GOOD),
        (f"**{GOOD}**", GOOD),
        (f"`{GOOD}`", GOOD),
        (f"```\n{GOOD}\n```", GOOD),
        (f"Better instruction: {GOOD}", GOOD),
        (f"**Better instruction:** {GOOD}", GOOD),
        (f"**Rewritten Instruction:**\n\n{GOOD}", GOOD),
        (f"### Instruction\n{GOOD}", GOOD),
        (f"Here is the better instruction:\n\n{GOOD}", GOOD),
        (f"Sure! Here it is:\n{GOOD}\n\nThis says where the car is.", GOOD),
        (f'{{"better_instruction": "{GOOD}"}}', GOOD),
        (f'```json\n{{"instruction": "{GOOD}", "reason": "It says where."}}\n```', GOOD),
        (f"<think>The car is red.</think>\n\n{GOOD}", GOOD),
        (f"<answer>{GOOD}</answer>", GOOD),
        (f"<|begin_of_box|>{GOOD}<|end_of_box|>", GOOD),
        (f"Original instruction: Make it red.\nBetter instruction: {GOOD}", GOOD),
        (f"Instruction: {GOOD}\nExplanation: It says where.", GOOD),
        (f"Instruction: {GOOD} Explanation: It says where.", GOOD),
        (f"{GOOD}\n\nReason: it says where.", GOOD),
        ('Change the label to read "Notes: buy milk".', 'Change the label to read "Notes: buy milk".'),
        ("- Paint the car red.\n- Remove the dog.", "Paint the car red. Remove the dog."),
        ("1. Paint the car red.\n2. Remove the dog.", "Paint the car red. Remove the dog."),
        ("Paint the car red\nand the sky\nblue.", "Paint the car red and the sky blue."),
        ('Change the sign to "STOP: 3 < 4" and "GO".', 'Change the sign to "STOP: 3 < 4" and "GO".'),
        ('"STOP" has to become "GO"', '"STOP" has to become "GO"'),
        ('Replace the sign\'s text by "出口".', 'Replace the sign\'s text by "出口".'),
        (f"{GOOD}\n\nLet me know if you need anything else!", GOOD),
    ],
)
def test_instructions_are_read(text, instruction):
    assert Optimise().read(text, edit()) == {"better_instruction": instruction}


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "no answer"),
        ("<think>Paint it", "no answer"),
        ("I cannot assist with that.", "refusal"),
        ("I would paint the car red.", "no instruction"),
        ("The instruction is already complete.", "no instruction"),
        ("No change needed.", "no instruction"),
        ('{"edit": "Paint it red."}', "no instruction"),
        ("Better instruction: N/A", "no instruction"),
        ("把汽车涂成红色。", "not in English"),
        ("...", "not in English"),
        ("word " * 201, "201 words"),
        ('{"instruction": "Write \\u003cthink\\u003e on the car."}', "Edit Instruction"),
    ],
)
def test_what_is_no_instruction_is_refused_and_the_error_says_why(text, problem):
    with pytest.raises(ValueError, match=problem):
        Optimise().read(text, edit())


PARTS = (GOOD, "A blue car in the center.", "The car is blue.", "The car in the center.", "A red car.")
PLAN = Blueprint(*PARTS)


def test_a_blueprint_is_read_as_designers_read_it_and_begins_with_the_better_instruction():
    sample = edit(better_instruction="Paint the blue car red.")

    for text in (PLAN, f"<think>x</think>\n{PLAN}", f"```\n{PLAN}\n```", PLAN.replace("1. Edit", "**1. Edit")):
        prompt = Imagine().read(text, sample)["prompt"]
        assert prompt == Blueprint("Paint the blue car red.", *PARTS[1:])
        assert type(prompt) is str


def test_the_judges_first_part_stays_where_no_instruction_was_optimised():
    assert Imagine().read(PLAN, edit())["prompt"] == PLAN


def test_a_blueprint_whose_first_part_alone_is_missing_is_good():
    text = PLAN.split("\n", 1)[1]

    assert Imagine().read(text, edit(better_instruction=GOOD))["prompt"] == PLAN
    with pytest.raises(BlueprintError, match="Edit Instruction"):
        Imagine().read(text, edit())


def test_an_instruction_may_be_repeated_whatever_its_form():
    sample = edit("I want you to make it red", assessment="fits")

    assert Optimise().read("I want you to make it red", sample) == {"better_instruction": sample.instruction}
    with pytest.raises(ValueError, match="no instruction"):
        Optimise().read("I want you to make it blue", sample)


@pytest.mark.parametrize("words", ["In the target image it is red.", "It differs in the second image.", "Both images"])
def test_a_blueprint_that_speaks_of_the_pair_is_refused(words):
    with pytest.raises(ValueError, match="speaks of"):
        Imagine().read(str(Blueprint(*PARTS[:4], words)), edit(better_instruction=GOOD))


def test_a_blueprint_that_lacks_a_part_is_refused():
    with pytest.raises(BlueprintError, match="Edited Image Imagination"):
        Imagine().read(PLAN.rsplit("\n", 1)[0], edit(better_instruction=GOOD))


def test_the_judge_of_an_edit_sees_source_and_target_in_this_order():
    for step in EDIT_STEPS:
        conversation = step().conversation(edit())

        assert tuple(image.data for image in conversation.images) == edit().files
        assert [image.decode().getpixel((0, 0)) for image in conversation.images] == [(0, 0, 255), (255, 0, 0)]
        assert conversation.instruction == "Make it red."
        assert len(conversation.turns) == 1 and "Make it red." in conversation.turns[0]


def test_each_step_asks_with_what_was_found_before():
    judged = edit(assessment="partly", assessment_reason="It is vague.")
    better = edit(better_instruction=GOOD)

    assert "It was judged: partly. It is vague." in Optimise().conversation(judged).turns[0]
    assert "judged" not in Optimise().conversation(edit()).turns[0]
    assert GOOD in Imagine().conversation(better).turns[0]
    assert "Make it red." not in Imagine().conversation(better).turns[0]


def test_instructions_with_braces_are_asked_as_they_are():
    sample = edit("Write {assessment} and {x}.", assessment="partly", assessment_reason="{instruction}")

    turn = Optimise().conversation(sample).turns[0]

    assert "Write {assessment} and {x}." in turn and "partly. {instruction}" in turn


def test_an_answers_key_changes_with_what_was_asked_and_with_nothing_else():
    class Other(Imagine):
        prompt = "Write the five parts of {instruction}"

    def key(step, **columns):
        return answer_key(step, {"judge": 1}, edit(**columns))

    assert key(Assess()) == key(Assess(), assessment="fits")
    assert key(Optimise(), assessment="fits") != key(Optimise(), assessment="partly")
    assert key(Optimise(), assessment="fits") == key(Optimise(), assessment="fits", edit_type="add")
    assert key(Imagine(), better_instruction="a") != key(Imagine(), better_instruction="b")
    assert key(Imagine(), better_instruction="a", assessment="fits") == key(Imagine(), better_instruction="a")
    assert len({key(step()) for step in (*EDIT_STEPS, Other, Caption)}) == 5
    assert key(Caption()) != key(Caption({"Objects": "What?"}))


def test_a_sample_without_a_source_is_no_edit():
    with pytest.raises(ValueError, match="'8' has no source picture"):
        Assess().conversation(EngineSample("8", write("red")))


def picture(**columns):
    return EngineSample("9", write("red"), columns=columns)


FEW = {"Objects": "What is there?", "Spatial relations": "Where?", "Text": "What is written?"}
SEEN = {"Objects": "A red car.", "Spatial relations": "It is left."}


@pytest.mark.parametrize(
    "text",
    [
        "Objects: A red car.\n\nSpatial relations: It is left.\n\nText: none\n\nCaption: A car at left.",
        "**Objects:** A red car.\n**Spatial relations:** It is left.\n**Text:** None.\n\n**Caption:** A car at left.",
        "### Objects\nA red car.\n\n### Spatial Relations\n"
        "It is left.\n\n### Text\nNo text is visible.\n\n### Caption\nA car\nat left.",
        "1. Objects: A red car.\n2. Spatial relations: It is left.\n3. Text: N/A\n\nCaption: A car at left.",
        '```json\n{"objects": ["A red car."], "spatial_relations": "'
        'It is left.", "text": "none", "caption": "A car at left."}\n```',
        '{"aspects": {"Objects": "A red car.", "Spatial relations": "It is left."}, "caption": "A car at left."}',
        "<think>Caption: no</think>Objects: A red car. Spatial relations: "
        "It is left. Text: none Caption: A car at left.",
        "Objects - A red car.\nSpatial relations - "
        'It is left.\nText - There is no text in the picture.\nFinal caption: "A car at left."',
        "Objects:\n- A red car.\n\nSpatial relations:\n- "
        "It is left.\n\n---\n\nCaption:\nA car at left.\n\nLet me know if you would like more!",
    ],
)
def test_captions_are_read(text):
    assert Caption(FEW).read(text, picture()) == {"aspects": SEEN, "prompt": "A car at left."}


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "no answer"),
        ("A red car.", "no paragraph about Objects, Spatial relations, Text"),
        ("Objects: A red car.\nCaption: A red car.", "no paragraph about Spatial relations, Text"),
        ("Objects: A.\nSpatial relations: B.\nText: none", "Caption"),
        ("Objects: A.\nText: C.\nCaption: I'm sorry, I can't.", "Caption"),
    ],
)
def test_what_is_no_caption_is_refused_and_the_error_says_why(text, problem):
    with pytest.raises(ValueError, match=problem):
        Caption(FEW).read(text, picture())


def test_the_judge_is_asked_about_each_aspect_of_the_table():
    conversation = Caption().conversation(picture())

    assert len(conversation.images) == 1
    assert all(f"{name}: {question}" in conversation.turns[0] for name, question in ASPECTS.items())
    assert "Caption:" in conversation.turns[0]
    assert "Mood" not in Caption(FEW).conversation(picture()).turns[0]
    assert "Caption" not in Caption(FEW, "join").conversation(picture()).turns[0]
    assert "{" not in conversation.turns[0]


def run(steps, answers):
    sample = picture()
    for step, answer in zip(steps, answers, strict=True):
        sample.columns.update(step.read(answer, sample))
    return sample


def test_aspects_in_groups_are_merged_by_the_judge_in_a_last_call():
    steps = caption_steps(FEW, group_size=2)
    answers = ["Objects: A red car.\nSpatial relations: It is left.", "Text: STOP", "A car at left: STOP."]

    sample = run(steps, answers)

    assert [step.name for step in steps] == ["caption-1", "caption-2", "caption"]
    assert sample.columns == {"aspects": {**SEEN, "Text": "STOP"}, "prompt": "A car at left: STOP."}
    last = steps[-1].conversation(sample).turns[0]
    assert "Spatial relations: It is left.\nText: STOP" in last and "What is written?" not in last
    assert run(steps, [*answers[:2], "**Caption:** One."]).columns["prompt"] == "One."


def test_aspects_in_groups_are_joined_without_a_call():
    steps = caption_steps(FEW, group_size=2, merge="join")

    sample = run(steps, ["Objects: A red car.\nSpatial relations: It is left.", "Text: STOP"])

    assert sample.columns["prompt"] == "A red car. It is left. STOP"


def test_all_aspects_are_asked_in_one_call_by_default():
    assert [step.name for step in caption_steps()] == ["caption"]
    assert len(caption_steps(group_size=5)) == 4


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ({"aspects": {"Objects:": "?"}}, "plain words"),
        ({"aspects": {"caption": "?"}}, "plain words"),
        ({"aspects": {}, "merge": "join"}, "empty"),
        ({"merge": "both"}, "merge"),
    ],
)
def test_senseless_captions_are_refused(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        Caption(**arguments)


def test_groups_of_no_aspects_are_refused():
    with pytest.raises(ValueError, match="group_size"):
        caption_steps(group_size=0)


@pytest.mark.parametrize("step", [Assess(), Optimise(), Imagine(), Caption()], ids=lambda step: step.name)
@pytest.mark.parametrize(
    "text",
    [
        "{" * 20_000,
        '{"a":' * 20_000,
        "Verdict " * 5000,
        "*" * 40_000,
        "Reason: " * 5000,
        "\n" * 40_000 + "x",
        "Text - " * 5000,
    ],
)
def test_hostile_answers_cost_little_time(step, text):
    begin = time.perf_counter()
    try:
        step.read(text, picture() if step.name == "caption" else edit(better_instruction=GOOD))
    except ValueError:
        pass

    assert time.perf_counter() - begin < 2


def test_all_columns_are_json():
    found = [
        Assess().read(PLAIN.format("fits"), edit()),
        Optimise().read(GOOD, edit()),
        Imagine().read(PLAN, edit()),
        Caption(FEW).read("Objects: A.\nText: B.\nCaption: C.", picture()),
    ]

    assert json.loads(json.dumps(found)) == found
