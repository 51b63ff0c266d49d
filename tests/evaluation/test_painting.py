"""Runs of a benchmark's pictures, on the embedded model and a tiny model of text to image."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import run_on_terminal
from PIL import Image
from tqdm.auto import tqdm

from diffusers_dim import TINY_SHAPES, DIMEditPipeline, DIMPipeline
from diffusers_dim.designers import Draft, SelfDesigner
from diffusers_dim.evaluation.benchmark import Case
from diffusers_dim.evaluation.generation import RunSettings, check_pictures, missing_pictures, paint_cases
from diffusers_dim.tiny import sample_edits


pytestmark = pytest.mark.usefixtures("one_thread_on_the_cpu")

EDITS = sample_edits(5, seed=1)
SETTINGS = RunSettings("shapes", "shapes", "float32", 64, 64, steps=2)


@pytest.fixture(scope="module")
def pipe():
    pipe = DIMEditPipeline.from_pretrained(TINY_SHAPES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    found = []
    for number, edit in enumerate(EDITS):
        edit.source.save(folder / f"{number}.png")
        found.append(
            Case(
                f"case {number}", edit.instruction, edit.kind, (f"{edit.kind}/{number}.png",), folder / f"{number}.png"
            )
        )
    return found


def none_to_load(device, dtype):
    raise AssertionError("There was nothing to paint.")


@pytest.fixture(scope="module")
def finished(cases, pipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    paint_cases(lambda device, dtype: pipe, cases, output, SETTINGS)
    return output


def contents(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*.*") if path.is_file()}


def made_with(path: Path) -> dict:
    return json.loads(Image.open(path).info["parameters"])


def test_pictures_are_the_pipelines_edits_at_the_published_setting(finished, cases, pipe):
    for case in cases:
        expected = pipe(
            Image.open(case.image),
            case.prompt,
            height=64,
            width=64,
            num_inference_steps=2,
            guidance_scale=7.5,
            generator=torch.Generator().manual_seed(233),
        ).images[0]
        assert np.array_equal(Image.open(finished / "pictures" / case.files[0]), expected)


def test_a_source_of_another_shape_is_cut_in_its_centre(cases, pipe, tmp_path):
    source = Image.new("RGB", (96, 48), "white")
    source.paste(EDITS[0].source.resize((48, 48)), (24, 0))
    source.save(tmp_path / "wide.png")
    wide = replace(cases[0], image=tmp_path / "wide.png")
    paint_cases(lambda device, dtype: pipe, [wide], tmp_path / "run", SETTINGS)
    picture = Image.open(tmp_path / "run" / "pictures" / wide.files[0])
    expected = pipe(
        source.crop((24, 0, 72, 48)).resize((64, 64), Image.Resampling.BILINEAR),
        wide.prompt,
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(233),
    ).images[0]
    assert picture.size == (64, 64)
    assert np.abs(np.asarray(picture, int) - np.asarray(expected, int)).mean() < 2


def test_a_run_tells_what_it_was_made_with(finished, cases):
    run = json.loads((finished / "run.json").read_text())
    assert {name: run[name] for name in ("benchmark", "model", "dtype", "height", "width", "steps", "seed")} == {
        **{"benchmark": "shapes", "model": "shapes", "dtype": "float32"},
        **{"height": 64, "width": 64, "steps": 2, "seed": 233},
    }
    assert (run["guidance_scale"], run["designer"], run["cases"], len(run["digest"])) == (7.5, "", 5, 64)
    found = made_with(finished / "pictures" / cases[1].files[0])
    assert (found["key"], found["prompt"], found["seed"]) == ("case 1", cases[1].prompt, 233)
    assert found["blueprint"] is None
    rows = [json.loads(line) for line in (finished / "cases.jsonl").read_text().splitlines()]
    assert [(row["id"], row["prompt"], row["group"]) for row in rows] == [(c.key, c.prompt, c.group) for c in cases]
    assert all(Path(row["image_path"]).is_file() for row in rows)


def test_given_blueprints_are_painted_and_told(cases, pipe, tmp_path):
    blueprints = {case.key: str(edit.blueprint) for case, edit in zip(cases, EDITS)}
    settings = replace(SETTINGS, designer="replay")
    paint_cases(lambda device, dtype: pipe, cases[:1], tmp_path, settings, blueprints)
    picture = tmp_path / "pictures" / cases[0].files[0]
    expected = pipe(
        EDITS[0].source,
        blueprints["case 0"],
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(233),
    ).images[0]
    assert np.array_equal(Image.open(picture), expected)
    assert made_with(picture)["blueprint"] == blueprints["case 0"]

    changed = {**blueprints, "case 0": "Another plan."}
    with pytest.raises(ValueError, match="another run's .blueprint .*, now 'Another plan.'"):
        paint_cases(none_to_load, cases[:1], tmp_path, settings, changed)


def test_cases_without_a_blueprint_are_named(cases, tmp_path):
    with pytest.raises(ValueError, match="Cases without a blueprint: 4 problems:\ncase 1\ncase 2"):
        paint_cases(none_to_load, cases, tmp_path, SETTINGS, {"case 0": "paint it", "case 1": " "})
    with pytest.raises(ValueError, match="The designer 'gpt' gave no `blueprints`"):
        paint_cases(none_to_load, cases, tmp_path, replace(SETTINGS, designer="gpt"))


class Knowing(SelfDesigner):
    """The embedded model writes no blueprints, so that it is told one of the two."""

    def write(self, conversations, on_text):
        for place, conversation in enumerate(conversations):
            known = conversation.instruction == EDITS[0].instruction
            yield place, Draft(str(EDITS[0].blueprint) if known else "I do not know.")


def test_the_models_own_blueprints_are_told_and_found_again(cases, pipe, tmp_path):
    def load(device, dtype):
        pipe.designer = Knowing(pipe)
        return pipe

    settings = replace(SETTINGS, designer="self")
    paint_cases(load, cases[:2], tmp_path, settings, batch_size=2)
    told = [made_with(tmp_path / "pictures" / case.files[0])["blueprint"] for case in cases[:2]]
    assert told == [str(EDITS[0].blueprint), cases[1].prompt]
    paint_cases(none_to_load, cases[:2], tmp_path, settings)


def test_a_pipeline_that_designs_by_itself_does_not_unless_it_is_wanted(finished, cases, pipe, tmp_path):
    def load(device, dtype):
        pipe.designer = Knowing(pipe)
        return pipe

    paint_cases(load, cases[:1], tmp_path, SETTINGS)
    same = [Image.open(folder / "pictures" / cases[0].files[0]) for folder in (finished, tmp_path)]
    assert np.array_equal(*same) and pipe.designer is None


def test_a_prompt_has_as_many_pictures_as_the_benchmark_wants(t2i_folder, tmp_path):
    pipe = DIMPipeline.from_pretrained(t2i_folder)
    pipe.set_progress_bar_config(disable=True)
    cases = [
        Case(f"{index}", f"a photo of {index}", "counting", tuple(f"{index:05}/samples/{n:04}.png" for n in range(2)))
        for index in range(2)
    ]
    settings = replace(SETTINGS, benchmark="geneval")
    run = paint_cases(lambda device, dtype: pipe, cases, tmp_path, settings, batch_size=2)
    assert run["benchmark"] == "geneval"
    for case in cases:
        for index, file in enumerate(case.files):
            assert made_with(tmp_path / "pictures" / file)["seed"] == 233 + index
            expected = pipe(
                case.prompt,
                height=64,
                width=64,
                num_inference_steps=2,
                guidance_scale=7.5,
                generator=torch.Generator().manual_seed(233 + index),
            ).images[0]
            picture = Image.open(tmp_path / "pictures" / file)
            assert np.abs(np.asarray(picture, int) - np.asarray(expected, int)).max() <= 1


def test_a_finished_run_loads_no_model(finished, cases):
    before = contents(finished)
    paint_cases(none_to_load, cases, finished, SETTINGS)
    assert contents(finished) == before


def test_what_is_missing_is_all_that_is_painted(finished, cases, pipe, tmp_path):
    before = contents(finished)
    for name, data in before.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "pictures" / cases[2].files[0]).unlink()
    leftover = (tmp_path / "pictures" / cases[0].files[0]).with_name(".unfinished-1-0.png")
    leftover.write_bytes(b"half a picture of a killed run")
    kept = tmp_path / "pictures" / cases[1].files[0]
    written = kept.stat().st_mtime_ns
    paint_cases(lambda device, dtype: pipe, cases, tmp_path, SETTINGS, batch_size=1)
    assert contents(tmp_path) == before
    assert kept.stat().st_mtime_ns == written


def paint_in_a_process(pipe, cases, output):
    tqdm.set_lock(threading.RLock())  # the one that processes share would stay locked by a killed one
    paint_cases(lambda device, dtype: pipe, cases, output, SETTINGS)


def test_a_killed_run_goes_on_where_it_was(finished, cases, pipe, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=paint_in_a_process, args=(pipe, cases, tmp_path))
    process.start()
    deadline = time.monotonic() + 240
    while not (tmp_path / "pictures" / cases[1].files[0]).exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "pictures").rglob("*.png") if path.name[0] != "."}
    assert 2 <= len(kept) < 5
    paint_cases(lambda device, dtype: pipe, cases, tmp_path, SETTINGS)
    assert contents(tmp_path) == contents(finished)
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())


SCRIPT = """
import json, sys
from pathlib import Path
from accelerate.state import PartialState
from diffusers_dim import TINY_SHAPES, DIMEditPipeline
from diffusers_dim.evaluation.benchmark import Case
from diffusers_dim.evaluation.generation import RunSettings, paint_cases

