"""Running the `transdiff` command within the test process."""

from typer.testing import CliRunner, Result

import transdiff_cli


def run(*arguments: object) -> Result:
    return CliRunner().invoke(transdiff_cli.app, [str(argument) for argument in arguments])


def assert_one_line_error(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: "), result.stderr
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr
