import json

import pytest

from diffusers_dim.data import load_training_data
from diffusers_dim.designers import DesignError
from diffusers_dim.designers.function import FunctionDesigner
from diffusers_dim.designers.jobs import DesignJob
from diffusers_dim.tiny import sample_edits


EDITS = sample_edits(6, seed=0)


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def edits(tmp_path):
    rows = []
    for number, edit in enumerate(EDITS):
        edit.source.save(tmp_path / f"{number}.png")
        rows.append({"id": f"edit-{number}", "image_path": f"{number}.png", "instruction": edit.instruction})
    return write(tmp_path / "edits.jsonl", rows)


class Counted(FunctionDesigner):
    """Gives the edits' own blueprints; `broken` are the instructions that it fails for."""

    def __init__(self, *broken, **options):
        super().__init__(self.answer, **options)
        self.broken = broken
        self.asked = []

    def answer(self, image, instruction):
        self.asked.append(instruction)
        if instruction in self.broken:
            raise DesignError(f"no plan for {instruction!r}")
        return next(edit.blueprint for edit in EDITS if edit.instruction == instruction)


def run(edits, designer, chunk_size=4):
    job = DesignJob(edits, edits.with_name("out.jsonl"))
    return job.run(designer, chunk_size)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".png")


def test_output_holds_the_fields_that_training_reads(edits):
    rows = [{**row, "image_path_target": row["image_path"], "source": "mine"} for row in read(edits)]
    run(write(edits, rows), Counted())
    expected = [{**row, "prompt": edit.blueprint} for row, edit in zip(rows, EDITS, strict=True)]
    assert read(edits.with_name("out.jsonl")) == expected
    assert names(edits.parent) == ["edits.jsonl", "out.jsonl"]
    samples = load_training_data("edit", jsonl=edits.with_name("out.jsonl"))
    assert [samples[index]["prompt"] for index in range(len(samples))] == [edit.blueprint for edit in EDITS]


def test_prompt_is_the_instruction_where_there_is_no_other(edits):
    row = {"image_path": "0.png", "prompt": EDITS[0].instruction, "blueprint": "an older one"}
    run(write(edits, [row]), Counted())
    assert read(edits.with_name("out.jsonl")) == [
        {"id": 1, "image_path": "0.png", "prompt": EDITS[0].blueprint, "instruction": EDITS[0].instruction}
    ]


def test_summary_counts_what_became_of_the_lines(edits):
    summary = run(edits, Counted(EDITS[1].instruction))
    assert (summary.rows, summary.done, summary.failed, summary.kept) == (5, 5, 1, 0)


def test_failures_are_listed_and_alone_tried_again(edits):
    run(edits, Counted(EDITS[1].instruction))
    (failure,) = read(edits.with_name("out.failures.jsonl"))
    assert failure == {**read(edits)[1], "error": f"no plan for {EDITS[1].instruction!r}"}

    second = Counted()
    summary = run(edits, second)
    assert second.asked == [EDITS[1].instruction]
    assert (summary.rows, summary.done, summary.kept) == (6, 1, 5)
    assert [row["prompt"] for row in read(edits.with_name("out.jsonl"))] == [edit.blueprint for edit in EDITS]
    assert names(edits.parent) == ["edits.jsonl", "out.jsonl"]


def test_list_of_failures_is_an_input(edits):
    run(edits, Counted(EDITS[1].instruction))
    again = DesignJob(edits.with_name("out.failures.jsonl"), edits.with_name("mended.jsonl"))
    again.run(Counted(), chunk_size=4)
    assert read(edits.with_name("mended.jsonl"))[0]["prompt"] == EDITS[1].blueprint


def test_plain_instruction_is_counted_and_kept(edits):
    summary = run(edits, Counted(EDITS[1].instruction, on_failure="instruction"))
    assert (summary.rows, summary.done, summary.fallbacks, summary.failed) == (6, 6, 1, 0)
    assert read(edits.with_name("out.jsonl"))[1]["prompt"] == EDITS[1].instruction


