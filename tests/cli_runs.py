"""What the tests of commands share."""


def assert_refused(result, *words):
    """Exit code 2, nothing on stdout, and one line on stderr that holds these words."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("diffusers-dim: error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr
