"""Evidence for a person: the verdict and its reason first, then each figure beside its baseline and its noise."""

from collections.abc import Iterator, Mapping

import typer

from expunge.commands.common import one_line, print_rows

FIGURES = {
    "shift": "re-generated: 0 is the target, 1 the surrogate",
    "target": "re-generated: similarity to the target",
    "surrogate": "re-generated: similarity to the surrogate",
    "nearest": "generated freely: highest similarity to the target",
}
COLUMNS = ("figure", "after", "base", "noise", "")
INTEGRITY = (
    ("psnr", "PSNR", "{:.1f} dB", "psnr_unrelated", "unrelated pictures"),
    ("ssim", "SSIM", "{:.2f}", "ssim_unrelated", "unrelated pictures"),
    ("kid", "KID", "{:.2g}", "kid_floor", "noise"),
)
"""Name, label and form of each figure, and the name and label of what it is compared with."""

Evidence = Mapping[str, object]


def print_evidence(evidence: Evidence) -> None:
    """Print the evidence of a request's last night. Fields of another version are printed as they are."""
    verdict, why = evidence.get("verdict"), evidence.get("why")
    if verdict:
        _line("verdict", f"{verdict}: {why}" if why else verdict)
    integrity = evidence.get("integrity")
    if isinstance(integrity, dict):
        _line("integrity", _integrity(integrity))
    if evidence.get("version"):
        _line("version", evidence["version"])
    known = {"request", "verdict", "why", "integrity", "version", "levels", *FIGURES}
    for name in (name for name in evidence if name not in known):
        _line(name, evidence[name])
    rows = [*_rows(evidence)]
    if rows:
        typer.echo()
        print_rows(COLUMNS, rows)


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
