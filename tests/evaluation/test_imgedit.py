"""ImgEdit's cases and scores, beside the rule of the official scorer written down once more."""

import io
import json
import random
import re
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image

from diffusers_dim.data.engine.records import EngineSample, answer_key
from diffusers_dim.evaluation.benchmark import Answers
from diffusers_dim.evaluation.imgedit import ImgEdit, read_scores


ALL_TYPES = ("add", "adjust", "extract", "replace", "remove", "background", "style", "compose", "action")
PROMPTS = {
    edit_type: f"\nYou grade {edit_type} edits.\nediting instruction is : <edit_prompt>.\n\nBelow are the images:\n"
    for edit_type in ALL_TYPES
}


def write_imgedit(data: Path, count: int = 9, files=("basic_edit.json", "prompts.json"), sources: str = "") -> Path:
    """A miniature of the official layout, a case of each edit type in turn."""
    rows = {}
    for number in range(count):
        path = data / sources / f"animal/{number:09}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 32), (number * 5 % 256, 90, 160)).save(path)
        prompt = f'Make thing {number} larger, "so" to say.'
        edit_type = ALL_TYPES[number % len(ALL_TYPES)]
        rows[str(1000 - number)] = {"id": f"animal/{path.name}", "prompt": prompt, "edit_type": edit_type}
    (data / files[0]).parent.mkdir(parents=True, exist_ok=True)
    (data / files[0]).write_text(json.dumps(rows))
    (data / files[1]).write_text(json.dumps(PROMPTS))
    return data


def paint(benchmark: ImgEdit, pictures: Path) -> Path:
    """A picture for each case, all different."""
    pictures.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(benchmark.cases):
        Image.new("RGB", (32, 32), (20, number % 256, 40)).save(pictures / case.files[0])
    return pictures


def official_scores(results: Path, cases: Path) -> dict[str, float]:
    """
    By the rule: a score is the mean of the answer's lines of the form `Name: integer`, rounded to 2; a type's the mean
    over its keys, rounded to 2; overall the mean over the types.
    """
    meta, by_type = json.loads(cases.read_text()), defaultdict(list)
    for key, text in json.loads(results.read_text()).items():
        numbers = official_numbers(text)
        if numbers:
            by_type[meta[key]["edit_type"]].append(float(f"{sum(numbers) / len(numbers):.2f}"))
    means = {name: float(f"{sum(scores) / len(scores):.2f}") for name, scores in by_type.items()}
    return means | {"overall": float(f"{sum(means.values()) / len(means):.2f}")}


def official_numbers(text: str) -> list[int]:
    found = (re.fullmatch(r"(?:(?!: ).)*: (\d+)", line.strip(), re.DOTALL) for line in text.splitlines())
    return [int(match[1]) for match in found if match]


def answered(benchmark: ImgEdit, texts: dict[str, str]) -> dict[str, Answers]:
    """As a judge's answers are collected: without parts where there is nothing to read."""
    answers = {}
    for case in benchmark.cases:
        text = texts.get(case.key, "I cannot say.")
        parts = {"score": read_scores(text)} if official_numbers(text) else {}
        answers[case.key] = Answers({"score": text}, parts, "" if parts else "unreadable answer")
    return answers


@pytest.fixture
def data(tmp_path):
    return write_imgedit(tmp_path / "data")


@pytest.mark.parametrize(
    ("files", "sources"),
    [
        (("basic_edit.json", "prompts.json"), ""),
        (("basic_edit.json", "prompts.json"), "original_images"),
        (("basic_edit.json", "prompts.json"), "Benchmark/singleturn"),
        (("Benchmark/singleturn/singleturn.json", "Benchmark/singleturn/judge_prompt.json"), "Benchmark/singleturn"),
    ],
)
def test_cases_are_those_of_the_official_layout(tmp_path, files, sources):
    benchmark = ImgEdit(write_imgedit(tmp_path, 3, files, sources))
    assert [(case.key, case.group, case.files) for case in benchmark.cases] == [
        ("1000", "add", ("1000.png",)),
        ("999", "adjust", ("999.png",)),
        ("998", "extract", ("998.png",)),
    ]
    assert benchmark.cases[1].prompt == 'Make thing 1 larger, "so" to say.'
    assert all(case.image.is_file() for case in benchmark.cases)
    assert len(benchmark.questions()) == 1


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_judge_is_asked_in_the_types_own_words_before_it_sees_source_and_edit(data, tmp_path):
    benchmark = ImgEdit(data)
    source, edit = (png(Image.new("RGB", (8, 8), color)) for color in ("red", "blue"))
    sample = EngineSample("1000", edit, source, 'Say "<b>"', columns={"edit_type": "style"})
    asked = benchmark.questions()[0].conversation(sample)
    assert asked.turns == (PROMPTS["style"].replace("<edit_prompt>", 'Say "<b>"'),)
    assert [image.data for image in asked.images] == [source, edit] and asked.text_first


def test_answers_of_other_prompts_or_types_are_not_taken_for_these(data):
    sample = EngineSample("1", b"edit", b"source", "paint", columns={"edit_type": "add"})
    other = EngineSample("1", b"edit", b"source", "paint", columns={"edit_type": "style"})
    (question,) = ImgEdit(data).questions()
    (data / "prompts.json").write_text(json.dumps({**PROMPTS, "add": "Grade better: <edit_prompt>"}))
    (changed,) = ImgEdit(data).questions()
    assert (
        len({answer_key(*asked) for asked in ((question, {}, sample), (question, {}, other), (changed, {}, sample))})
        == 3
    )


ANSWERS = {
    "Brief reasoning: fine.\nPrompt Compliance: 5\nVisual Naturalness: 4\nPhysical & Detail Integrity: 4": [5, 4, 4],
    "Prompt Compliance: 4/5\nVisual Naturalness: 3": [3],
    "Score: 4.": [],
    "Score: 4.0\nOther: 2": [2],
    "Score: -3\nOther: 2": [2],
    "Score:4": [],
    "Score:  4": [],
    "  **Score**: 4  \n**Other: 4**": [4],
    "Score: 4\nScore: 2\nScore (2): 3": [4, 2, 3],
    "Reason: it is: 4": [],
    "a:: 3": [3],
    ": 4": [4],
    "Score: 100": [100],
    "Score: 4\r\nOther: 5\u2028Third: 1\x0bFourth: 2": [4, 5, 1, 2],
    "Score: \u0663": [3],
    "Score: 007": [7],
    "4\n5": [],
    "": [],
}


@pytest.mark.parametrize("text", ANSWERS)
def test_scores_are_read_as_the_official_scorer_reads_them(text):
    assert official_numbers(text) == ANSWERS[text]
    if ANSWERS[text]:
        assert list(read_scores(text).values()) == ANSWERS[text]
    else:
        with pytest.raises(ValueError, match='no line such as "Name: 3"'):
            read_scores(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [("Score: \u00b2", "is no number"), (f"Score: {'9' * 5000}", "is no number"), (f"A: {'9' * 400}", "too large")],
)
def test_what_the_official_scorer_breaks_off_at_is_unreadable(text, message):
    with pytest.raises(ValueError, match=message):
        read_scores(text)


def test_scores_agree_with_the_rule_for_any_text(data):
    words = [
        "Score",
        ": ",
        ":",
        " ",
        "4",
        "12",
        "\n",
        "\r\n",
        "\u2028",
        "\x1c",
        "\u0663",
        "/5",
        "-",
        "**",
        "\t",
        "\u3000",
    ]
    choose = random.Random(0)
    for _ in range(5000):
        text = "".join(choose.choices(words, k=choose.randrange(1, 14)))
        numbers = official_numbers(text)
        assert (list(read_scores(text).values()) if numbers else []) == numbers, text


@pytest.mark.parametrize("seed", range(20))
def test_figures_are_the_official_ones_to_the_last_digit(tmp_path, seed):
    choose = random.Random(seed)
    benchmark = ImgEdit(write_imgedit(tmp_path, 60))
    texts = {
        case.key: "\n".join(f"Part {part}: {choose.randrange(1, 6)}" for part in range(choose.randrange(1, 8)))
        for case in benchmark.cases
    }
    answers = answered(benchmark, texts)
    scores = benchmark.score({"model": "dim"}, tmp_path, answers, "rule")
    benchmark.export(tmp_path / "judged", scores, answers)
    expected = official_scores(tmp_path / "judged" / "result.json", tmp_path / "basic_edit.json")
    assert {name: figure.value for name, figure in scores.figures.items()} == expected
    assert list(scores.figures) == ["overall", *ALL_TYPES]
    assert all(
        figure.low <= figure.value + 0.005 and figure.value - 0.005 <= figure.high
        for figure in scores.figures.values()
    )


def test_unscored_cases_count_for_no_mean_and_are_told(tmp_path):
    benchmark = ImgEdit(write_imgedit(tmp_path, 18))
    texts = {case.key: "Score: 4" for case in benchmark.cases[:10]} | {benchmark.cases[0].key: "Score: 1\nOther: 2"}
    answers = answered(benchmark, texts)
    scores = benchmark.score({}, tmp_path, answers, "rule")
    assert (scores.figures["add"].value, scores.figures["add"].scored, scores.figures["add"].cases) == (2.75, 2, 2)
    assert (scores.figures["style"].value, scores.figures["style"].scored, scores.figures["style"].cases) == (
        4.0,
        1,
        2,
    )
    assert (scores.figures["overall"].scored, scores.figures["overall"].cases) == (10, 18)
    assert scores.figures["overall"].value == round((2.75 + 8 * 4) / 9, 2)
    assert (scores.cases[-1].score, scores.cases[-1].reason) == (None, "unreadable answer")

    benchmark.export(tmp_path / "judged", scores, answers)
    assert list(json.loads((tmp_path / "judged" / "result.json").read_text())) == list(texts)


def test_without_a_score_for_a_type_there_is_no_overall_score(data):
    benchmark = ImgEdit(data)
    answers = answered(benchmark, {case.key: "Score: 4" for case in benchmark.cases[:-1]})
    scores = benchmark.score({}, data, answers, "rule")
    assert scores.figures["action"].value is None and scores.figures["add"].value == 4.0
    overall = scores.figures["overall"]
    assert (overall.value, overall.low, overall.scored, overall.cases) == (None, None, 8, 9)


def test_scoring_without_a_judge_is_refused(data):
    with pytest.raises(ValueError, match="scored by a judge, but none was asked"):
        ImgEdit(data).score({}, data, None, "")


GOOD = {"id": "animal/000000000.jpg", "prompt": "paint", "edit_type": "add"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "edit_type": "alter"}, "'7': edit_type 'alter' is none of add, adjust, "),
        ({**GOOD, "id": "animal/none.jpg"}, "there is no source {data}/animal/none.jpg"),
        (
            {**GOOD, "id": "animal/../animal/000000000.jpg"},
            "'7': the id 'animal/../animal/000000000.jpg' leads out of the folder",
        ),
        ({"id": "animal/000000000.jpg", "prompt": "paint"}, "'7': has to have id, prompt, edit_type as texts"),
        ({**GOOD, "prompt": 3}, "'7': has to have id, prompt, edit_type as texts"),
        ({**GOOD, "prompt": " "}, "'7': there is no instruction"),
        ([], "'7': has to have id, prompt, edit_type as texts, but is []"),
    ],
)
def test_cases_that_make_no_sense_are_named(data, row, message):
    (data / "basic_edit.json").write_text(json.dumps({"8": GOOD, "7": row}))
    with pytest.raises(ValueError, match="1 problem:") as error:
        ImgEdit(data)
    assert message.format(data=data) in str(error.value)


def test_a_key_that_is_no_file_name_is_refused(data):
    (data / "basic_edit.json").write_text(json.dumps({"../8": GOOD}))
    with pytest.raises(ValueError, match=re.escape("'../8': the key has to be letters")):
        ImgEdit(data)


def test_of_many_problems_ten_are_listed(data):
    (data / "basic_edit.json").write_text(json.dumps({str(key): {**GOOD, "edit_type": "alter"} for key in range(30)}))
    with pytest.raises(ValueError, match="30 problems:") as error:
        ImgEdit(data)
    assert str(error.value).count("is none of") == 10 and str(error.value).endswith("and 20 more")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "basic_edit.json cannot be read: Expecting"),
        ("[1]", "has to be a JSON object, but is [1]"),
        ("{}", "holds no cases"),
        ('{"1": {}, "1": {}}', "the keys ['1'] come twice"),
    ],
)
def test_wrong_json_is_named(data, text, message):
    (data / "basic_edit.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        ImgEdit(data)


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no basic_edit.json"):
        ImgEdit(tmp_path)


def test_missing_prompts_are_named(data):
    (data / "prompts.json").write_text(json.dumps({**PROMPTS, "style": "no place for it", "add": None}))
    with pytest.raises(ValueError, match="2 problems:") as error:
        ImgEdit(data).questions()
    assert "there is no prompt for 'add' with <edit_prompt> in it" in str(error.value)
    (data / "prompts.json").unlink()
    with pytest.raises(ValueError, match="lacks the judge's prompts: put prompts.json into it"):
        ImgEdit(data).questions()
