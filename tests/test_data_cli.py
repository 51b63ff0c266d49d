import json
import threading
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from cli_runs import assert_refused
from PIL import Image
from typer.testing import CliRunner

from diffusers_dim.cli import app
from diffusers_dim.tiny.dataset import write_edits
from diffusers_dim.tiny.judge import JudgeServer, TinyJudge


COUNT = 40  # of which 4 wrong, 4 vague, 2 identical, 2 corrupt


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    return write_edits(tmp_path_factory.mktemp("data") / "edits", COUNT, seed=0, faults=True).parent


@pytest.fixture
def server(edits, monkeypatch):
    """A judge that errs at no time; `server.judge` tells what it was asked."""
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = JudgeServer(TinyJudge(edits))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def built(edits, tmp_path_factory):
    """What `build` makes of the edits."""
    pytest.importorskip("openai")
    server = JudgeServer(TinyJudge(edits))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    folder = tmp_path_factory.mktemp("data") / "built"
    result = ask(server, edits, folder, "build")
    server.shutdown()
    server.server_close()
    assert result.exit_code == 0, result.output
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


def ask(server, edits, output, command, *options):
    judge = ("--model", "tiny-judge", "--base-url", server.url)
    return run(command, "--input", edits, "--output", output, *judge, *options)


def truth(edits):
    return {row["id"]: row for row in map(json.loads, (edits / "edits.jsonl").read_text().splitlines())}


def true_verdicts(edits):
    verdicts = {"": "fits", "vague": "partly", "wrong": "misfits"}
    return {id: verdicts[row["fault"]] for id, row in truth(edits).items() if row["fault"] in verdicts}


def read(folder):
    return [row for path in sorted(folder.glob("data-*.parquet")) for row in pq.read_table(path).to_pylist()]


def dropped(folder):
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]


def test_build_keeps_what_fits_and_mends_what_is_vague(edits, built):
    rows, faults = read(built), truth(edits)
    assert [row["id"] for row in rows] == [id for id, row in faults.items() if row["fault"] in ("", "vague")]
    for row in rows:
        true = faults[row["id"]]
        assert row["assessment"] == ("partly" if true["fault"] else "fits")
        assert row["instruction"] == true["prompt"]
        assert row["prompt"] == true["true_blueprint"].replace(true["true_instruction"], row["better_instruction"])
        assert row["edit_type"] == true["kind"]
    stages = {row["id"]: (row["stage"], row["reason"]) for row in dropped(built)}
    expected = {"wrong": ("assess", "misfits"), "identical": ("filter", "identical")}
    expected["corrupt"] = ("filter", "unreadable")
    assert stages == {id: expected[row["fault"]] for id, row in faults.items() if row["fault"] in expected}


def test_what_a_judge_that_errs_calls_misfits_is_dropped(edits, server, tmp_path):
    server.judge.error_rate = 0.2
    result = ask(server, edits, tmp_path / "set", "assess")
    assert result.exit_code == 0, result.output
    said = server.judge.said
    assert {said[id] != judged for id, judged in true_verdicts(edits).items() if id in said} == {True, False}
    assert {row["id"]: row["assessment"] for row in read(tmp_path / "set")} == {
        id: verdict for id, verdict in said.items() if verdict != "misfits"
    }


def test_build_prints_what_came_of_it(edits, server, tmp_path):
    options = ("--price-prompt", 2, "--price-answer", 10, "--limit", 10)
    result = ask(server, edits, tmp_path / "set", "build", *options)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    summary = json.loads((tmp_path / "set" / "summary.json").read_text())
    calls, asked, answered = summary["calls"], summary["prompt_tokens"], summary["tokens"]
    assert f"10 samples: {summary['kept']} kept, {10 - summary['kept']} dropped, 0 unfinished." in result.stdout
    assert f" {calls} calls ({calls} of them now), {asked:,} tokens asked and {answered:,} answered" in result.stdout
    assert f" at a price of {(2 * asked + 10 * answered) / 1e6:.4f}, " in result.stdout
    assert " dropped by filter: unreadable\n" in result.stdout


def test_finished_set_is_not_asked_for_again(edits, server, tmp_path):
    first = ask(server, edits, tmp_path / "set", "build", "--limit", 6)
    calls = server.judge.asked.total()
    second = ask(server, edits, tmp_path / "set", "build", "--limit", 6)
    assert first.exit_code == second.exit_code == 0, second.output
    assert server.judge.asked.total() == calls
    assert f"{calls} calls (0 of them now)" in second.stdout


def test_later_step_goes_on_where_an_earlier_one_ended(edits, server, tmp_path):
    for command, steps in {"assess": 1, "optimise": 2, "imagine": 3, "build": 3}.items():
        result = ask(server, edits, tmp_path / "set", command, "--limit", 8)
        assert result.exit_code == 0, result.output
        row = read(tmp_path / "set")[0]
        assert [bool(row[name]) for name in ("assessment", "better_instruction", "prompt")] == [
            place < steps for place in range(3)
        ]
        assert {step for step, _ in server.judge.asked} == set(("assess", "optimise", "imagine")[:steps])
    assert set(server.judge.asked.values()) == {1}


