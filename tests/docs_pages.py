"""The pages' blocks: read, their commands checked against what takes them, and run."""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from markdown_it import MarkdownIt

from diffusers_dim.cli import app


ROOT = Path(__file__).parents[1]
NOT_RUN = re.compile(r"<!-- not run: (\S.{9,}) -->")
PYTHON, SHELL = ("python", "py"), ("bash", "sh", "shell", "console")
COMMANDS = typer.main.get_command(app)
# What a shell or a system has, and what it is for is plain.
PLAIN_COMMANDS = set("cd cp curl docker echo export git hf kill ln ls mkdir pip rm sbatch sleep source wait".split())
KEYWORDS = {"until", "while", "do", "done", "if", "then", "else", "fi", "!"}
# diffusers' own, see docs/stock_scripts.md.
FOREIGN_SCRIPTS = {"train_dreambooth_lora_sana.py"}
FOREIGN_MODULES = {"pip", "pytest", "venv"}


@dataclass(frozen=True)
class Block:
    """
    A fenced block.

    Args:
        page (`Path`): Where it stands.
        line (`int`): The line of its fence, from 1.
        language (`str`): "" if it names none.
        text (`str`): What is in it.
        reason (`str`, *optional*): Why it is not run.
    """

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    """A page's fenced blocks in order."""
    text = page.read_text(encoding="utf-8")
    lines = text.splitlines()
    blocks = []
    for token in MarkdownIt("commonmark").parse(text):
        if token.type == "fence":
            start = token.map[0]
            marked = NOT_RUN.fullmatch(lines[start - 1].strip()) if start else None
            language = token.info.split()[0] if token.info.strip() else ""
            blocks.append(Block(page, start + 1, language, token.content, marked and marked[1]))
    return blocks


