"""Runs examples one after the other in each of the processes that torchrun starts: what they import is read once."""

import json
import os
import sys
from pathlib import Path

from script_runs import run_script


def main(runs: Path, results: Path) -> None:
    """
    Args:
        runs (`Path`): Holds a list of `{"name", "script", "options", "environment"}`.
        results (`Path`): Where to write what each run raised, if anything, by its name.
    """
    main_process = os.environ["RANK"] == "0"
    errors = {}
    for run in json.loads(runs.read_text()):
        os.environ.update(run["environment"])
        try:
            run_script(run["script"], *run["options"])
        except ValueError as error:
            errors[run["name"]] = str(error)
        finally:
            for name in run["environment"]:
                del os.environ[name]
    if main_process:
        results.write_text(json.dumps(errors))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
