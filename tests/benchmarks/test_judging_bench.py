"""What judging costs beyond the judge's time: the measurement at a small size."""

import json
import shlex

import judging
from judging import JudgingBench


def test_the_judges_time_is_that_of_full_rounds():
    bench = JudgingBench(cases=737, pictures=1, size=8, concurrency=32, answer_seconds=2.0, runs=1)
    assert bench.judge_seconds == 24 * 2.0


def test_both_clients_are_timed_with_the_command_and_the_machine(tmp_path, monkeypatch):
    arguments = ["--preset", "small", "--results", str(tmp_path), "--cases", "10", "--runs", "1"]
    monkeypatch.setattr("sys.argv", ["judging.py", *arguments])
    judging.main()
    found = json.loads((tmp_path / "judging_small.json").read_text())["judging"]
    assert found["command"] == f"python benchmarks/judging.py {shlex.join(arguments)}"
    assert found["cases"] == 10 and found["versions"] and len(found["load_average"]) == 2
    results = found["results"]
    assert results["judge_seconds"] == 0.1
    for name in ("judge_cases", "plain"):
        # No client can be faster than the judge.
        assert len(results[name]["seconds"]) == 1 and results[name]["overhead"] > 0