rows, output, settings = json.loads(Path(sys.argv[1]).read_text())
cases = [Case(key, prompt, group, tuple(files), Path(image)) for key, prompt, group, files, image in rows]
load = lambda device, dtype: DIMEditPipeline.from_pretrained(TINY_SHAPES, dtype=dtype)
paint_cases(load, cases, output, RunSettings(**settings))
PartialState().destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_files_of_one(finished, cases, tmp_path):
    rows = [(case.key, case.prompt, case.group, case.files, str(case.image)) for case in cases]
    (tmp_path / "paint.py").write_text(SCRIPT)
    (tmp_path / "given.json").write_text(json.dumps([rows, str(tmp_path / "run"), asdict(SETTINGS)]))
    launch = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), "--dynamo_backend", "no"]
    command += [str(tmp_path / "paint.py"), str(tmp_path / "given.json")]
    result = run_on_terminal(command)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Pictures of 1 process in 2" in result.stderr and "3/3" in result.stderr
    assert contents(tmp_path / "run") == contents(finished)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 3}, "steps 2, now 3"),
        ({"seed": 1, "designer": "self"}, "seed 233, now 1; designer '', now 'self'"),
        ({"model": "other"}, "model 'shapes', now 'other'"),
    ],
)
def test_another_run_in_the_folder_is_refused(finished, cases, changes, message):
    before = contents(finished)
    with pytest.raises(ValueError, match="holds another run") as error:
        paint_cases(none_to_load, cases, finished, replace(SETTINGS, **changes))
    assert message in str(error.value)
    assert contents(finished) == before


