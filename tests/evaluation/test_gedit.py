import csv
import io
import math
import statistics
import time

import datasets
import numpy as np
import pytest
from PIL import Image

from diffusers_dim import FunctionDesigner
from diffusers_dim.data.engine.records import EngineSample
from diffusers_dim.evaluation.benchmark import Answers
from diffusers_dim.evaluation.gedit import GEdit, read_prompts, read_scores
from diffusers_dim.evaluation.judging import judge_cases


GROUPS = (
    "background_change color_alter material_alter motion_change ps_human style_change subject-add subject-remove "
    "subject-replace text_change tone_transfer"
).split()
PROMPTS = '''
import os
_context_no_delimit = """Judge it. Answer as JSON:
{ "score" : [...] }"""
_context = f"""{os.getcwd()}"""
_prompts_0shot_two_image_edit_rule = """Two pictures."""
_prompts_0shot_tie_rule_SC = """Was it done?
Editing instruction: <instruction>
"""
_prompts_0shot_rule_PQ = """One picture."""
_prompts_0shot_rule_PQ.missing_attribute
raise SystemExit("it was run")
'''


def picture(color, size=(40, 24), ending="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, ending)
    return {"bytes": file.getvalue(), "path": None}


def make_rows():
    rows = []
    for place, group in enumerate(GROUPS):
        for number in range(3):
            color = (place * 20, number * 80, 9)
            rows.append(
                {
                    "task_type": group,
                    "key": f"{place:02}{number}abc",
                    "instruction": f'Make it {number}, "so"\nand {group}, {{"score": 1}}',
                    "instruction_language": "cn" if number == 2 else "en",
                    "input_image": picture(color),
                    "input_image_raw": picture(color, (80, 48), "JPEG" if number else "PNG"),
                    "Intersection_exist": number == 0,
                }
            )
    return rows


def to_dataset(rows):
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("task_type", "key", "instruction", "instruction_language")}
        | {name: datasets.Image() for name in ("input_image", "input_image_raw")}
        | {"Intersection_exist": datasets.Value("bool")}
    )
    return datasets.Dataset.from_list(rows, features=features)


def write_parquet(folder, rows):
    """As on the Hub: rows in several files."""
    (folder / "data").mkdir(parents=True)
    half = len(rows) // 2
    to_dataset(rows[:half]).to_parquet(str(folder / "data" / "train-00000-of-00002.parquet"))
    to_dataset(rows[half:]).to_parquet(str(folder / "data" / "train-00001-of-00002.parquet"))
    (folder / "vie_prompts.py").write_text(PROMPTS)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("gedit"), make_rows())


def all_answers(benchmark):
    """Different ones; the first of each question is not always the lowest."""
    return {
        case.key: Answers(
            {},
            {
                "semantics": {"success": float(place % 11), "overediting": float(10 - place % 7)},
                "quality": {"naturalness": 8.5, "artifacts": float(3 + place % 5)},
            },
        )
        for place, case in enumerate(benchmark.cases)
    }


def expected(case_scores, keys):
    """Semantics, quality and O of some cases, by the paper's definitions."""
    rows = [case_scores[key] for key in keys]
    lowest = [(min(parts["semantics"].values()), min(parts["quality"].values())) for parts in rows]
    return [
        statistics.fmean(values)
        for values in zip(*((semantics, quality, math.sqrt(semantics * quality)) for semantics, quality in lowest))
    ]


@pytest.mark.parametrize("layout", ["parquet", "save_to_disk", "save_to_disk of splits"])
def test_reads_english_rows_with_the_official_files_names(data, tmp_path, layout):
    rows = make_rows()
    if layout != "parquet":
        dataset = to_dataset(rows)
        dataset = dataset if layout == "save_to_disk" else datasets.DatasetDict(train=dataset)
        dataset.save_to_disk(tmp_path / "data")
        data = tmp_path / "data"
    cases = GEdit(data).cases
    english = [row for row in rows if row["instruction_language"] == "en"]
    assert [case.files for case in cases] == [(f"fullset/{r['task_type']}/en/{r['key']}.png",) for r in english]
    assert [case.prompt for case in cases] == [row["instruction"] for row in english]
    assert [case.fields["Intersection_exist"] for case in cases] == [True, False] * 11
    assert GEdit.groups == tuple(GROUPS)


def test_chinese_instructions_are_an_option(data):
    cases = GEdit(data, language="cn").cases
    assert len(cases) == 11 and cases[0].files == ("fullset/background_change/cn/002abc.png",)
    with pytest.raises(ValueError, match='"en" or "cn", but is \'zh\''):
        GEdit(data, language="zh")


