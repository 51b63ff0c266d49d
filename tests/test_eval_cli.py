import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import assert_refused, run_on_terminal
from PIL import Image, ImageChops
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from typer.testing import CliRunner

from diffusers_dim import TINY_SHAPES
from diffusers_dim.cli import app
from diffusers_dim.evaluation.benchmark import Scores
from diffusers_dim.files import read_picture


sys.path.append(str(Path(__file__).parent / "evaluation"))

import miniatures  # noqa: E402


FAST = ("--size", 64, "--steps", 1, "--batch-size", 32)
SCORES = "scores-m.json"


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def assert_done(result, code=0):
    assert result.exit_code == code, f"{result.output}\n{result.stderr}\n{result.exception!r}"
    return result


def assert_refused_with_list(result, *words):
    assert result.exit_code == 2, result.output
    assert "diffusers-dim: error: " in result.stderr
    for word in words:
        assert word in result.stderr


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def serve(monkeypatch):
    """Starts judges, `serve(refusals=0.1)`; they stop with the test."""
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    from judge_server import serve_judge

    started = []

    def start(**options):
        started.append(serve_judge(**options))
        return started[-1].__enter__()

    yield start
    for server in started:
        server.__exit__(None, None, None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The miniature benchmarks' folders by name."""
    folder = tmp_path_factory.mktemp("data")
    return {name: write(folder / name) for name, write in miniatures.WRITERS.items()}


@pytest.fixture(scope="module")
def painted_once(data, tmp_path_factory):
    """A run of ImgEdit that is painted and not yet scored; not to be changed."""
    output = tmp_path_factory.mktemp("runs") / "imgedit"
    assert_done(
        run(
            "imgedit",
            "--data",
            data["imgedit"],
            "--output",
            output,
            "--only",
            "generate",
            "--model",
            TINY_SHAPES,
            *FAST,
        )
    )
    return output


@pytest.fixture
def painted(painted_once, tmp_path):
    """A copy of it."""
    return shutil.copytree(painted_once, tmp_path / "run")


def judge(server, name="m", *options):
    return ("--judge-model", name, "--judge-base-url", server.url, *options)


def score(data, output, server, *options):
    return run("imgedit", "--data", data["imgedit"], "--output", output, "--only", "score", *judge(server), *options)


def test_imgedit_runs_from_model_to_report(data, serve, tmp_path):
    server = serve()
    output = tmp_path / "run"
    result = assert_done(
        run("imgedit", "--data", data["imgedit"], "--output", output, "--model", TINY_SHAPES, *FAST, *judge(server))
    )
    assert "9 pictures of 9 cases: " in result.stdout
    assert "9 cases judged: 9 calls (9 of them now), " in result.stdout
    keys = json.loads((data["imgedit"] / "basic_edit.json").read_text())
    assert {path.stem for path in (output / "pictures").glob("*.png")} == set(keys)
    assert set(json.loads((output / "judged" / "m" / "result.json").read_text())) == set(keys)
    overall = Scores.load(output / SCORES).figures["overall"]
    assert (overall.scored, overall.cases) == (9, 9)
    assert f"{overall.value:.2f}" in (output / "report.md").read_text(encoding="utf-8")
    for name in ("report.json", "report.tex", "model_index.yml", "plots/by_group.png", "sheets/add.png"):
        assert (output / name).is_file()


def test_gedit_runs_from_model_to_report(data, serve, tmp_path):
    server = serve()
    output = tmp_path / "run"
    result = assert_done(
        run("gedit", "--data", data["gedit"], "--output", output, "--model", TINY_SHAPES, *FAST, *judge(server))
    )
    assert "11 cases judged: 22 calls" in result.stdout
    pictures = sorted(path.name for path in (output / "pictures/fullset/color_alter/en").iterdir())
    assert pictures == [f"en{1:030x}.png", f"en{1:030x}_SRCIMG.png"]
    assert len(list((output / "judged" / "m").rglob("*_gpt_score.csv"))) == 12
    assert Scores.load(output / SCORES).figures["intersection/overall"].scored == 6


def test_shapes_run_without_data_judge_or_model(tmp_path):
    output = tmp_path / "run"
    result = assert_done(run("shapes", "--output", output, "--count", 6, "--steps", 1, "--batch-size", 6))
    assert "6 pictures of 6 cases" in result.stdout and "6 of 6" in result.stdout
    assert Scores.load(output / "scores.json").run["width"] == 64
    assert (output / "report.md").is_file()


def test_shapes_are_painted_from_blueprints(data, tmp_path):
    output, blueprints = tmp_path / "run", data["shapes"] / "blueprints.jsonl"
    options = ("--steps", 1, "--batch-size", 8, "--blueprints", blueprints, "--only", "generate")
    assert_done(run("shapes", "--data", data["shapes"], "--output", output, *options))
    with Image.open(output / "pictures" / "000003.png") as image:
        made_with = json.loads(image.info["parameters"])
    assert made_with["blueprint"] == read(blueprints)[3]["blueprint"]
    assert made_with["designer"].startswith("blueprints.jsonl ")


def test_geneval_is_scored_from_its_evaluators_results(data, t2i_folder, tmp_path):
    output = tmp_path / "run"
    options = ("--data", data["geneval"], "--output", output)
    assert_done(run("geneval", *options, "--model", t2i_folder, *FAST, "--only", "generate"))
    assert len(list((output / "pictures").glob("*/samples/*.png"))) == 24
    assert_refused_with_list(run("geneval", *options, "--only", "score"), "results.jsonl", "evaluate_images.py")
    miniatures.write_geneval_results(output)
    assert "overall             0.500" in assert_done(run("geneval", *options, "--only", "score")).stdout
    assert_done(run("geneval", *options, "--only", "report"))
    assert "**6 of 6**" in (output / "report.md").read_text(encoding="utf-8")


def test_geneval_paints_rewritten_prompts(data, t2i_folder, tmp_path):
    rewritten = tmp_path / "rewritten.jsonl"
    prompts = [row["prompt"] for row in read(data["geneval"] / "evaluation_metadata.jsonl")]
    rows = [{"prompt": prompt, "rewritten": f"Sharp: {prompt}"} for prompt in prompts]
    rewritten.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--data", data["geneval"], "--rewritten", rewritten, "--only", "generate", *FAST)
    assert_done(run("geneval", "--output", tmp_path / "run", "--model", t2i_folder, *options))
    assert read(tmp_path / "run" / "cases.jsonl")[0]["prompt"] == "Sharp: a photo of 1 benches"


def test_designer_rewrites_prompts_once(data, t2i_folder, serve, tmp_path):
    server = serve()
    designer = ("--designer", "openai", "--designer-model", "d", "--designer-base-url", server.url)
    options = ("--data", data["geneval"], "--output", tmp_path / "run", "--model", t2i_folder, *FAST)
    for _ in range(2):
        assert_done(run("geneval", *options, *designer, "--only", "generate"))
    assert len(server.requests) == 6
    row = read(tmp_path / "run" / "blueprints.jsonl")[0]
    assert row["instruction"] == "a photo of 1 benches" and row["prompt"] != row["instruction"]
    with Image.open(tmp_path / "run" / "pictures/00000/samples/0000.png") as image:
        assert json.loads(image.info["parameters"])["blueprint"] == row["prompt"]


def test_mjhq_runs_from_model_to_report_with_another_networks_features(data, t2i_folder, tmp_path):
    pytest.importorskip("torchmetrics")
    output, clip = tmp_path / "run", miniatures.write_clip(tmp_path / "tiny-clip")
    options = ("--data", data["mjhq"], "--output", output, "--model", t2i_folder, "--features", clip, *FAST)
    result = assert_done(run("mjhq", *options))
    assert len(list((output / "pictures").glob("*/*.png"))) == 20 and "20 of 20" in result.stdout
    scores = Scores.load(output / "scores.json")
    pairs = []
    for folder, ending in ((data["mjhq"] / "mjhq30k_imgs", "jpg"), (output / "pictures", "png")):
        files = sorted(folder.glob(f"*/*.{ending}"))
        assert len(files) == 20
        pairs.append(_embed(clip, files))
    assert scores.figures["overall"].value == pytest.approx(_frechet(*pairs), rel=1e-3)
    assert scores.run["features"] == "tiny-clip" and "tiny-clip" in scores.run["fid"]
    report = (output / "report.md").read_text()
    assert report.startswith("# MJHQ-30K, Fréchet distance by tiny-clip") and "published" not in report
    assert "type: fid" not in (output / "model_index.yml").read_text()
    again = assert_done(run("mjhq", *options[:4], "--only", "score", "--features", clip))
    assert "20 of 20" in again.stdout and Scores.load(output / "scores.json") == scores


def _embed(model, files):
    from transformers import CLIPModel

    network = CLIPModel.from_pretrained(model)
    pixels = []
    for file in files:
        channels = np.asarray(read_picture(file), np.float32).transpose(2, 0, 1)
        sized = [Image.fromarray(channel).resize((28, 28), Image.Resampling.BICUBIC) for channel in channels]
        pixels.append(np.stack([np.asarray(channel) for channel in sized]).round().clip(0, 255) / 255)
    mean, std = (np.array(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    with torch.no_grad():
        pixels = torch.tensor((np.stack(pixels) - mean) / std, dtype=torch.float32)
        return network.get_image_features(pixel_values=pixels).pooler_output.double().numpy()


def _frechet(real, made):
    covariances = [np.cov(features, rowvar=False) for features in (real, made)]
    root = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0)).sum()
    return np.square(real.mean(0) - made.mean(0)).sum() + sum(map(np.trace, covariances)) - 2 * root


def test_mjhq_says_where_the_weights_of_fid_go(data, t2i_folder, tmp_path):
    output = tmp_path / "run"
    result = run("mjhq", "--data", data["mjhq"], "--output", output, "--model", t2i_folder, *FAST)
    if result.exit_code:  # without torch-fidelity, or Inception's weights
        assert_refused_with_list(result, "--features", "torch-fidelity")
    else:
        assert "20 of 20" in result.stdout


@pytest.mark.parametrize(
    ("features", "told"),
    [("none", "--features none: "), (f"{TINY_SHAPES}/text_encoder", "has to be a CLIP or DINOv2 model")],
)
def test_features_of_no_such_network_are_refused(data, t2i_folder, tmp_path, features, told):
    options = ("--data", data["mjhq"], "--output", tmp_path, "--model", t2i_folder, "--features", features, *FAST)
    assert_refused_with_list(run("mjhq", *options, "--limit", 10), told)


def test_judge_sees_text_then_source_then_edit(data, painted, serve):
    server = serve()
    assert_done(score(data, painted, server))
    assert server.parts == [["text", "image", "image"]] * 9
    keys = {row["prompt"]: (row["image_path"], row["files"][0]) for row in read(painted / "cases.jsonl")}
    for text, pictures in zip(server.texts, server.pictures, strict=True):
        ((source, edit),) = (files for prompt, files in keys.items() if prompt in text)
        assert pictures == [Path(source).read_bytes(), (painted / "pictures" / edit).read_bytes()]


def test_refusals_and_rubbish_are_unscored_and_reported(data, painted, serve):
    server = serve(refusals=0.25, rubbish=0.25)
    result = assert_done(score(data, painted, server), code=1)
    scores = Scores.load(painted / SCORES)
    unscored = {case.key: case.reason for case in scores.cases if case.score is None}
    assert any("refused" in reason for reason in unscored.values())
    assert any("unreadable answer" in reason for reason in unscored.values())
    overall = scores.figures["overall"]
    assert (overall.scored, overall.cases) == (9 - len(unscored), 9)
    assert f"{overall.scored} of 9" in result.stdout and "run again to ask it again" in result.stderr
    assert set(json.loads((painted / "judged" / "m" / "result.json").read_text())).isdisjoint(unscored)
    assert_done(run("imgedit", "--data", data["imgedit"], "--output", painted, "--only", "report"))
    report = (painted / "report.md").read_text(encoding="utf-8")
    assert all(key in report for key in unscored)


def test_only_the_judges_failures_are_asked_again(data, painted, serve):
    server = serve(refusals=0.25, rubbish=0.25)
    assert_done(score(data, painted, server), code=1)
    failed = sum("refused" in case.reason for case in Scores.load(painted / SCORES).cases)
    before = len(server.texts)
    server.refusals = server.rubbish = 0.0
    assert_done(score(data, painted, server))
    assert len(server.texts) - before == failed


def test_budget_stops_the_judge_and_a_larger_one_goes_on(data, painted, serve):
    server = serve()
    stopped = assert_done(score(data, painted, server, "--budget-calls", 4), code=1)
    assert "stopped by the budget of calls: 4" in stopped.stderr and "4 of 9" in stopped.stdout
    assert_done(score(data, painted, server))
    assert set(server.asked.values()) == {1}


def test_prices_are_counted(data, painted, serve):
    prices = ("--price-prompt", 2, "--price-answer", 10)
    result = assert_done(score(data, painted, serve(), *prices))
    summary = json.loads((painted / "judged" / "m" / "summary.json").read_text())
    assert f"at a price of {(2 * summary['prompt_tokens'] + 10 * summary['tokens']) / 1e6:.4f}" in result.stdout


def test_two_judges_are_reported_with_their_agreement(data, painted, serve):
    assert_done(score(data, painted, serve()))
    other = judge(serve(shift=1), "m", "--judge-name", "lab/second")
    options = ("--data", data["imgedit"], "--output", painted)
    assert_done(run("imgedit", *options, "--only", "score", *other))
    assert_done(run("imgedit", *options, "--only", "report"))
    report = json.loads((painted / "report.json").read_text())
    (agreement,) = report["agreement"]
    assert (sorted(agreement["judges"]), agreement["pairs"]) == (["lab/second", "m"], 9)


def test_subset_says_n_of_all(data, serve, tmp_path):
    output = tmp_path / "run"
    options = ("--data", data["imgedit"], "--output", output, "--model", TINY_SHAPES, *FAST, *judge(serve()))
    result = assert_done(run("imgedit", *options, "--limit", 3))
    assert "3 pictures of 3 of 9 cases" in result.stdout
    scores = Scores.load(output / SCORES)
    assert [case.group for case in scores.cases if case.score is not None] == ["add", "replace", "style"]
    assert {case.reason for case in scores.cases} == {"", "left out by --limit"}
    assert scores.run["subset"] == "3 of 9 cases, evenly drawn"
    assert "3 of 9" in (output / "report.md").read_text(encoding="utf-8")


def test_subset_of_text_to_image_says_n_of_all(data, t2i_folder, tmp_path):
    output = tmp_path / "run"
    options = ("--data", data["geneval"], "--output", output)
    assert_done(run("geneval", *options, "--model", t2i_folder, *FAST, "--only", "generate", "--limit", 2))
    miniatures.write_geneval_results(output)
    result = assert_done(run("geneval", *options, "--only", "score"))
    assert "2 of 6" in result.stdout
    scores = Scores.load(output / "scores.json")
    assert (len(scores.cases), scores.figures["correct images"].cases) == (6, 6)


def test_designers_blueprints_are_painted_from_and_asked_for_once(data, serve, tmp_path):
    server = serve()
    designer = ("--designer", "openai", "--designer-model", "lab/d", "--designer-base-url", server.url)
    options = ("--data", data["imgedit"], "--output", tmp_path / "run", "--model", TINY_SHAPES, *FAST)
    for _ in range(2):
        assert_done(run("imgedit", *options, *designer, "--only", "generate"))
    assert len(server.requests) == 9
    blueprints = {row["id"]: row["prompt"] for row in read(tmp_path / "run" / "blueprints.jsonl")}
    for key, blueprint in blueprints.items():
        with Image.open(tmp_path / "run" / "pictures" / f"{key}.png") as image:
            made_with = json.loads(image.info["parameters"])
        assert (made_with["blueprint"], made_with["designer"]) == (blueprint, "lab/d")


def test_half_finished_folder_is_listed(data, painted, serve):
    for key in ("1001", "1004"):
        (painted / "pictures" / f"{key}.png").unlink()
    result = score(data, painted, serve())
    assert_refused_with_list(result, "unfinished", "1001.png", "1004.png")
    assert not (painted / SCORES).exists()


def test_stopped_run_paints_what_is_missing(data, painted):
    times = {path: path.stat().st_mtime_ns for path in (painted / "pictures").iterdir()}
    lost = painted / "pictures" / "1001.png"
    before = lost.read_bytes()
    lost.unlink()
    options = ("--data", data["imgedit"], "--output", painted, "--model", TINY_SHAPES, "--only", "generate", *FAST)
    assert_done(run("imgedit", *options))
    changed = {path for path in times if path.stat().st_mtime_ns != times[path]}
    assert changed == {lost} and lost.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--steps", 2), ("steps 1, now 2",)),
        (("--seed", 1), ("seed 233, now 1",)),
        (("--limit", 3), ("cases 9, now 3",)),
    ],
)
def test_another_run_in_the_folder_is_refused(data, painted, options, words):
    given = ("--data", data["imgedit"], "--output", painted, "--model", TINY_SHAPES, "--only", "generate", *FAST)
    assert_refused(run("imgedit", *given, *options), "holds another run", "choose another --output", *words)


