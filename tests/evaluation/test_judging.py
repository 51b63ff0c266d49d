"""What a judge is asked about a run's edits and what becomes of its answers, with a real server."""

import json
import multiprocessing
import os
import re
import signal
import threading
import time
from io import BytesIO

import pytest
from judge_server import REFUSAL, Reply, serve_judge
from miniatures import draw, write_imgedit
from PIL import Image
from tqdm.auto import tqdm

from diffusers_dim.data.engine.engine import Budget
from diffusers_dim.data.engine.records import Step
from diffusers_dim.designers import Conversation
from diffusers_dim.designers.openai import OpenAIDesigner
from diffusers_dim.evaluation.imgedit import ImgEdit
from diffusers_dim.evaluation.judging import judge_cases, without_thoughts


@pytest.fixture
def benchmark(tmp_path):
    write_imgedit(tmp_path / "data", 9)
    return ImgEdit(tmp_path / "data")


@pytest.fixture
def pictures(benchmark, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for case in benchmark.cases:
        draw(f"edit {case.key}", (40, 32)).save(folder / case.files[0])
    return folder


@pytest.fixture
def server():
    with serve_judge() as server:
        yield server


def judge_at(server, concurrency=4, **options):
    return OpenAIDesigner("rule", base_url=server.url, concurrency=concurrency, max_retries=0, **options)


def run(benchmark, pictures, server, tmp_path, **options):
    return judge_cases(benchmark, pictures, judge_at(server), tmp_path / "judged", progress=False, **options)


def say(server, replies):
    """Has a server answer by the instruction in the question; in turn, where there is a list."""
    judge, told = server.judge, {}

    def judge_or_say(text, pictures):
        for instruction, reply in replies.items():
            if instruction in text:
                turn = told[instruction] = told.get(instruction, -1) + 1
                reply = reply[min(turn, len(reply) - 1)] if isinstance(reply, list) else reply
                return reply if isinstance(reply, Reply) else Reply(delta={"content": reply})
        return judge(text, pictures)

    server.judge = judge_or_say


def test_the_judge_gets_the_text_then_the_files_of_source_and_edit(benchmark, pictures, server, tmp_path):
    answers = run(benchmark, pictures, server, tmp_path)
    assert list(answers) == [case.key for case in benchmark.cases]
    assert server.parts == [["text", "image", "image"]] * 9
    case = benchmark.cases[0]
    prompt = json.loads((benchmark.data / "prompts.json").read_text())[case.group]
    place = server.texts.index(prompt.replace("<edit_prompt>", case.prompt))
    assert server.pictures[place] == [case.image.read_bytes(), (pictures / case.files[0]).read_bytes()]
    assert all(not answer.reason and answer.parts["score"] for answer in answers.values())


def test_pictures_beyond_the_judges_size_are_sent_smaller(benchmark, pictures, server, tmp_path):
    judge = judge_at(server, max_image_pixels=20 * 16)
    judge_cases(benchmark, pictures, judge, tmp_path / "judged", progress=False)
    sent = [Image.open(BytesIO(data)) for both in server.pictures for data in both]
    assert {image.format for image in sent} == {"JPEG"}
    assert max(image.width * image.height for image in sent) <= 20 * 16


def test_an_unreadable_answer_is_asked_for_once_more(benchmark, pictures, server, tmp_path):
    first, second = benchmark.cases[:2]
    say(server, {first.prompt: ["Well done.", "Score: 4"], second.prompt: "Well done, and 5 of 5."})
    answers = run(benchmark, pictures, server, tmp_path)
    assert answers[first.key].parts == {"score": {"Score": 4}} and answers[first.key].texts == {"score": "Score: 4"}
    assert (answers[second.key].parts, answers[second.key].texts) == ({}, {"score": "Well done, and 5 of 5."})
    assert answers[second.key].reason.startswith('score: unreadable answer: there is no line such as "Name: 3"')
    assert "It wrote" not in answers[second.key].reason
    assert len(server.parts) == 9 + 2


def test_a_refusal_is_unscored_and_never_a_zero(benchmark, pictures, server, tmp_path):
    case = benchmark.cases[3]
    say(server, {case.prompt: Reply(delta={"refusal": REFUSAL})})
    answers = run(benchmark, pictures, server, tmp_path)
    scores = benchmark.score({}, pictures, answers, "rule")
    assert scores.cases[3].score is None and "refused" in scores.cases[3].reason
    assert (scores.figures["overall"].scored, scores.figures["overall"].cases) == (8, 9)


def test_the_next_run_asks_for_failures_alone(benchmark, pictures, server, tmp_path):
    rubbish, failed = benchmark.cases[0], benchmark.cases[5]
    broken = Reply(status=500, error={"message": "out of memory"})
    say(server, {rubbish.prompt: "Nice.", failed.prompt: [broken, "Score: 2"]})
    before = run(benchmark, pictures, server, tmp_path)
    assert "judge failed" in before[failed.key].reason and "out of memory" in before[failed.key].reason
    asked = len(server.parts)
    after = run(benchmark, pictures, server, tmp_path)
    assert len(server.parts) == asked + 1
    assert after[failed.key].parts == {"score": {"Score": 2}}
    assert {key: answer for key, answer in after.items() if key != failed.key} == {
        key: answer for key, answer in before.items() if key != failed.key
    }


def test_a_finished_run_asks_nothing_and_needs_no_server(benchmark, pictures, tmp_path):
    with serve_judge() as server:
        before = run(benchmark, pictures, server, tmp_path)
    assert run(benchmark, pictures, server, tmp_path) == before


def test_an_edit_that_was_painted_anew_is_judged_anew(benchmark, pictures, server, tmp_path):
    run(benchmark, pictures, server, tmp_path)
    draw("another", (40, 32)).save(pictures / benchmark.cases[0].files[0])
    run(benchmark, pictures, server, tmp_path)
    assert len(server.parts) == 10


def judge_in_a_process(benchmark, pictures, url, output):
    tqdm.set_lock(threading.RLock())  # the one that processes share would stay locked by a killed one
    judge = OpenAIDesigner("rule", base_url=url, concurrency=2, max_retries=0)
    judge_cases(benchmark, pictures, judge, output, progress=False)


def test_a_killed_run_goes_on_and_repeats_no_answer(benchmark, pictures, server, tmp_path):
    server.seconds = 0.1
    target = (benchmark, pictures, server.url, tmp_path / "judged")
    process = multiprocessing.get_context("fork").Process(target=judge_in_a_process, args=target)
    process.start()
    deadline = time.monotonic() + 60
    while len(server.parts) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before, server.seconds = server.asked.copy(), 0.0
    assert 5 <= sum(before.values()) < 9
    answers = run(benchmark, pictures, server, tmp_path)
    assert all(answer.parts for answer in answers.values())
    # At most the two that were under way come again.
    assert sum(count - 1 for count in server.asked.values()) <= 2


def test_missing_pictures_are_listed_and_nothing_is_asked(benchmark, pictures, server, tmp_path):
    gone, cut = benchmark.cases[2].files[0], pictures / benchmark.cases[4].files[0]
    (pictures / gone).unlink()
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is unfinished, .*: 2 problems:") as error:
        run(benchmark, pictures, server, tmp_path)
    assert gone in str(error.value) and cut.name in str(error.value)
    assert not server.parts


def test_what_there_is_can_be_judged_alone(benchmark, pictures, server, tmp_path):
    for case in benchmark.cases[1:]:
        (pictures / case.files[0]).unlink()
    answers = run(benchmark, pictures, server, tmp_path, only_present=True)
    assert len(server.parts) == 1
    assert [answer.reason for answer in answers.values()] == [""] + ["there is no picture"] * 8
    scores = benchmark.score({}, pictures, answers, "rule")
    assert (scores.figures["overall"].value, scores.figures["overall"].scored, scores.figures["overall"].cases) == (
        None,
        1,
        9,
    )


def test_an_empty_folder_is_refused_in_any_case(benchmark, server, tmp_path):
    with pytest.raises(ValueError, match="9 problems:"):
        run(benchmark, tmp_path / "none", server, tmp_path, only_present=True)


def test_a_picture_that_nobody_can_read_is_unscored(benchmark, pictures, server, tmp_path):
    (pictures / benchmark.cases[0].files[0]).write_bytes(b"no picture")
    answers = run(benchmark, pictures, server, tmp_path)
    assert "cannot be read as a picture" in answers[benchmark.cases[0].key].reason
    assert len(server.parts) == 8


def test_a_used_up_budget_is_told(benchmark, pictures, server, tmp_path):
    answers = run(benchmark, pictures, server, tmp_path, budget=Budget(calls=3))
    left = [answer for answer in answers.values() if answer.reason == "the budget was used up before it was judged"]
    assert len(left) == 6 and len(server.parts) == 3
    assert all(answer.parts for answer in run(benchmark, pictures, server, tmp_path).values())
    assert len(server.parts) == 9


class Asked(Step):
    """Reads one number, and of the earlier question what it read."""

    def __init__(self, name):
        self.name = name

    def conversation(self, sample):
        return Conversation((f"{self.name} of {sample.instruction}",), sample.pictures[-1])

    def read(self, text, sample):
        return {"scores": {"number": float(text)}}

    def depends_on(self, sample):
        return sample.columns.get("scores")


class TwoQuestions(ImgEdit):
    def questions(self):
        return (Asked("first"), Asked("second"))


def test_answers_of_several_questions_are_kept_apart(benchmark, pictures, server, tmp_path):
    benchmark = TwoQuestions(benchmark.data)
    case, other = benchmark.cases[:2]
    say(server, {f"second of {other.prompt}": "none", "first": "1", "second": "2"})
    answers = run(benchmark, pictures, server, tmp_path)
    assert answers[case.key].texts == {"first": "1", "second": "2"}
    assert answers[case.key].parts == {"first": {"number": 1.0}, "second": {"number": 2.0}}
    assert answers[other.key].texts == {"first": "1", "second": "none"}
    assert answers[other.key].parts == {} and answers[other.key].reason.startswith("second: unreadable answer")


def test_a_benchmark_without_questions_needs_no_judge(benchmark, pictures, server, tmp_path):
    benchmark.questions = lambda: ()
    with pytest.raises(ValueError, match="ImgEdit is scored without a judge"):
        run(benchmark, pictures, server, tmp_path)


def test_rows_hold_no_pictures(benchmark, pictures, server, tmp_path):
    run(benchmark, pictures, server, tmp_path)
    (rows,) = (tmp_path / "judged").glob("data-*.parquet")
    whole = sum(path.stat().st_size for path in pictures.iterdir())
    assert not any(path.read_bytes() in rows.read_bytes() for path in pictures.iterdir()) and whole


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\nA: 1\n</think>\nB: 4", "B: 4"),
        ("A: 1\n</think>\n\nB: 4", "B: 4"),
        ("<think>A: 1", ""),
        ("```\nA: 1\r\n<answer>\n```\n ", "```\nA: 1\r\n<answer>\n```\n "),
    ],
)
def test_thoughts_are_no_part_of_an_answer_and_all_else_is(text, answer):
    assert without_thoughts(text) == answer


def test_scores_in_a_judges_thoughts_do_not_count(benchmark, pictures, server, tmp_path):
    case = benchmark.cases[0]
    say(server, {case.prompt: Reply(delta={"reasoning_content": "Perhaps\nScore: 1", "content": "Score: 4"})})
    answer = run(benchmark, pictures, server, tmp_path)[case.key]
    assert answer.parts == {"score": {"Score": 4}} and not re.search("Perhaps", answer.texts["score"])