@pytest.mark.parametrize("content", [None, b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_picture_that_cannot_be_read_fails_alone(edits, content):
    path = edits.with_name("2.png")
    path.unlink() if content is None else path.write_bytes(content)
    summary = run(edits, Counted())
    assert (summary.rows, summary.failed) == (5, 1)
    (failure,) = read(edits.with_name("out.failures.jsonl"))
    assert failure["id"] == "edit-2" and "2.png cannot be read as a picture" in failure["error"]


def test_stop_keeps_what_was_done_and_the_next_run_asks_for_the_rest(edits):
    stopped = Counted()

    def stop(image, instruction):
        if instruction == EDITS[3].instruction:
            raise KeyboardInterrupt
        return stopped.answer(image, instruction)

    with pytest.raises(KeyboardInterrupt):
        run(edits, FunctionDesigner(stop))
    assert [row["id"] for row in read(edits.with_name("out.unfinished.jsonl"))] == ["edit-0", "edit-1", "edit-2"]
    assert not edits.with_name("out.jsonl").exists()

    second = Counted()
    run(edits, second)
    assert second.asked == [edit.instruction for edit in EDITS[3:]]
    assert [row["id"] for row in read(edits.with_name("out.jsonl"))] == [f"edit-{number}" for number in range(6)]


def test_torn_line_is_dropped_and_asked_for_again(edits):
    run(edits, Counted())
    lines = edits.with_name("out.jsonl").read_text().splitlines(keepends=True)
    edits.with_name("out.jsonl").unlink()
    edits.with_name("out.unfinished.jsonl").write_text("".join(lines[3::-1]) + lines[4][:50])
    second = Counted()
    run(edits, second)
    assert second.asked == [edit.instruction for edit in EDITS[4:]]
    assert edits.with_name("out.jsonl").read_text() == "".join(lines)


def test_run_that_ended_before_its_file_was_renamed_needs_no_designer(edits):
    run(edits, Counted())
    whole = edits.with_name("out.jsonl").read_text()
    edits.with_name("out.jsonl").rename(edits.with_name("out.unfinished.jsonl"))
    assert run(edits, None).rows == 6
    assert edits.with_name("out.jsonl").read_text() == whole


def test_added_lines_are_all_that_is_asked_for(edits):
    rows = read(edits)
    run(write(edits, rows[2:]), Counted())
    second = Counted()
    run(write(edits, rows), second)
    assert second.asked == [edit.instruction for edit in EDITS[:2]]
    assert [row["id"] for row in read(edits.with_name("out.jsonl"))] == [row["id"] for row in rows]


def test_lines_of_one_task_are_asked_for_once(edits):
    rows = read(edits)
    designer = Counted()
    assert run(write(edits, [*rows, rows[0]]), designer).rows == 7
    assert len(designer.asked) == 6
    assert read(edits.with_name("out.jsonl"))[6]["prompt"] == EDITS[0].blueprint


def test_no_more_pictures_are_open_than_a_chunk_has(edits, monkeypatch):
    sizes = []
    designer = Counted()
    design_each = designer.design_each

    def counted(images, instructions):
        sizes.append(len(images))
        return design_each(images, instructions)

    monkeypatch.setattr(designer, "design_each", counted)
    run(edits, designer, chunk_size=4)
    assert sizes == [4, 2]


def test_words_that_utf_8_cannot_hold_are_kept(edits):
    blueprint = EDITS[0].blueprint + " \ud83d \u2028 ünï 🎨"
    run(write(edits, read(edits)[:1]), FunctionDesigner(lambda image, instruction: blueprint))
    (line,) = edits.with_name("out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(line)["prompt"].endswith("\ud83d \u2028 ünï 🎨")
    assert run(edits, None).kept == 1


@pytest.mark.parametrize("name", ["out.jsonl", "out.unfinished.jsonl"])
def test_file_of_another_input_is_refused_and_kept(edits, name):
    row = {**read(edits)[0], "id": "other", "prompt": "a plan"}
    path = write(edits.with_name(name), [row])
    with pytest.raises(ValueError, match=f"{name}, line 1 is of no line of .*edits.jsonl: choose another"):
        DesignJob(edits, edits.with_name("out.jsonl"))
    assert read(path) == [row]


def test_file_of_another_kind_is_refused_and_kept(edits):
    edits.with_name("out.jsonl").write_text("my notes")
    with pytest.raises(ValueError, match="out.jsonl, line 1 is not JSON"):
        DesignJob(edits, edits.with_name("out.jsonl"))
    assert edits.with_name("out.jsonl").read_text() == "my notes"


def test_input_as_output_is_refused(edits):
    with pytest.raises(ValueError, match="is the input itself"):
        DesignJob(edits, edits)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 7 is not JSON"),
        ({"id": 1, "instruction": "x"}, "line 7 lacks ['image_path']"),
        ({"image_path": "0.png"}, "line 7: `prompt` has to be a text that is not empty, but is None"),
        ({"image_path": "0.png", "instruction": " "}, "line 7: `instruction` has to be a text that is not empty"),
        ({"image_path": 7, "prompt": "x"}, "line 7: `image_path` has to be a text that is not empty, but is 7"),
    ],
)
def test_bad_line_is_named(edits, line, message):
    write(edits, [*read(edits), line])
    with pytest.raises(ValueError) as error:
        DesignJob(edits, edits.with_name("out.jsonl"))
    assert f"{edits}, {message}" in str(error.value)


def test_line_that_is_not_utf_8_is_named(edits):
    edits.write_bytes(edits.read_bytes() + b'{"image_path": "0.png", "prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="edits.jsonl, line 7 is not JSON"):
        DesignJob(edits, edits.with_name("out.jsonl"))