def test_another_benchmarks_folder_is_refused(data, painted):
    options = ("--data", data["gedit"], "--output", painted, "--model", TINY_SHAPES, "--only", "generate", *FAST)
    assert_refused(run("gedit", *options), "holds a run of imgedit, not of gedit")


def test_folder_without_a_run_is_refused(data, serve, tmp_path):
    assert_refused(score(data, tmp_path / "none", serve()), "holds no run", "generate first")


def test_report_before_scores_is_refused(data, painted):
    assert_refused(
        run("imgedit", "--data", data["imgedit"], "--output", painted, "--only", "report"),
        "holds no scores: score first",
    )


def test_data_that_changed_are_refused(painted, serve, tmp_path):
    changed = {"imgedit": miniatures.write_imgedit(tmp_path / "data")}
    miniatures.draw("another").save(changed["imgedit"] / "singleturn/animal/000000004.jpg")
    assert_refused(score(changed, painted, serve()), "digest")


def test_wrong_json_is_named(serve, tmp_path):
    folder = miniatures.write_imgedit(tmp_path / "data")
    (folder / "basic_edit.json").write_text("{")
    result = run("imgedit", "--data", folder, "--output", tmp_path / "run", "--model", TINY_SHAPES, *judge(serve()))
    assert_refused(result, "basic_edit.json cannot be read")
    assert not (tmp_path / "run").exists()


