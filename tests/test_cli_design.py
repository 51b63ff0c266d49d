import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from cli_runs import assert_refused
from PIL import Image
from typer.testing import CliRunner

from diffusers_dim.cli import app
from diffusers_dim.tiny import sample_edits


EDITS = sample_edits(6, seed=0)
COMMAND = [sys.executable, "-c", "from diffusers_dim.cli import app; app()", "design"]


def run(*arguments):
    return CliRunner().invoke(app, ["design", *map(str, arguments)])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def folder(tmp_path):
    """Pictures, `edits.jsonl` with their instructions, and `plans.jsonl` with the blueprints as well."""
    rows = []
    for number, edit in enumerate(EDITS):
        edit.source.save(tmp_path / f"{number}.png")
        rows.append({"id": f"edit-{number}", "image_path": f"{number}.png", "instruction": edit.instruction})
    write(tmp_path / "edits.jsonl", rows)
    write(tmp_path / "plans.jsonl", [{**row, "prompt": edit.blueprint} for row, edit in zip(rows, EDITS)])
    return tmp_path


def replay(folder, *options):
    return run("--designer", "replay", "--blueprints", folder / "plans.jsonl", *options)


def one(folder):
    return ("--image", folder / "0.png", "--prompt", EDITS[0].instruction)


def many(folder):
    return ("--jsonl", folder / "edits.jsonl", "--output", folder / "out.jsonl")


def test_one_blueprint_is_printed(folder):
    result = replay(folder, *one(folder))
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{EDITS[0].blueprint}\n"
    assert result.stderr.startswith("0 tokens, ")


def test_one_blueprint_is_written_to_a_file(folder):
    result = replay(folder, *one(folder), "--output", folder / "plan.txt")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert (folder / "plan.txt").read_text() == f"{EDITS[0].blueprint}\n"


def test_written_blueprint_is_what_edit_takes(folder):
    replay(folder, *one(folder), "--output", folder / "plan.txt")
    result = CliRunner().invoke(
        app,
        [
            *("edit", *map(str, one(folder)), "--blueprint", f"@{folder / 'plan.txt'}", "--steps", "1"),
            *("--output", str(folder / "out.png"), "--device", "cpu"),
        ],
    )
    assert result.exit_code == 0, result.output


def test_one_that_fails_is_exit_code_1(folder):
    result = replay(folder, "--image", folder / "0.png", "--prompt", "make it night", "--output", folder / "plan.txt")
    assert result.exit_code == 1
    assert "plans.jsonl holds no blueprint for 'make it night' of this picture." in result.stderr
    assert not (folder / "plan.txt").exists()


def test_one_that_fails_may_leave_its_instruction(folder):
    result = replay(folder, "--image", folder / "0.png", "--prompt", "make it night", "--on-failure", "instruction")
    assert (result.exit_code, result.stdout) == (0, "make it night\n")


def test_many_blueprints_are_written_in_order(folder):
    result = replay(folder, *many(folder))
    assert result.exit_code == 0, result.output
    assert read(folder / "out.jsonl") == read(folder / "plans.jsonl")
    assert result.stdout.startswith("6 of 6 designs: 6 new (0 repaired, 0 from the cache, 0 the plain instruction), 0")
    assert result.stdout.endswith(f" s: {folder / 'out.jsonl'}\n")
    assert result.stderr == ""