def test_edits_are_of_the_raw_picture_and_judged_beside_the_other(data, tmp_path):
    benchmark = GEdit(data)
    benchmark.prepare(tmp_path / "pictures")
    case = benchmark.cases[3]
    judged = tmp_path / "pictures" / "fullset" / "color_alter" / "en" / "011abc_SRCIMG.png"
    assert case.judged_image == judged and case.image == tmp_path / "sources/fullset/color_alter/en/011abc.png"
    with Image.open(judged) as image:
        assert image.format == "PNG" and image.size == (40, 24) and image.getpixel((0, 0)) == (20, 80, 9)
    with Image.open(case.image) as image:  # a JPEG file in the data
        assert image.format == "PNG" and image.size == (80, 48)
    assert len(list(tmp_path.rglob("*.png"))) == 44


def test_what_is_prepared_is_not_written_again(data, tmp_path):
    GEdit(data).prepare(tmp_path / "pictures")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    next(iter(times)).unlink()
    benchmark = GEdit(data)
    benchmark.prepare(tmp_path / "pictures")
    changed = [path for path, made in times.items() if path.stat().st_mtime_ns != made]
    assert changed == [next(iter(times))]
    assert all(case.image.exists() for case in benchmark.cases)


def test_pictures_that_cannot_be_read_are_all_named(tmp_path):
    rows = make_rows()
    rows[0]["input_image"] = {"bytes": b"\x89PNG\r\n\x1a\nand no more", "path": None}
    rows[4]["input_image_raw"] = None
    benchmark = GEdit(write_parquet(tmp_path / "data", rows))
    with pytest.raises(
        ValueError, match=r"(?s)2 problems.*000abc, input_image: .*011abc, input_image_raw: there is no"
    ):
        benchmark.prepare(tmp_path / "pictures")


def test_wrong_rows_are_all_listed(tmp_path):
    rows = make_rows()
    rows[0]["task_type"] = "colour"
    rows[1]["key"] = "../../up"
    rows[3]["instruction"] = " "
    rows[4]["Intersection_exist"] = None
    rows[7]["key"] = rows[6]["key"]
    rows[8]["key"] = rows[6]["key"]  # in Chinese: another picture's name
    with pytest.raises(ValueError) as error:
        GEdit(write_parquet(tmp_path / "data", rows))
    for told in ("5 problems", "'colour' is none of", "'../../up'", "row 3", "row 4", "'020abc' is there 2 times"):
        assert told in str(error.value)


def test_a_folder_without_such_data_is_refused(data, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"neither Parquet files nor what `datasets.save_to_disk` writes"):
            GEdit(folder)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and so on")
    with pytest.raises(ValueError, match="neither Parquet"):
        GEdit(tmp_path)
    to_dataset(make_rows()).remove_columns("input_image_raw").to_parquet(str(tmp_path / "broken.parquet"))
    with pytest.raises(ValueError, match=r"lacks the columns \['input_image_raw'\]"):
        GEdit(tmp_path)
    english = [row for row in make_rows() if row["instruction_language"] == "en"]
    with pytest.raises(ValueError, match="no row whose instruction_language is 'cn'"):
        GEdit(write_parquet(tmp_path / "english", english), language="cn")


def test_the_official_prompts_are_read_and_never_run(data):
    assert read_prompts(data) == {
        "semantics": 'Judge it. Answer as JSON:\n{ "score" : [...] }\nTwo pictures.\nWas it done?\n'
        "Editing instruction: <instruction>\n",
        "quality": 'Judge it. Answer as JSON:\n{ "score" : [...] }\nOne picture.',
    }


def test_prompts_may_be_json(tmp_path):
    (tmp_path / "vie_prompts.json").write_text('{"semantic": "Is it <instruction>?", "quality": "Good?"}')
    assert read_prompts(tmp_path) == {"semantics": "Is it <instruction>?", "quality": "Good?"}


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        (None, "", r"vie_prompts\.py of stepfun-ai/Step1X-Edit"),
        ("vie_prompts.py", '_context_no_delimit = "a"', r"lacks _prompts_0shot_two_image_edit_rule, .*_tie_rule_SC, "),
        ("vie_prompts.py", PROMPTS.replace("<instruction>", ""), "no <instruction>"),
        ("vie_prompts.py", "_context_no_delimit = (", r"vie_prompts\.py cannot be read"),
        ("vie_prompts.py", "(" * 5000, r"vie_prompts\.py cannot be read"),
        ("vie_prompts.json", '{"semantic": "<instruction>"}', "lacks quality"),
        ("vie_prompts.json", "[]", "lacks semantic, quality"),
        ("vie_prompts.json", "{", "cannot be read"),
    ],
)
def test_prompts_that_are_not_there_are_named(tmp_path, name, text, told):
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=told):
        read_prompts(tmp_path)