def test_unknown_edit_types_and_missing_sources_are_listed(serve, tmp_path):
    folder = miniatures.write_imgedit(tmp_path / "data")
    path = folder / "basic_edit.json"
    path.write_text(path.read_text().replace('"style"', '"restyle"'))
    (folder / "singleturn/animal/000000002.jpg").unlink()
    result = run("imgedit", "--data", folder, "--output", tmp_path / "run", "--model", TINY_SHAPES, *judge(serve()))
    assert_refused_with_list(result, "'restyle' is none of add, adjust", "000000002.jpg")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("imgedit", "--model", "m"), ("give --judge-model",)),
        (("imgedit", "--judge-model", "j"), ("Give --model",)),
        (
            ("imgedit", "--only", "score", "--steps", 3, "--judge-model", "j"),
            ("--steps: is nothing for --only score",),
        ),
        (("imgedit", "--only", "report", "--judge-model", "j"), ("--judge-model: is nothing for --only report",)),
        (("imgedit", "--only", "generate", "--model", "m", "--count", 3), ("--count: is for `eval shapes`",)),
        (("geneval", "--model", "m", "--judge-model", "j"), ("--judge-model: geneval is scored without a judge",)),
        (("shapes", "--count", 3), ("--count: the edits of --data",)),
        (
            ("shapes", "--designer", "self", "--blueprints", "b.jsonl"),
            ("--blueprints: is nothing for --designer self",),
        ),
        (("shapes", "--designer", "openai"), ("--designer openai: needs --designer-model",)),
        (
            ("shapes", "--designer", "vlm", "--designer-model", "m", "--designer-base-url", "u"),
            ("--designer-base-url: is nothing for --designer vlm, which takes --designer-model",),
        ),
        (("shapes", "--blueprints", "none.jsonl"), ("none.jsonl: there is no such file",)),
        (("shapes", "--designer", "replay"), ("--designer replay: needs --blueprints",)),
        (("imgedit", "--only", "score", "--judge-model", "j", "--price-prompt", 1), ("Give both",)),
        (("imgedit", "--only", "score", "--judge-model", "j", "--budget-money", 1), ("--budget-money: needs",)),
        (("shapes", "--model", "none/here"), ("--model none/here: cannot be loaded",)),
    ],
    ids=lambda value: " ".join(map(str, value))[:60],
)
def test_options_that_make_no_sense_are_refused_at_the_door(data, tmp_path, options, words):
    name, *given = options
    result = run(name, "--data", data[name], "--output", tmp_path / "run", *given)
    assert_refused(result, *words)
    assert not (tmp_path / "run" / "run.json").exists()