def test_pictures_lie_in_image_dir(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "edits.jsonl"
    (folder / "edits.jsonl").rename(elsewhere)
    result = replay(folder, "--jsonl", elsewhere, "--image-dir", folder, "--output", folder / "out.jsonl")
    assert result.exit_code == 0, result.output


def test_missing_picture_is_listed_and_exit_code_1(folder):
    rows = read(folder / "edits.jsonl")
    write(folder / "edits.jsonl", [{**rows[0], "id": "gone", "image_path": "gone.png"}, *rows[1:]])
    result = replay(folder, *many(folder))
    assert result.exit_code == 1
    assert "5 of 6 designs: 5 new" in result.stdout and "1 failed" in result.stdout
    assert result.stderr == f"diffusers-dim: error: 1 failed: {folder / 'out.failures.jsonl'}\n"
    (failure,) = read(folder / "out.failures.jsonl")
    assert failure["id"] == "gone" and "gone.png cannot be read as a picture" in failure["error"]
    assert read(folder / "out.jsonl") == read(folder / "plans.jsonl")[1:]


def test_failed_lines_alone_are_tried_again(folder):
    plans = read(folder / "plans.jsonl")
    write(folder / "plans.jsonl", plans[1:])
    assert replay(folder, *many(folder)).exit_code == 1
    write(folder / "plans.jsonl", plans[:1])
    result = replay(folder, *many(folder))
    assert result.exit_code == 0, result.output
    assert "6 of 6 designs: 1 new" in result.stdout and "5 before, 0 failed" in result.stdout
    assert read(folder / "out.jsonl") == plans
    assert not (folder / "out.failures.jsonl").exists()


def test_finished_run_loads_no_designer(folder):
    replay(folder, *many(folder))
    result = run("--designer", "self", "--model", folder / "no-model", *many(folder))
    assert result.exit_code == 0, result.output
    assert "6 of 6 designs: 0 new" in result.stdout


@pytest.mark.slow
def test_killed_run_goes_on_and_asks_for_nothing_twice(folder):
    # Pictures of many pixels, so that the run takes a while.
    rows = []
    for number in range(24):
        Image.linear_gradient("L").resize((1400, 1400 + number)).save(folder / f"large-{number}.png", compress_level=1)
        rows.append({"id": number, "image_path": f"large-{number}.png", "instruction": f"make it {number}"})
    write(folder / "edits.jsonl", rows)
    plans = [{**row, "prompt": EDITS[row["id"] % 6].blueprint} for row in rows]
    write(folder / "plans.jsonl", plans)

    options = ["--designer", "replay", "--blueprints", folder / "plans.jsonl", *many(folder)]
    process = subprocess.Popen([*COMMAND, *map(str, options)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    running = folder / "out.unfinished.jsonl"
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if running.exists() and running.read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = running.read_bytes().count(b"\n")
    assert 2 <= kept < 24
    assert not (folder / "out.jsonl").exists()

    with open(running, "ab") as lines:  # as if it had been killed within a line
        lines.write(b'{"id": 23, "image_p')
    write(folder / "plans.jsonl", plans[kept:])  # what was done is not to be had again
    result = replay(folder, *many(folder))
    assert result.exit_code == 0, result.output
    assert f"24 of 24 designs: {24 - kept} new" in result.stdout and f"{kept} before" in result.stdout
    assert read(folder / "out.jsonl") == plans
    assert not running.exists()


def replay_on_a_terminal(folder, *options):
    """What a terminal shows of it."""
    arguments = ["design", "--designer", "replay", "--blueprints", folder / "plans.jsonl", *options]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    with open(theirs, "w", encoding="utf-8") as screen:
        with redirect_stdout(screen), redirect_stderr(screen):
            app(list(map(str, arguments)), standalone_mode=False)
        screen.write("END")
        screen.flush()
        shown = b""
        while not shown.endswith(b"END"):
            shown += os.read(ours, 4096)
    os.close(ours)
    return shown.decode().replace("\r\n", "\n")


def test_terminal_shows_the_blueprint_once(folder):
    assert replay_on_a_terminal(folder, *one(folder)).startswith(f"{EDITS[0].blueprint}\n0 tokens, ")


def test_terminal_shows_the_words_and_then_what_they_say(folder):
    words = f"<think>A square.</think>\n{EDITS[0].blueprint}"
    write(folder / "plans.jsonl", [{**read(folder / "plans.jsonl")[0], "prompt": words}])
    shown = replay_on_a_terminal(folder, *one(folder))
    assert shown.startswith(f"{words}\n\n{EDITS[0].blueprint}\n0 tokens, ")


def test_terminal_shows_a_bar(folder):
    shown = replay_on_a_terminal(folder, *many(folder))
    assert "Designs: 100%" in shown and "6/6" in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--image with --prompt, or --jsonl with --output"]),
        (["--image", "0.png"], ["--prompt"]),
        (["--jsonl", "edits.jsonl"], ["--jsonl edits.jsonl: needs --output"]),
        (["--jsonl", "edits.jsonl", "--image", "0.png"], ["--image with --prompt, or --jsonl with --output"]),
        (["--jsonl", "edits.jsonl", "--output", "out.jsonl", "--prompt", "x"], ["--prompt with --image"]),
        (["--jsonl", "none.jsonl", "--output", "out.jsonl"], ["none.jsonl"]),
        (["--jsonl", "bad.jsonl", "--output", "out.jsonl"], ["bad.jsonl, line 2 is not JSON"]),
        (["--jsonl", "edits.jsonl", "--output", "edits.jsonl"], ["edits.jsonl is the input itself"]),
        (["--jsonl", "edits.jsonl", "--output", "plan/out.jsonl"], ["there is no folder"]),
        (["--jsonl", "edits.jsonl", "--output", "."], ["is a folder"]),
        (["--image", "none.png", "--prompt", "x"], ["none.png", "no such file"]),
        (["--image", "edits.jsonl", "--prompt", "x"], ["cannot be read as a picture"]),
        (["--image", "0.png", "--prompt", " "], ["--prompt: holds no text"]),
        (["--image", "0.png", "--prompt", "x", "--image-dir", "."], ["--image-dir .: is for a --jsonl"]),
        (["--image", "0.png", "--prompt", "x", "--blueprints", "none.jsonl"], ["none.jsonl"]),
        (["--image", "0.png", "--prompt", "x", "--blueprints", "bad.jsonl"], ["bad.jsonl, line 2 is not JSON"]),
        (["--image", "0.png", "--prompt", "x", "--model", "m"], ["--model: is nothing for --designer replay"]),
        (["--image", "0.png", "--prompt", "x", "--designer", "self"], ["--blueprints", "nothing for --designer self"]),
    ],
)
def test_bad_input_gets_one_line(folder, monkeypatch, options, words):
    monkeypatch.chdir(folder)
    (folder / "bad.jsonl").write_text('{"image_path": "0.png", "prompt": "x"}\n{"image_path": \n')
    before = sorted(folder.iterdir())
    assert_refused(run("--designer", "replay", "--blueprints", "plans.jsonl", *options), *words)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("kind", ["self", "vlm", "openai"])
def test_designer_without_its_model_is_refused(folder, kind):
    assert_refused(run("--designer", kind, *one(folder)), f"--designer {kind}: needs --model")


def test_model_that_is_no_pipeline_is_refused(folder):
    assert_refused(run("--model", folder, *one(folder)), "model_index.json")


def test_help_names_the_designers():
    result = run("--help")
    for word in ("--designer", "openai", "replay", "OPENAI_API_KEY"):
        assert word in result.stdout


@pytest.fixture
def server(monkeypatch):
    """A chat completions server; `blueprint_for` says what it writes."""
    pytest.importorskip("openai")
    monkeypatch.syspath_prepend(Path(__file__).parent / "designers")
    from chat_server import serve

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serve() as server:
        yield server


def ask(server, *options):
    return run("--designer", "openai", "--model", "m", "--base-url", server.url, *options)


def test_server_designs_many(server, folder):
    from chat_server import blueprint_for

    result = ask(server, *many(folder))
    assert result.exit_code == 0, result.output
    assert [row["prompt"] for row in read(folder / "out.jsonl")] == [blueprint_for(e.instruction) for e in EDITS]
    tokens = sum(len(blueprint_for(edit.instruction).split()) for edit in EDITS)
    assert f"6 new (0 repaired, 0 from the cache, 0 the plain instruction), 0 before, 0 failed, {tokens} tokens" in (
        result.stdout
    )


def test_repaired_and_refused_lines_are_told(server, folder):
    from chat_server import Reply

    server.replies[EDITS[1].instruction] = [Reply(delta={"content": "a red square"})]
    server.replies[EDITS[2].instruction] = [Reply(finish_reason="content_filter")]
    result = ask(server, *many(folder))
    assert result.exit_code == 1
    assert "5 of 6 designs: 5 new (1 repaired, " in result.stdout
    (failure,) = read(folder / "out.failures.jsonl")
    assert failure["id"] == "edit-2" and "content filter" in failure["error"]


def test_concurrency_bounds_the_requests(server, folder):
    server.seconds = 0.05
    ask(server, *many(folder), "--concurrency", 2)
    assert server.most_at_once == 2


def test_cache_serves_another_output(server, folder):
    cached = ("--cache", folder / "cache")
    ask(server, *many(folder), *cached)
    result = ask(server, "--jsonl", folder / "edits.jsonl", "--output", folder / "again.jsonl", *cached)
    assert "6 of 6 designs: 6 new (0 repaired, 6 from the cache" in result.stdout
    assert len(server.requests) == 6


def test_length_of_answers_is_passed_on(server, folder):
    ask(server, *one(folder), "--max-new-tokens", 77)
    assert server.requests[0]["body"]["max_tokens"] == 77


def test_unknown_model_is_refused_and_nothing_is_lost(server, folder):
    ask(server, *many(folder), "--concurrency", 1)
    rows = read(folder / "edits.jsonl")
    write(folder / "edits.jsonl", [*rows, {**rows[0], "id": "new"}])
    before = read(folder / "out.jsonl")
    server.models = ["other"]
    assert_refused(ask(server, *many(folder)), "no model 'm'", "other")
    assert read(folder / "out.jsonl") == before


def test_no_key_is_refused(server, folder):
    result = run("--designer", "openai", "--model", "gpt-4o", *one(folder))
    assert_refused(result, "OPENAI_API_KEY")
