"""Evidence for a person: the verdict and its reason first, then each figure beside what it is compared with."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import typer

from expunge.commands.common import one_line, print_rows

if TYPE_CHECKING:
    from pydantic import BaseModel

    from expunge.types import Basis, Rule

    Model = TypeVar("Model", bound=BaseModel)

FIGURES = {
    "shift": "re-generated: 0 is the target, 1 the surrogate",
    "target": "re-generated: similarity to the target",
    "surrogate": "re-generated: similarity to the surrogate",
    "nearest": "generated freely: highest similarity to the target",
}
"""The figures of protocol 1."""

COLUMNS = ("figure", "after", "base", "noise", "")
RULES = ("rule", "figure", "bound", "threshold", "base", "verdict", "worst condition")
INTEGRITY = (
    ("psnr", "PSNR", "{:.1f} dB", "psnr_unrelated", "unrelated pictures"),
    ("ssim", "SSIM", "{:.2f}", "ssim_unrelated", "unrelated pictures"),
    ("kid", "KID", "{:.2g}", "kid_floor", "noise"),
)
"""Name, label and form of each figure, and the name and label of what it is compared with."""

Evidence = Mapping[str, object]


def print_evidence(evidence: Evidence) -> None:
    """Print the evidence of a request's last night. Fields of another version are printed as they are."""
    from expunge.types import Basis

    verdict, why = evidence.get("verdict"), evidence.get("why")
    if verdict:
        _line("verdict", f"{verdict}: {why}" if why else verdict)
    integrity = evidence.get("integrity")
    if isinstance(integrity, dict):
        _line("integrity", _integrity(integrity))
    if evidence.get("version"):
        _line("version", evidence["version"])
    basis = _read(Basis, evidence.get("basis"))
    if basis is not None and basis.loosened:
        _line("loosened", "; ".join(basis.loosened))
    known = {"request", "verdict", "why", "integrity", "version", "levels", *FIGURES}
    known |= {"protocol_version", "rules", "conditions", "basis"}
    for name in (name for name in evidence if name not in known):
        _line(name, evidence[name])
    rules = [*_stored_rules(evidence), *(_stored_rules(integrity) if isinstance(integrity, dict) else ())]
    if rules:
        typer.echo()
        print_rules(rules)
    rows = [*_rows(evidence)]
    if rows:
        typer.echo()
        print_rows(COLUMNS, rows)


def print_rules(rules: "Iterable[Rule]") -> None:
    """Print each rule with its figure, the bound that was compared, and the condition that came out worst."""
    from expunge.evaluation.gate import digits

    print_rows(
        RULES,
        (
            (
                rule.name,
                digits(rule.value),
                digits(rule.bound),
                f"{rule.relation} {digits(rule.threshold)}",
                digits(rule.base),
                "passed" if rule.passed else "FAILED",
                rule.condition,
            )
            for rule in rules
        ),
    )


def print_account(basis: "Basis") -> None:
    """Print what a job's evidence rests on: what was tested, on what, how surely, and what was not tested."""
    from expunge.evaluation.account import account

    for answer in account(basis):
        typer.echo(answer.question)
        for sentence in answer.sentences:
            typer.echo(f"  {one_line(sentence)}")


def loosened_line(basis: "Basis") -> str:
    """Return one line that names every setting of the gate that was weaker than the default."""
    return f"gate loosened: {'; '.join(basis.loosened)}"


def _stored_rules(evidence: Evidence) -> "Sequence[Rule]":
    """Return the stored rules that this version can read."""
    from expunge.types import Rule

    stored = evidence.get("rules")
    found = (_read(Rule, each) for each in stored) if isinstance(stored, list) else ()
    return [rule for rule in found if rule is not None]


def _read(kind: "type[Model]", value: object) -> "Model | None":
    from pydantic import ValidationError

    try:
        return kind.model_validate(value)
    except ValidationError:
        return None


def _line(name: str, value: object) -> None:
    typer.echo(f"{name:<12} {one_line(value)}")


def _rows(evidence: Evidence) -> Iterator[tuple[str, ...]]:
    for name, meaning in FIGURES.items():
        if evidence.get(name) is not None:
            yield (name, *_figures(evidence[name]), meaning)
    levels = evidence.get("levels")
    for level, measured in levels.items() if isinstance(levels, dict) else ():
        yield (f"target at {level}", *_figures(measured), f"the same from noise level {level} alone")


def _figures(measured: object) -> tuple[str, str, str]:
    """Return the figure after the night, the base model's, and its spread over seeds, to two digits."""
    if not isinstance(measured, dict):
        return _digits(measured), "", ""
    after, base, floor = (_digits(measured.get(part)) for part in ("after", "base", "floor"))
    return after, base, floor


def _digits(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else ""


def _integrity(integrity: Evidence) -> str:
    """Describe how well unrelated outputs are kept, each figure beside its baseline."""
    said = "passed" if integrity.get("passed") else "failed"
    why = str(integrity.get("why") or "").rstrip(".")
    parts = [f"{said}: {why}" if why else said]
    for name, label, form, compared, beside_what in INTEGRITY:
        value, baseline = integrity.get(name), integrity.get(compared)
        if isinstance(value, int | float):
            beside = f" ({beside_what} {form.format(baseline)})" if isinstance(baseline, int | float) else ""
            parts.append(f"{label} {form.format(value)}{beside}")
    return ", ".join(parts)