def test_semantics_is_asked_with_both_pictures_and_quality_with_the_edit_alone(data):
    semantics, quality = GEdit(data).questions()
    source, edit = picture("white")["bytes"], picture("red", (64, 64))["bytes"]
    sample = EngineSample("a", edit, source, "Paint it <instruction> red")
    asked = semantics.conversation(sample)
    assert asked.images[0].data == source
    asked = asked.decoded()
    assert [image.getpixel((0, 0)) for image in asked.images] == [(255, 255, 255), (255, 0, 0)]
    assert {image.size for image in asked.images} == {(40, 24)}  # the edit at the source's size
    assert asked.turns[0].endswith("Editing instruction: Paint it <instruction> red\n") and asked.text_first
    asked = quality.conversation(sample).decoded()
    assert [image.getpixel((0, 0)) for image in asked.images] == [(255, 0, 0)]
    assert asked.turns[0].endswith("One picture.") and asked.text_first


def test_another_prompt_asks_anew(data, tmp_path):
    (tmp_path / "vie_prompts.py").write_text(PROMPTS.replace("One picture", "A picture"))
    questions = [prompt for prompt in read_prompts(tmp_path).values()]
    settings = [question.settings for question in GEdit(data).questions()]
    assert [question in str(made).replace("\\n", "\n") for question, made in zip(questions, settings)] == [True, False]


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ('{"score" : [7, 5], "reasoning" : "fine"}', [7, 5]),
        ('```json\n{\n"score" : [7,\n5],\n"reasoning" : "a\nb {c}"\n}\n```', [7, 5]),
        ('Here it is: {"score": [10, 0], "reasoning": "x"} Bye.', [10, 0]),
        ('||V^=^V||\n{"score": [3, 9], "reasoning": "x"}\n||V^=^V|| {"score": [1, 1]}', [3, 9]),
        ('<think>{"score": [1, 1]}</think>{"score": [8.5, 9], "reasoning": ""}', [8.5, 9]),
        ('{"score": 4, "reasoning": "one"}', [4]),
        ('{"score": [1, 2, 3]}', [1, 2, 3]),
        ("My scores are [6, 0].", [6, 0]),
        (" 7\n", [7]),
        # Left out quotes are put in.
        ("{score: 7, reasoning: a good edit}", [7]),
        ('{"score" : [7, 5], "reasoning": a good edit}', [7, 5]),
        ('{"score" : [7, 5], reasoning: a good edit}', [7, 5]),
    ],
)
def test_answers_are_read_as_the_official_scorer_does(text, scores):
    assert read_scores(text) == scores


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I'm sorry, but I can't help with that.",
        "Semantics 7, overediting 5",
        "[7, 5, 3]",
        "11",
        '{"score": [7, 5], "reasoning": "he said "hi", and left"}',
        '{"score": ["7", "5"]}',
        '{"score": [7, 11]}',
        '{"score": [-1, 5]}',
        '{"score": [NaN, 5]}',
        '{"score": [true, 5]}',
        '{"score": []}',
        '{"score": null}',
        '{"score": {"a": 7}}',
        '{"scores": [7, 5]}',
        '{"score": [7, 5]} or {"score": [1, 2]}',
        "||V^=^V||[7, 5]||V^=^V||",
        '{"score": ' + "[" * 5000 + "}",
        '{"score": 1' + "0" * 5000 + "}",
        "<think>7",
    ],
)
def test_rubbish_is_no_score_and_never_a_guess(text):
    with pytest.raises(ValueError):
        read_scores(text)


