"""Write the table of values in helm/expunge/README.md from the `# --` comments in values.yaml.

Run `python helm/readme.py`; with `--check`, it fails if the README is out of date and writes nothing.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

CHART = Path(__file__).parent / "expunge"
BEGIN, END = "<!-- values: written by helm/readme.py -->", "<!-- end of values -->"


def main() -> int:
    readme = CHART / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    written = f"{before}{BEGIN}\n{table((CHART / 'values.yaml').read_text())}\n{END}{after}"
    if "--check" in sys.argv[1:]:
        return int(written != text)
    readme.write_text(written)
    return 0


def table(source: str) -> str:
    """Return the table in Markdown: one row per value, and a single row for a tree of values with a description."""
    node = yaml.compose(source, Loader=yaml.SafeLoader)
    assert isinstance(node, yaml.MappingNode)
    rows = list(_rows(node, "", source.splitlines()))
    return "\n".join(["| value | default | |", "|---|---|---|", *rows])


def _rows(node: yaml.MappingNode, prefix: str, lines: list[str]) -> Iterator[str]:
    for key, value in node.value:
        path = f"{prefix}{key.value}"
        about = _comment(lines, key.start_mark.line)
        if isinstance(value, yaml.MappingNode) and value.value and not about and not value.flow_style:
            yield from _rows(value, f"{path}.", lines)
            continue
        default = json.dumps(_plain(value), ensure_ascii=False)
        yield f"| `{path}` | `{default.replace('|', chr(92) + '|')}` | {about.replace('|', chr(92) + '|')} |"


def _comment(lines: list[str], line: int) -> str:
    """Return the comment block that ends right above `line`, if it begins with `# --`."""
    block: list[str] = []
    while line and lines[line - 1].strip().startswith("#"):
        line -= 1
        block.insert(0, lines[line].strip().removeprefix("#").strip())
        if block[0].startswith("--"):
            return " ".join(block).removeprefix("--").strip()
    return ""


def _plain(node: yaml.Node) -> object:
    return yaml.safe_load(yaml.serialize(node, Dumper=yaml.SafeDumper))


if __name__ == "__main__":
    sys.exit(main())
