"""A Dockerfile as stages of instructions: enough of the format for the two in deploy/."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    name: str
    value: str


@dataclass
class Stage:
    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def of(self, name: str) -> list[str]:
        return [instruction.value for instruction in self.instructions if instruction.name == name]

    def variables(self) -> dict[str, str]:
        """ARG defaults and ENV, as the stage ends."""
        words = [word for name in ("ARG", "ENV") for value in self.of(name) for word in shlex.split(value)]
        return dict(word.split("=", 1) for word in words if "=" in word)


@dataclass(frozen=True)
class Dockerfile:
    arguments: dict[str, str]
    """Those before the first stage: what a base may be named by."""
    stages: tuple[Stage, ...]


def parse(path: Path) -> Dockerfile:
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    for text in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        name, _, value = text.strip().partition(" ")
        if not name:
            continue
        if name == "FROM":
            base, _, alias = value.partition(" AS ")
            stages.append(Stage(base, alias))
        elif stages:
            stages[-1].instructions.append(Instruction(name, value.strip()))
        else:
            key, _, default = value.partition("=")
            arguments[key] = default.strip('"')
    return Dockerfile(arguments, tuple(stages))
