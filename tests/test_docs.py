"""Every block of the pages runs, or says why it does not; their commands, options and links exist."""

import re
from pathlib import Path

import pytest
import torch
from docs_pages import (
    NOT_RUN,
    PYTHON,
    ROOT,
    SHELL,
    Block,
    Shell,
    check_command,
    check_extras,
    read_blocks,
    read_commands,
    run_blocks,
)
from markdown_it import MarkdownIt

from diffusers_dim.tiny import sample_edits
from diffusers_dim.tiny.dataset import write_edits


GOLDEN = ROOT / "tests" / "fixtures" / "golden"
# What stands for the names that a reader has, in the folder where a page's blocks run.
STAND_INS = {
    "DIM-4.6B-Edit": lambda path, folders: path.symlink_to(folders["edit"]),
    "DIM-4.6B-T2I": lambda path, folders: path.symlink_to(folders["t2i"]),
    "stdKonjac/DIM-4.6B-Edit": lambda path, folders: path.symlink_to(GOLDEN / "edit"),
    "stdKonjac/DIM-4.6B-T2I": lambda path, folders: path.symlink_to(GOLDEN / "t2i"),
    "Qwen/Qwen2.5-VL-3B-Instruct": lambda path, folders: path.symlink_to(GOLDEN / "edit" / "qwen"),
    "Qwen/Qwen2.5-VL-7B-Instruct": lambda path, folders: path.symlink_to(GOLDEN / "edit" / "qwen"),
    "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers": lambda path, folders: path.symlink_to(GOLDEN / "edit" / "vae_base"),
    "cat.jpg": lambda path, folders: sample_edits(1, seed=5)[0].source.save(path, quality=95),
    "edits.jsonl": lambda path, folders: write_edits(path.parent, 2, seed=5),
}
# What a block is run as. `{server}` is a chat completions server here, which has a blueprint for whatever it is asked.
SUBSTITUTIONS = {
    '"cuda"': '"cpu"',
    "torch.bfloat16": "torch.float32",  # ten times slower on CPUs that lack it
    "--device cuda": "--device cpu",
    "http://localhost:8000/v1": "{server}",
    # The small checkpoints' shapes do not tell all, and random weights write no blueprints.
    "--checkpoint stdKonjac/DIM-4.6B-Edit ": (
        "--checkpoint stdKonjac/DIM-4.6B-Edit --designer none"
        " --transformer-config stdKonjac/DIM-4.6B-Edit/transformer_config.json "
    ),
    "--checkpoint stdKonjac/DIM-4.6B-T2I ": (
        "--checkpoint stdKonjac/DIM-4.6B-T2I --transformer-config stdKonjac/DIM-4.6B-T2I/transformer_config.json "
    ),
    # The judge serves the page's last block, too.
    "kill %1": "true",
    # Less of the same.
    "--count 200": "--count 10",
    "--count 256": "--count 16",
    "--count 60": "--count 3",
    "--max_train_steps 10 ": "--max_train_steps 2 ",
    "--train_batch_size 16 --max_train_steps 60 --checkpointing_steps 20": (
        "--train_batch_size 4 --max_train_steps 2 --checkpointing_steps 1"
    ),
    "--validation_shapes 12 --validation_steps 30": "--validation_shapes 2 --validation_steps 2",
    "validation/60.png": "validation/2.png",
    "sample_edits(600,": "sample_edits(2,",
}


def find_pages() -> list[Path]:
    folders = ("docs", "examples", "comfyui", "src/diffusers_dim")
    pages = [path for folder in folders for path in (ROOT / folder).rglob("*.md")]
    # A template is no page before it is filled.
    return sorted([*ROOT.glob("*.md"), *(page for page in pages if "{{" not in page.read_text(encoding="utf-8"))])


PAGES = [page for page in find_pages() if not page.is_symlink()]
BLOCKS = {page: read_blocks(page) for page in PAGES}
RUN = [page for page in PAGES if any(block.language in PYTHON + SHELL and not block.reason for block in BLOCKS[page])]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def wording(block: Block, server: str) -> str:
    text = block.text
    for name, stand_in in SUBSTITUTIONS.items():
        text = text.replace(name, stand_in.replace("{server}", server))
    return text


@pytest.fixture
def folder(tmp_path, edit_folder, t2i_folder, request) -> Path:
    """An empty folder that looks like a clone, with what the page's blocks name."""
    folder = tmp_path / "page"
    folder.mkdir()
    for name in ("examples", "benchmarks", "comfyui", "src", "constraints.txt"):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    (tmp_path / "programs").mkdir()
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(tmp_path / "programs")
    text = "\n".join(block.text for block in BLOCKS[request.getfixturevalue("page")])
    for name, put in STAND_INS.items():
        made_here = re.search(rf"--output {re.escape(name)}\b", text)
        if name in text and not made_here:
            (folder / name).parent.mkdir(exist_ok=True)
            put(folder / name, {"edit": edit_folder, "t2i": t2i_folder})
    return folder


@pytest.fixture
def server(monkeypatch):
    """The address of a chat completions server, which stands for OpenAI's, too."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "designers")
    from chat_server import serve

    with serve() as chat:
        monkeypatch.setenv("OPENAI_BASE_URL", chat.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
        yield chat.url


@pytest.fixture
def _state(monkeypatch):
    """What a page's blocks set for the process ends with the page."""
    threads = torch.get_num_threads()
    for name in ("HF_HUB_OFFLINE", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "1")
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.usefixtures("_state")
def test_blocks_run(page, folder, server, tmp_path):
    blocks = [(block, wording(block, server)) for block in BLOCKS[page] if block.reason is None]
    with Shell(folder, tmp_path / "programs") as shell:
        run_blocks([(block, text) for block, text in blocks if block.language in PYTHON + SHELL], shell)


@each_page
def test_commands_and_options_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for block in BLOCKS[page]:
        if block.language in SHELL:
            for words in read_commands(block):
                check_command(words)


@each_page
def test_python_compiles(page):
    for block in BLOCKS[page]:
        if block.language in PYTHON:
            compile(block.text, block.where, "exec")


@each_page
def test_extras_exist(page):
    check_extras(page.read_text(encoding="utf-8"))


@each_page
def test_code_is_fenced_and_names_its_language(page):
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        assert token.type != "code_block", f"line {token.map[0] + 1} is indented: it would not be run"
    assert not [block.where for block in BLOCKS[page] if not block.language]


@each_page
def test_reasons_stand_before_blocks(page):
    marks = re.findall(r"^\s*<!-- *not run", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(marks) == len([block for block in BLOCKS[page] if block.reason])


# Links


def anchors(page: Path) -> set[str]:
    """The names that a page's headings have, as GitHub makes them."""
    tokens = MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8"))
    titles = [tokens[place + 1].children for place, token in enumerate(tokens) if token.type == "heading_open"]
    texts = ["".join(child.content for child in title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


def links(page: Path) -> list[str]:
    """Where a page's links and pictures lead that stay here."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        for child in token.children or []:
            target = child.attrGet("href") or child.attrGet("src")
            if target and not re.match(r"[a-z]+:", target):
                found.append(target)
    return found


@each_page
def test_links_lead_somewhere(page):
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("index", ["README.md", "docs/README.md"])
def test_every_page_of_docs_is_listed(index):
    listed = {(ROOT / index).parent.joinpath(link.partition("#")[0]).resolve() for link in links(ROOT / index)}
    known = {"README.md": {"training_speed.md", "stock_scripts.md"}, "docs/README.md": {"README.md"}}[index]
    assert [page.name for page in (ROOT / "docs").glob("*.md") if page not in listed and page.name not in known] == []


# The net itself


def make_block(text: str, language: str = "bash") -> Block:
    return Block(ROOT / "README.md", 1, language, text, None)


@pytest.mark.parametrize(
    "text",
    [
        "diffusers-dim edit --image a.png --prompt x --colour red",
        "diffusers-dim edit --image a.png",
        "diffusers-dim edit --image a.png --prompt x --steps many",
        "diffusers-dim toast --image a.png",
        "diffusers-dim eval imgedit ... --colour red",
        "python examples/edit_batch.py --colour red",
        "python examples/no_such_script.py",
        "python -m diffusers_dim.no_such_module",
        "python -m pytest tests/no_such_folder",
        "accelerate launch --no_such_option examples/edit_batch.py",
        "accelerate launch examples/edit_batch.py --colour red",
        "make toast",
        "pip install '.[toast]'",
        "toast",
    ],
)
def test_wrong_commands_are_found(text, monkeypatch):
    monkeypatch.chdir(ROOT)
    (words,) = read_commands(make_block(text))
    with pytest.raises(AssertionError):
        check_command(words)


def test_a_block_that_fails_is_told_with_its_words(tmp_path):
    for name in ("page", "programs"):
        (tmp_path / name).mkdir()
    with Shell(tmp_path / "page", tmp_path / "programs") as shell:
        shell.run("cd . && test -d ../page", "README.md:1")
        with pytest.raises(AssertionError, match=r"README.md:5(.|\n)*--image none.png: no such file"):
            shell.run("diffusers-dim edit --image none.png --prompt x", "README.md:5")


def test_commands_are_read_from_a_block():
    text = (
        "A=1 mkdir -p x  # y\nuntil curl --silent 'a b' > /dev/null; do sleep 1; done\npython x \\\n  --y '1\n2' &\n"
    )
    assert read_commands(make_block(text)) == [
        ["mkdir", "-p", "x"],
        ["curl", "--silent", "a b"],
        ["sleep", "1"],
        ["python", "x", "--y", "1\n2"],
    ]


def test_a_reason_has_to_say_something():
    assert not NOT_RUN.fullmatch("<!-- not run: no -->")
    assert NOT_RUN.fullmatch("<!-- not run: it needs a GPU -->")
