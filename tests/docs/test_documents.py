"""What a newcomer reads holds: links lead somewhere, files exist, and commands are ones that Expunge has."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer.main
from typer.core import TyperGroup

from expunge.cli import app

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "deploy", "helm", "platform", "unlearn_kernels")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
HISTORY = ROOT / "CHANGELOG.md"


def _each(documents: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("document", documents, ids=[str(path.relative_to(ROOT)) for path in documents])


every_document = _each(DOCUMENTS)
every_present = _each([document for document in DOCUMENTS if document != HISTORY])
"""The changelog also names what is gone."""


@every_document
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@every_present
def test_files_that_are_named_exist(document: Path) -> None:
    for name in re.findall(
        r"`((?:platform|unlearn_kernels|jobs|deploy|helm|tests|docs)/[\w./-]+)`", document.read_text()
    ):
        assert (ROOT / name).exists(), name


@every_present
def test_commands_exist(document: Path) -> None:
    for line in code(document.read_text()):
        for words in re.findall(r"(?:^|[;&|`] ?|/)expunge ([a-z][^;&|#`]*)", line):
            command(words.replace("'", " ").split())


@every_present
def test_modules_and_targets_exist(document: Path) -> None:
    text = document.read_text()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in code(text):
        for module in re.findall(r"python -m ((?:expunge|unlearn_kernels|tests)[\w.]*)", line):
            assert find_spec(module), module
        for target in re.findall(r"\bmake ([a-z][\w-]+)", line):
            assert target in targets, target


def anchors(document: Path) -> set[str]:
    """The ids that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def code(text: str) -> Iterator[str]:
    """Lines of code blocks without their comments, and pieces of inline code."""
    blocks = re.split(r"^```.*$", text, flags=re.MULTILINE)
    for block in blocks[1::2]:
        yield from (line.partition(" #")[0] for line in block.splitlines())
    for prose in blocks[::2]:
        yield from re.findall(r"`([^`]+)`", prose)


def command(words: list[str]) -> None:
    """Follow `words` through the command line's groups; fails where a command or an option is unknown."""
    found = typer.main.get_command(app)
    while isinstance(found, TyperGroup) and words:
        name, *words = words
        assert name in found.commands, f"{name} is not a command"
        found = found.commands[name]
    options = {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in {*options, "--help"}, f"{found.name} has no {word}"