def test_model_of_the_other_kind_is_refused(data, t2i_folder, tmp_path):
    options = ("--data", data["shapes"], "--output", tmp_path / "run")
    assert_refused(run("shapes", *options, "--model", t2i_folder), "has to be a DIMEditPipeline, but is a DIMPipeline")


@pytest.fixture(scope="module")
def compared(data, tmp_path_factory):
    """Two runs of shapes, the second one of another seed."""
    folders = []
    for seed in (233, 7):
        folders.append(tmp_path_factory.mktemp("compared") / "run")
        options = ("--steps", 2, "--batch-size", 8, "--seed", seed)
        for stage in (("generate", *options), ("score",)):
            assert_done(run("shapes", "--data", data["shapes"], "--output", folders[-1], "--only", *stage))
    return folders


def test_two_runs_are_compared(compared, tmp_path):
    result = assert_done(run("compare", *compared, "--output", tmp_path / "both.md"))
    assert "of 8 pairs" in result.stdout
    assert {path.suffix for path in tmp_path.glob("both.*")} == {".md", ".json", ".png"}


def test_runs_without_a_common_judge_are_refused(compared, painted, tmp_path):
    assert_refused(run("compare", compared[0], painted, "--output", tmp_path / "both.md"), "holds no scores")


def test_preservation_is_measured_against_targets(compared, data):
    pytest.importorskip("torchmetrics")
    targets = ("--targets", data["shapes"] / "edits.jsonl")
    result = assert_done(run("preservation", "--run", compared[0], *targets, "--metrics", "psnr,ssim,dino"))
    assert "8 of 8 changed areas are between source and target" in result.stdout
    assert "DINO ↓: not measured, no model is given by --dino." in result.stdout
    found = json.loads((compared[0] / "preservation.json").read_text(encoding="utf-8"))
    assert found["figures"]["overall"]["outside"]["psnr"]["scored"] == 8