def test_budget_stops_cleanly_and_a_larger_one_goes_on(edits, server, tmp_path):
    stopped = ask(server, edits, tmp_path / "set", "build", "--budget-calls", 12, "--concurrency", 2)
    assert stopped.exit_code == 1
    assert "stopped by the budget of calls: 12" in stopped.stderr
    assert server.judge.asked.total() == 12
    assert 0 < len(read(tmp_path / "set")) < 12
    whole = ask(server, edits, tmp_path / "set", "build", "--budget-calls", 1000)
    assert whole.exit_code == 0, whole.output
    assert set(server.judge.asked.values()) == {1}
    assert len(read(tmp_path / "set")) == COUNT - 8


def test_dry_run_estimates_and_writes_no_rows(edits, server, tmp_path):
    prices = ("--price-prompt", 2, "--price-answer", 10)
    result = ask(server, edits, tmp_path / "set", "build", "--dry-run", "--dry-run-count", 20, *prices)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"Of {COUNT} samples 20 were run. All would take ")
    calls = int(result.stdout.split("take ")[1].split(" ")[0])
    assert 80 <= calls <= 120  # 100 in truth
    assert not list((tmp_path / "set").glob("data-*.parquet"))
    asked = server.judge.asked.total()
    assert ask(server, edits, tmp_path / "set", "build").exit_code == 0
    assert server.judge.asked.total() == 100 > asked


def test_thresholds_are_those_of_the_filters(edits, server, tmp_path):
    result = ask(server, edits, tmp_path / "set", "build", "--limit", 5, "--min-side", 65)
    assert result.exit_code == 0, result.output
    assert {row["reason"] for row in dropped(tmp_path / "set")} <= {"tiny", "unreadable"}
    assert server.judge.asked.total() == 0


def test_columns_are_mapped_by_name(edits, server, tmp_path):
    lines = [json.loads(line) for line in (edits / "edits.jsonl").read_text().splitlines()]
    rows = [{"a": row["image_path"], "b": row["image_path_target"], "c": row["prompt"]} for row in lines[:4]]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--mapping", "source=a, target=b,instruction=c", "--image-root", edits)
    result = ask(server, tmp_path / "odd.jsonl", tmp_path / "set", "assess", *options)
    assert result.exit_code == 0, result.output
    assert read(tmp_path / "set")[0]["instruction"] == lines[0]["prompt"]


def test_captions_are_made_of_single_pictures(edits, server, tmp_path):
    lines = [row for row in truth(edits).values() if row["fault"] == ""][:5]
    rows = [{"id": row["id"], "image_path": row["image_path_target"]} for row in lines]
    (tmp_path / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "aspects.json").write_text('{"Objects": "Which shapes are there?", "Light": "How is it lit?"}')
    options = ("--image-root", edits, "--aspects", tmp_path / "aspects.json")
    result = ask(server, tmp_path / "pictures.jsonl", tmp_path / "set", "caption", *options)
    assert result.exit_code == 0, result.output
    captions = [row["prompt"] for row in read(tmp_path / "set")]
    assert len(captions) == 5
    for caption, row in zip(captions, lines):
        assert caption.startswith("The picture shows ") and row["true_blueprint"].endswith(caption)
    again = ask(server, tmp_path / "pictures.jsonl", tmp_path / "set", "caption", *options, "--aspects-per-call", 1)
    assert again.exit_code == 0, again.output
    assert [row["prompt"] for row in read(tmp_path / "set")] == captions


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--input", "nowhere"), ["nowhere"]),
        (("--batch-size", 4), ["--batch-size", "--judge openai"]),
        (("--budget-money", 1), ["--budget-money", "--price-prompt"]),
        (("--price-prompt", 1), ["--price-prompt", "--price-answer"]),
        (("--mapping", "source="), ["--mapping source="]),
        (("--mapping", "unknown"), ["unknown", "ultraedit"]),
        (("--mapping", "source=no_such_column"), ["no_such_column"]),
        (("--aspects", "aspects.json"), ["--aspects", "caption"]),
        (("--base-url", "ftp://user:geheim@host"), ["base_url"]),
    ],
)
def test_bad_input_gets_one_line(edits, server, tmp_path, options, words):
    result = ask(server, edits, tmp_path / "set", "build", *options)
    assert_refused(result, *words)
    assert "geheim" not in result.output
    assert not (tmp_path / "set").exists() and server.judge.asked.total() == 0


def test_broken_line_of_the_input_is_named_and_what_was_finished_stays(edits, server, tmp_path):
    lines = (edits / "edits.jsonl").read_text().splitlines()[:6]
    (tmp_path / "cut.jsonl").write_text("\n".join(lines) + '\n{"id": "shapes-0000')
    options = ("--image-root", edits, "--concurrency", 1)
    result = ask(server, tmp_path / "cut.jsonl", tmp_path / "set", "build", *options)
    assert_refused(result, "cut.jsonl, line 7 is not JSON")
    asked = server.judge.asked.total()
    (tmp_path / "cut.jsonl").write_text("\n".join(lines) + "\n")
    assert ask(server, tmp_path / "cut.jsonl", tmp_path / "set", "build", *options).exit_code == 0
    assert set(server.judge.asked.values()) == {1} and asked > 0


def test_model_that_is_loaded_here_may_judge(edits, golden_edit, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "designers")
    from tiny_vlms import save_vlm

    model = save_vlm("qwen2_5_vl", tmp_path / "model", golden_edit.path / "qwen")
    options = ("--max-new-tokens", 2, "--batch-size", 2, "--device", "cpu", "--limit", 4)
    result = run(
        *("assess", "--input", edits, "--output", tmp_path / "set", "--judge", "vlm", "--model", model, *options)
    )
    assert result.exit_code == 0, result.output
    # Of random weights there is no verdict.
    assert {row["reason"] for row in dropped(tmp_path / "set")} <= {"unreadable answer", "unreadable", "identical"}
    assert json.loads((tmp_path / "set" / "summary.json").read_text())["tokens"] > 0


@pytest.mark.parametrize("name", ["sheet.html", "sheet.png"])
def test_inspect_draws_a_sheet(built, tmp_path, name):
    result = run("inspect", built, "--output", tmp_path / name, "--count", 3, "--seed", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"3 samples: {tmp_path / name}\n"
    assert (tmp_path / name).stat().st_size > 10_000


def test_inspect_shows_what_was_dropped_with_its_pictures(edits, built, tmp_path):
    page = tmp_path / "dropped.html"
    assert run("inspect", built, "--output", page, "--dropped").exit_code == 0
    assert page.read_text().count("<article>") == 8 and "<img" not in page.read_text()
    assert run("inspect", built, "--output", page, "--dropped", "--input", edits).exit_code == 0
    text = page.read_text()
    # Wrong and identical ones: source, target and mask; of the corrupt ones one of two pictures.
    assert text.count("<img") == 4 * 3 + 2 * 3 + 2
    assert "unreadable" in text and "What really changed is another thing" in text


def test_stats_print_a_table_and_write_a_file(built, tmp_path):
    result = run("stats", built, "--output", tmp_path / "stats.json")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{COUNT - 8} samples, 8 dropped\n")
    found = json.loads((tmp_path / "stats.json").read_text())
    assert found["dropped"] == {"filter": {"unreadable": 2, "identical": 2}, "assess": {"misfits": 4}}
    assert run("stats", built, "--output", tmp_path / "stats.png").exit_code == 0
    assert Image.open(tmp_path / "stats.png").width > 1000


def test_push_to_a_folder_that_datasets_reads(built, tmp_path):
    result = run("push", built, "--to", tmp_path / "shared", "--license", "cc0-1.0")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'shared'}\n"
    rows = datasets.load_dataset(str(tmp_path / "shared"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == COUNT - 8 and rows[0]["source"].size == (64, 64)
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "license: cc0-1.0" in card and "| judge: model | tiny-judge |" in card and "127.0.0.1" not in card
    assert "| calls of the judge | 100 |" in card


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "FOLDER", "--output", "sheet.txt"), ["sheet.txt", ".html or .png"]),
        (("inspect", "EMPTY", "--output", "sheet.html"), ["holds no built set"]),
        (("inspect", "EMPTY", "--output", "sheet.html", "--dropped"), ["no samples"]),
        (("inspect", "FOLDER", "--output", "none/sheet.html"), ["no folder"]),
        (("inspect", "FOLDER", "--output", "sheet.html", "--input", "x"), ["--dropped"]),
        (("stats", "EMPTY"), ["holds no built set"]),
        (("stats", "FOLDER", "--output", "stats.svg"), ["stats.svg", ".json or .png"]),
        (("push", "FOLDER"), ["--repo", "--to"]),
        (("push", "FOLDER", "--repo", "a/b", "--to", "c"), ["--repo", "--to"]),
        (("push", "FOLDER", "--to", "c", "--private"), ["--private"]),
        (("push", "EMPTY", "--to", "c"), ["holds no built set"]),
        (("push", "FOLDER", "--repo", "a/b/c"), ["a/b/c"]),
    ],
)
def test_bad_arguments_get_one_line(built, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    places = {"FOLDER": built, "EMPTY": "empty"}
    assert_refused(run(*(places.get(argument, argument) for argument in arguments)), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_help_names_all_commands():
    text = CliRunner().invoke(app, ["data", "--help"]).stdout
    for command in ("assess", "optimise", "imagine", "build", "caption", "inspect", "stats", "push"):
        assert command in text
        assert "--" in run(command, "--help").stdout
    assert "--aspects" in run("caption", "--help").stdout and "--aspects" not in run("build", "--help").stdout
