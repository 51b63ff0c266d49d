"""What the tests of commands share."""

import os
import subprocess
import termios


def assert_refused(result, *words):
    """Exit code 2, nothing on stdout, and one line on stderr that holds these words."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("diffusers-dim: error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def run_on_terminal(command, **options):
    """Runs a command whose stderr is a terminal, on which alone progress is shown."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (50, 200))
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=theirs, text=True, **options)
    os.close(theirs)
    said = b""
    with open(ours, "rb", buffering=0) as terminal:
        while True:
            try:
                data = terminal.read(65536)
            except OSError:  # how Linux tells that it is closed
                break
            if not data:
                break
            said += data
    stdout = process.stdout.read()
    return subprocess.CompletedProcess(command, process.wait(), stdout, said.decode())