def read_commands(block: Block) -> list[list[str]]:
    """
    The commands of a shell's block, as lists of words, without variables set before them, keywords and redirections.

    Raises:
        ValueError: If a quote is left open.
    """
    text = block.text
    if block.language == "console":  # prompts and, without them, what is printed
        text = "\n".join(line.strip()[2:] for line in text.splitlines() if line.strip().startswith("$ "))
    found: list[list[str]] = []
    pending, heredoc = "", None
    for line in text.splitlines():
        if heredoc is not None:
            heredoc = None if line.strip() == heredoc else heredoc
            continue
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        lexer = shlex.shlex(pending, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:
            pending += "\n"  # a quote goes on
            continue
        pending = ""
        command: list[str] = []
        place = 0
        while place < len(words):
            word = words[place]
            if word.startswith("<<"):
                heredoc = words[place + 1]
                place += 1
            elif word.strip("<>&") == "" and set(word) & set("<>"):
                place += 1  # and the file
            elif word.strip("&|;()") == "":
                found.append(command)
                command = []
            elif command or not (word in KEYWORDS or re.match(r"\w+=", word)):
                command.append(word)
            place += 1
        found.append(command)
    if pending:
        raise ValueError(f"{block.where}: a quote is left open.")
    return [command for command in found if command]


class Parsed(BaseException):
    """Ends a script where it has read its arguments."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


@contextlib.contextmanager
def stopped_at_arguments() -> Iterator[None]:
    """Has scripts read their arguments as ever, and go no further."""
    parse, help = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.print_help

    def stop(parser, *_):
        raise Parsed(parser)

    def parse_and_stop(parser, args=None, namespace=None):
        parse(parser, args, namespace)
        stop(parser)

    argparse.ArgumentParser.parse_args, argparse.ArgumentParser.print_help = parse_and_stop, stop
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_args, argparse.ArgumentParser.print_help = parse, help


@contextlib.contextmanager
def refusals_are_failures() -> Iterator[None]:
    """Turns a command's refusal of its arguments into an `AssertionError` with its words."""
    says = io.StringIO()
    try:
        with contextlib.redirect_stderr(says), contextlib.redirect_stdout(io.StringIO()):
            yield
    except SystemExit as end:
        assert not end.code, says.getvalue()


@contextlib.contextmanager
def started_as(script: list[str], arguments: list[str]) -> Iterator[None]:
    """The interpreter as `python script arguments` has it. Names of one folder's modules are of no other's."""
    path, arguments_before, modules = sys.path[:], sys.argv[:], set(sys.modules)
    sys.argv = [script[-1], *arguments]
    if script[0] != "-m":
        sys.path.insert(0, str(Path(script[0]).resolve().parent))
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    try:
        yield
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        sys.path, sys.argv = path, arguments_before
        for name in set(sys.modules) - modules:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if file.startswith((str(ROOT / "examples"), str(ROOT / "benchmarks"))):
                del sys.modules[name]


def run_script(script: list[str], arguments: list[str]) -> None:
    """Runs `["file.py"]` or `["-m", "module"]` in this process."""
    with started_as(script, arguments):
        if script[0] == "-m":
            sys.modules.pop(script[1], None)  # else Python warns
            runpy.run_module(script[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script[0], run_name="__main__")


def split_python(words: list[str]) -> tuple[list[str], list[str]]:
    """The script of `python ...` and its arguments."""
    return (words[:2], words[2:]) if words[0] == "-m" else (words[:1], words[1:])


def split_launch(words: list[str]) -> tuple[list[str], list[str]]:
    """The script of `accelerate launch ...` and its arguments; launch's own options are checked."""
    with refusals_are_failures():
        args = launch_command_parser().parse_args(words)
    return (["-m"] if args.module else []) + [args.training_script], args.training_script_args


def find_command(words: list[str]) -> tuple[typer.core.TyperCommand, list[str]]:
    """The command of `diffusers-dim ...` and its arguments."""
    command: Any = COMMANDS
    while isinstance(command, typer.core.TyperGroup) and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    return command, words


def list_options(command: typer.core.TyperCommand) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def check_script(script: list[str], arguments: list[str]) -> None:
    """Makes sure that there is such a script and that it takes these arguments."""
    if script == ["-m", "diffusers_dim.cli"]:
        check_command(["diffusers-dim", *arguments])
    elif script[0] == "-m" and script[1] in FOREIGN_MODULES:
        if script[1] == "pytest":
            paths = [word for word in arguments if word.startswith("tests")]
            assert all((ROOT / path.partition("::")[0]).exists() for path in paths), f"one of {paths} is not there"
    elif script[0] == "-m":
        assert script[1].startswith("diffusers_dim.") and importlib.util.find_spec(script[1]), f"no module {script[1]}"
        read_arguments(script, arguments)
    elif script[0] not in FOREIGN_SCRIPTS:
        assert (ROOT / script[0]).is_file(), f"no script {script[0]}"
        read_arguments([str(ROOT / script[0])], arguments)


def read_arguments(script: list[str], arguments: list[str]) -> argparse.ArgumentParser:
    """The parser of a script, which has to take these arguments; all but options is left out where there is "..."."""
    if "..." in arguments:
        options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        parser = read_arguments(script, ["--help"])
        assert options <= set(parser._option_string_actions), f"{script[-1]} takes not all of {sorted(options)}"
        return parser
    try:
        with refusals_are_failures(), stopped_at_arguments():
            run_script(script, arguments)
    except Parsed as parsed:
        return parsed.parser
    raise AssertionError(f"{script[-1]} reads no arguments")


def check_command(words: list[str]) -> None:
    """Makes sure that a command of a page exists and takes its options. Nothing of it runs."""
    name, arguments = words[0].rpartition("/")[2], words[1:]
    if name == "diffusers-dim":
        command, arguments = find_command(arguments)
        options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert options <= list_options(command) | {"--help"}, f"{command.name} takes not all of {sorted(options)}"
        if "..." not in arguments:
            run, command.callback = command.callback, lambda **_: None
            try:
                with refusals_are_failures():
                    COMMANDS.main(words[1:], prog_name=name)
            finally:
                command.callback = run
    elif name in ("python", "python3"):
        if arguments and arguments[0] != "-c":
            check_script(*split_python([word for word in arguments if word != "-u"]))
    elif name == "accelerate":
        assert arguments[0] == "launch"
        check_script(*split_launch(arguments[1:]))
    elif name == "torchrun":
        assert any((ROOT / word).is_file() for word in arguments), f"no script in {words}"
    elif name == "make":
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
        wanted = {word for word in arguments if "=" not in word and not word.startswith("-")}
        assert wanted <= targets, f"no target {sorted(wanted - targets)}"
    elif name == "sbatch":
        assert (ROOT / arguments[0]).is_file(), f"no file {arguments[0]}"
    elif name == "pip" and arguments[0] == "install":
        check_extras(" ".join(arguments))
    else:
        assert name in PLAIN_COMMANDS, f"{name!r} is no command that is known here"


def check_extras(text: str) -> None:
    """Makes sure that the extras of this package that a text names exist."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for names in re.findall(r"(?:diffusers-dim|[ '\"]\.)\[([a-z,]+)\]", f" {text}"):
        unknown = set(names.split(",")) - set(setup["options.extras_require"])
        assert not unknown, f"no extra {sorted(unknown)}"


# Running


class Shell:
    """
    A terminal, whose Python commands run in this process, which has imported already what they need.

    Args:
        folder (`Path`): Where it is opened.
        programs (`Path`): An empty folder; what bash finds first.
    """

    # These serve until they are killed, so they get a process of their own.
    servers = ("diffusers_dim.tiny.judge", "examples/app.py", "examples/serve.py")
    # Seconds, for a block that waits for what never comes.
    patience = 300.0

    def __init__(self, folder: Path, programs: Path):
        self.folder, self.programs = folder, programs
        self.said: list[str] = []
        self.blocks = 0
        client = (
            f"#!{sys.executable} -IS\n"
            "import json, os, socket, sys\n"
            "with socket.create_connection(('127.0.0.1', int(os.environ['DOCS_PORT']))) as line:\n"
            "    words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]\n"
            "    line.sendall(json.dumps([words, os.getcwd()]).encode() + b'\\n')\n"
            "    answer = json.loads(line.makefile().readline() or '{\"code\": 1}')\n"
            "if 'start' in answer:\n"
            "    os.execv(answer['start'], [answer['start'], *words[1:]])\n"
            "sys.stdout.write(answer.get('out', ''))\n"
            "sys.stderr.write(answer.get('err', ''))\n"
            "sys.exit(answer['code'])\n"
        )
        for name in ("diffusers-dim", "python", "python3", "accelerate"):
            path = programs / name
            path.write_text(client)
            path.chmod(0o755)
        (programs / "activate").touch()

    def __enter__(self) -> "Shell":
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.settimeout(0.05)
        self.printed = (self.programs / "printed").open("w+")
        self.bash = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-s"],
            cwd=self.folder,
            env={
                **os.environ,
                "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}",
                "DOCS_PORT": str(self.server.getsockname()[1]),
            },
            stdin=subprocess.PIPE,
            stdout=self.printed,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        # What runs in the background, too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.bash.pid, signal.SIGKILL)
        self.bash.communicate()
        self.server.close()
        self.printed.close()

    def run(self, text: str, where: str) -> None:
        """Runs a block; if a command fails, what was said is told."""
        self.blocks += 1
        script, done = self.programs / f"{self.blocks}.sh", self.programs / f"{self.blocks}.done"
        script.write_text(text)
        self.bash.stdin.write(f"source {shlex.quote(str(script))} < /dev/null\n: > {shlex.quote(str(done))}\n")
        self.bash.stdin.flush()
        last = time.monotonic()
        while not done.exists():
            assert time.monotonic() - last < self.patience, f"{where}: does not end; a server goes into the background"
            if self.bash.poll() is not None:
                self.printed.seek(0)
                said = "".join(self.said) + self.printed.read()
                raise AssertionError(f"{where}: exit code {self.bash.returncode}\n{said}")
            with contextlib.suppress(TimeoutError):
                self.serve(self.server.accept()[0])
                last = time.monotonic()

    def serve(self, connection: socket.socket) -> None:
        with connection:
            words, folder = json.loads(connection.makefile().readline())
            if any(name in words for name in self.servers) or words[1:2] == ["-c"]:
                answer: dict[str, Any] = {"start": sys.executable}
            else:
                out, err = io.StringIO(), io.StringIO()
                with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    code = self.start(words)
                self.said.append(f"$ {shlex.join(words)}\n")
                answer = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
            connection.sendall(json.dumps(answer).encode() + b"\n")

    @staticmethod
    def start(words: list[str]) -> int:
        """Runs a command here; its exit code."""
        try:
            if words[0] == "diffusers-dim":
                COMMANDS.main(words[1:], prog_name=words[0])
            elif words[0] == "accelerate":
                run_script(*split_launch(words[2:]))
            else:
                run_script(*split_python(words[1:]))
        except SystemExit as end:
            if isinstance(end.code, str):
                sys.stderr.write(end.code)
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        return 0


def run_blocks(blocks: list[tuple[Block, str]], shell: Shell) -> None:
    """Runs a page's blocks, each with the text that it is run as, in one process and folder, from top to bottom."""
    module = types.ModuleType("page")
    sys.modules["page"] = module
    try:
        for block, text in blocks:
            if block.language in SHELL:
                if block.language == "console":
                    text = "\n".join(line.strip()[2:] for line in text.splitlines() if line.strip().startswith("$ "))
                shell.run(text, block.where)
            else:
                # Errors then name the page and its line.
                code = compile("\n" * block.line + text, str(block.page), "exec")
                with contextlib.chdir(shell.folder):
                    exec(code, module.__dict__)
    finally:
        del sys.modules["page"]