def test_other_data_in_the_folder_are_refused(finished, cases, tmp_path):
    with pytest.raises(ValueError, match="cases 5, now 4; digest "):
        paint_cases(none_to_load, cases[:4], finished, SETTINGS)
    Image.new("RGB", (64, 64)).save(tmp_path / "other.png")
    other = [replace(cases[0], image=tmp_path / "other.png"), *cases[1:]]
    with pytest.raises(ValueError, match=r"holds another run \(digest "):
        paint_cases(none_to_load, other, finished, SETTINGS)


def test_data_that_were_moved_are_the_same(finished, cases, tmp_path):
    moved = []
    for case in cases:
        (tmp_path / case.image.name).write_bytes(case.image.read_bytes())
        moved.append(replace(case, image=tmp_path / case.image.name))
    paint_cases(none_to_load, moved, finished, SETTINGS)
    paint_cases(none_to_load, cases, finished, SETTINGS)


def test_pictures_in_the_way_are_named(finished, cases, tmp_path):
    foreign, cut, others = (tmp_path / "pictures" / case.files[0] for case in cases[:3])
    for path in (foreign, cut, others):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64)).save(foreign)
    cut.write_bytes((finished / "pictures" / cases[1].files[0]).read_bytes()[:-200])
    others.write_bytes((finished / "pictures" / cases[3].files[0]).read_bytes())
    with pytest.raises(ValueError, match="choose another --output: 3 problems:") as error:
        paint_cases(none_to_load, cases, tmp_path, SETTINGS)
    lines = str(error.value).splitlines()
    assert f"{foreign} is no result of this run" in lines and f"{cut} is cut short: remove it" in lines
    assert any(line.startswith(f"{others} is another run's (key 'case 3', now 'case 2'") for line in lines)


def test_broken_sources_are_listed_before_the_model_is_loaded(cases, tmp_path):
    (tmp_path / "cut.png").write_bytes(cases[0].image.read_bytes()[:-60])
    broken = [replace(cases[0], image=tmp_path / "cut.png"), replace(cases[1], image=tmp_path / "none.png"), cases[2]]
    with pytest.raises(ValueError, match="Sources: 2 problems:") as error:
        paint_cases(none_to_load, broken, tmp_path / "run", SETTINGS)
    assert "cut.png" in str(error.value) and "none.png" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_file_that_is_none_is_refused(cases, tmp_path):
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="run.json is no run's: choose another --output"):
        paint_cases(none_to_load, cases, tmp_path, SETTINGS)


@pytest.mark.parametrize("name", ["height", "width", "steps", "seed"])
def test_numbers_that_make_no_sense_are_named(name):
    with pytest.raises(ValueError, match=f"`{name}` has to be at least"):
        replace(SETTINGS, **{name: -1})


def test_unfinished_folders_are_refused_unless_what_there_is_will_do(finished, cases, tmp_path):
    many = [replace(cases[0], key=f"k{index}", files=(f"k{index}.png",)) for index in range(20)]
    (tmp_path / "k3.png").write_bytes((finished / "pictures" / cases[0].files[0]).read_bytes())
    Image.new("RGB", (9, 9)).save(tmp_path / "k4.png", "JPEG")  # as some models' results are named
    assert list(missing_pictures(many, tmp_path)) == [f"k{index}" for index in range(20) if index not in (3, 4)]
    with pytest.raises(ValueError, match="18 problems:\nk0.png\nk1.png\nk2.png\nk5.png") as error:
        check_pictures(many, tmp_path)
    assert str(error.value).endswith("k11.png\nand 8 more")
    check_pictures(many, tmp_path, only_present=True)
    with pytest.raises(ValueError, match="20 problems:"):
        check_pictures(many, tmp_path / "none", only_present=True)