@pytest.mark.parametrize("unit", ["[", "{", '":', "a", "a:", "||V^=^V||", '"a": ', "<think>"])
def test_hostile_answers_cost_little(unit):
    start = time.perf_counter()
    for text in (unit * 100_000, "{" + unit * (19_000 // len(unit)) + "}"):
        with pytest.raises(ValueError):
            read_scores(text)
    assert time.perf_counter() - start < 2


def test_figures_are_the_official_means(data, tmp_path):
    benchmark = GEdit(data)
    answers = all_answers(benchmark)
    scores = benchmark.score({}, tmp_path, answers, "gpt-4.1")
    parts = {key: answer.parts for key, answer in answers.items()}
    for prefix, numbers in (("", "01"), ("intersection/", "0")):
        rows = []
        for place, group in enumerate(GROUPS):
            rows.append(expected(parts, [f"{place:02}{number}abc" for number in numbers]))
            for measure, value in zip(("semantics/", "quality/", ""), rows[-1]):
                figure = scores.figures[f"{prefix}{measure}{group}"]
                assert figure.value == pytest.approx(value, abs=5.01e-4) and figure.value == round(figure.value, 3)
                assert (figure.scored, figure.cases) == (len(numbers), len(numbers))
        for measure, values in zip(("semantics/", "quality/", ""), zip(*rows)):
            figure = scores.figures[f"{prefix}{measure}overall"]
            assert figure.value == pytest.approx(statistics.fmean(values), abs=5.01e-4)
            assert (figure.scored, figure.cases) == (11 * len(numbers), 11 * len(numbers))
    low, high = scores.figures["overall"].low, scores.figures["overall"].high
    assert low <= scores.figures["overall"].value <= high
    assert [case.key for case in scores.cases] == [case.key for case in benchmark.cases]
    assert scores.judge == "gpt-4.1" and scores.cases[1].parts == {"semantics": 1, "quality": 4}


def test_the_papers_mean_leaves_text_change_out(data, tmp_path):
    scores = GEdit(data).score({}, tmp_path, all_answers(GEdit(data)), "")
    groups = [scores.figures[group].value for group in GROUPS if group != "text_change"]
    figure = scores.figures["overall without text_change"]
    assert figure.value == pytest.approx(statistics.fmean(groups), abs=1e-3) and figure.cases == 20


def test_unscored_cases_count_for_no_mean_and_are_told(data, tmp_path):
    benchmark = GEdit(data)
    answers = all_answers(benchmark)
    first, second, third, fourth = [case.key for case in benchmark.cases[:4]]
    answers[first] = Answers({"semantics": "No."}, reason="it refused")
    answers[third] = Answers({}, {"semantics": {"success": 1.0, "overediting": 1.0}})
    del answers[fourth]
    scores = benchmark.score({}, tmp_path, answers, "j")
    figure = scores.figures["background_change"]
    assert (figure.scored, figure.cases) == (1, 2) and figure.value == round(math.sqrt(1 * 4), 3)
    assert [case.reason for case in scores.cases[:4]] == [
        "it refused",
        "",
        "an answer is missing",
        "the judge was not asked",
    ]
    # A group without any score leaves its figure and the mean over groups empty.
    assert scores.figures["color_alter"].value is None and scores.figures["overall"].value is None
    assert (scores.figures["overall"].scored, scores.figures["overall"].low) == (19, None)
    assert scores.figures["intersection/overall"].value is None
    with pytest.raises(ValueError, match="scored by a judge"):
        benchmark.score({}, tmp_path, None, "")


def test_csvs_have_the_official_names_columns_and_rows(data, tmp_path):
    benchmark = GEdit(data)
    answers = all_answers(benchmark)
    answers[benchmark.cases[0].key] = Answers({}, reason="it refused")
    scores = benchmark.score({}, tmp_path, answers, "j")
    benchmark.export(tmp_path, scores, answers)
    folder = tmp_path / "dim" / "gpt4o" / "eval_results_new"
    names = {f"dim_{group}_gpt_score.csv" for group in (*GROUPS, "combined")}
    assert {path.name for path in folder.iterdir()} == names
    means = {}
    for group in GROUPS:
        with open(folder / f"dim_{group}_gpt_score.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        means[group] = np.mean([math.sqrt(float(r["sementics_score"]) * float(r["quality_score"])) for r in rows])
        assert f"{means[group]:.3f}" == f"{scores.figures[group].value:.3f}"
        assert len(rows) == scores.figures[group].scored
    assert f"{np.mean(list(means.values())):.3f}" == f"{scores.figures['overall'].value:.3f}"
    assert rows[0] == {
        "source_image": "fullset/tone_transfer/en/100abc_SRCIMG.png",
        "edited_image": "fullset/tone_transfer/en/100abc.png",
        "instruction": benchmark.cases[20].prompt,
        "sementics_score": "4",
        "quality_score": "3",
        "intersection_exist": "True",
        "instruction_language": "en",
    }
    with open(folder / "dim_combined_gpt_score.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.reader(file))) == 22


def test_a_judge_is_asked_both_questions_and_its_rubbish_is_unscored(data, tmp_path):
    benchmark = GEdit(data)
    pictures = tmp_path / "pictures"
    benchmark.prepare(pictures)
    for case in benchmark.cases:
        Image.new("RGB", (32, 32), "white").save(pictures / case.files[0])

    def judge(image, instruction):
        if image.getpixel((0, 0)) == (255, 255, 255):  # the edit, alone
            return '{"score": [4, 9], "reasoning": "clean"}'
        return "I cannot." if "tone_transfer" in instruction else '{"score": [9, 9], "reasoning": "done"}'

    answers = judge_cases(benchmark, pictures, FunctionDesigner(judge), tmp_path / "judged", progress=False)
    scores = benchmark.score({}, pictures, answers, "function")
    figure = scores.figures["style_change"]
    assert figure.value == 6 and scores.figures["semantics/style_change"].value == 9
    assert scores.figures["tone_transfer"].scored == 0
    assert [bool(case.reason) for case in scores.cases] == [case.group == "tone_transfer" for case in scores.cases]