def test_preservation_says_what_cannot_be_measured(painted):
    result = assert_done(run("preservation", "--run", painted, "--metrics", "clip"))
    assert "9 of 9 changed areas are between source and edit" in result.stdout
    assert "CLIP ↓: not measured, no model is given by --clip." in result.stdout


def test_preservation_of_unknown_metrics_is_refused(painted):
    assert_refused(run("preservation", "--run", painted, "--metrics", "psnr,fid"), "fid")


def test_help_names_the_benchmarks_and_hides_what_is_not_theirs():
    shown = run("--help").stdout
    for name in ("imgedit", "gedit", "geneval", "mjhq", "shapes", "preservation", "compare"):
        assert name in shown
    assert "--judge-model" in run("gedit", "--help").stdout
    assert "--judge-model" not in run("mjhq", "--help").stdout


def start(*arguments, **environment):
    command = [sys.executable, "-m", "diffusers_dim.cli", "eval", *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment, stderr=subprocess.DEVNULL)


def kill_when(process, condition):
    """Kills a process without a word as soon as the condition holds."""
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_judging_goes_on_and_asks_nothing_twice(data, painted, serve):
    server = serve(seconds=0.2)
    one_by_one = (*judge(server), "--judge-concurrency", 1)
    options = ("imgedit", "--data", data["imgedit"], "--output", painted, "--only", "score")
    kill_when(start(*options, *one_by_one), lambda: len(server.texts) >= 4)
    assert_done(run(*options, *judge(server)))
    assert Scores.load(painted / SCORES).figures["overall"].scored == 9
    # What was under way when it was killed was not answered.
    assert sorted(server.asked.values())[:-1] == [1] * 8 and max(server.asked.values()) <= 2


@pytest.mark.slow
def test_two_processes_share_the_painting(data, painted_once, tmp_path):
    """Started as on two GPUs; ACCELERATE_USE_CPU keeps both on the CPU."""
    launch = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no"
    launch = [*launch.split(), "--dynamo_backend", "no", "-m", "diffusers_dim.cli"]
    options = ("--data", data["imgedit"], "--output", tmp_path / "run", "--model", TINY_SHAPES, "--only", "generate")
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "eval", "imgedit", *options]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    call = [*command, "--size", 64, "--steps", 1, "--batch-size", 2]
    done = run_on_terminal(call, env=environment)
    assert done.returncode == 0, done.stderr
    assert "9 pictures of 9 cases" in done.stdout
    assert "Pictures of 1 process in 2" in done.stderr
    for path in (painted_once / "pictures").iterdir():
        pair = [read_picture(folder / "pictures" / path.name) for folder in (painted_once, tmp_path / "run")]
        low, high = zip(*ImageChops.difference(*pair).getextrema())
        assert max(high) <= 2  # batches of another size
