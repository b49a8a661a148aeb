"""Turn rules into a verdict and its sentence, and name every threshold in force that is weaker than the default."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from expunge.settings import EvaluationSettings, GateSettings
from expunge.types import Rule

Verdict = Literal["passed", "failed"]
Weaker = Callable[[Any, Any], bool]
"""Takes the value in force and the default."""

REPRODUCTION = "reproduction"
"""The rule about what is left of a target when the model re-generates it; its bound is a share of the base model's."""


def verdict_of(rules: Sequence[Rule]) -> tuple[Verdict, str]:
    """Return the verdict and why: all rules must pass, and no rules at all prove nothing.

    If some failed, the text names each of them, the worst first. If none did, it gives the figures that decided: of
    rules of one name, the one that is nearest to its threshold.
    """
    failed = [rule for rule in _by_severity(rules) if not rule.passed]
    if failed:
        return "failed", " ".join(f"{sentence(compared(rule))} {sentence(rule.why)}" for rule in failed)
    if not rules:
        return "failed", "Nothing was measured, and what was not measured does not pass."
    by_name = {rule.name: rule for rule in reversed(_by_severity(rules))}
    nearest = [by_name[name] for name in dict.fromkeys(rule.name for rule in rules)]
    figures = ", ".join(f"{r.name} {digits(r.bound)} ({r.relation} {digits(r.threshold)})" for r in nearest)
    return "passed", f"Every rule holds: {figures}."


def decisive(rules: Sequence[Rule]) -> Rule:
    """Return the rule that failed worst; if all pass, what is left of the target or, without that, the nearest miss."""
    return min(_by_severity(rules), key=lambda rule: (rule.passed, rule.passed and rule.name != REPRODUCTION))


def compared(rule: Rule) -> str:
    """Return in words how the rule's bound stands to its threshold, and in which condition it came out worst."""
    allowed = "is allowed" if rule.relation == "at most" else "is required"
    found = "was not measured" if rule.bound is None else f"is {digits(rule.bound)}"
    where = f" in the worst condition ({rule.condition})" if rule.condition else ""
    return f"{rule.name} {found}{where}; {rule.relation} {digits(rule.threshold)} {allowed}"


def loosened(gate: GateSettings, evaluation: EvaluationSettings) -> tuple[str, ...]:
    """Return each setting in force that makes a verdict easier to pass than its default does, as a phrase.

    Such as "max_excess 1000 instead of 0.8". A setting that may weaken one rule and strengthen another is named, too.
    """
    named = []
    for section in (gate, evaluation):
        for name, field in type(section).model_fields.items():
            value, default, weaker = getattr(section, name), field.get_default(call_default_factory=True), WEAKER[name]
            if weaker is not None and value != default and weaker(value, default):
                named.append(f"{name} {_shown(value)} instead of {_shown(default)}")
    return tuple(named)


def _more(value: float, default: float) -> bool:
    return value > default


def _less(value: float, default: float) -> bool:
    return value < default


def _lacks(value: Iterable[object], default: Iterable[object]) -> bool:
    return not set(value) >= set(default)


def _changed(value: object, default: object) -> bool:
    return value != default


def _above_nothing(value: float | None, default: None) -> bool:
    """True for any share but 0, because the default, which is measured, may be as low as that."""
    return value is not None and value > 0


ROBUSTNESS = ("off", "small", "full")

WEAKER: Mapping[str, Weaker | None] = {
    "max_excess": _more,
    "max_matches": _above_nothing,
    "max_recognised": _more,
    "max_implausible": _more,
    "max_alike": _more,
    "max_changed": _more,
    "min_psnr": _less,
    "min_ssim": _less,
    "min_kid_p": _less,
    "max_attempts": None,  # how often to try, not what to prove
    "encoders": _lacks,  # the worst of them decides, so a further one can only add failures
    "levels": _changed,  # levels at which the base model shows nothing could be set
    "level_grid": _lacks,
    "seeds": _less,
    "confidence": _changed,  # lower weakens upper bounds; higher, the lower bounds that free generation must not exceed
    "unseen_folder": None,  # better than made-up pictures if it keeps its promise; the evidence names its reference
    "unseen_pictures": _less,
    "pictures": _less,
    "held_out": _less,
    "generation_samples": _less,
    "integrity_samples": _less,
    "sampling_steps": _less,  # samples that are not finished resemble nothing
    "robustness": lambda value, default: ROBUSTNESS.index(value) < ROBUSTNESS.index(default),
    "ledger_share": _less,
}
"""Says of each setting when it is weaker than its default; None: it is no matter of strength."""


def digits(value: float | None) -> str:
    """Return a figure to three significant digits, or a dash if there is none."""
    return "-" if value is None else f"{value:.3g}"


def sentence(text: str) -> str:
    """Return `text` as a sentence: with a capital, and a full stop where it has no end of its own."""
    text = text.strip()
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?')) else '.'}"


def _by_severity(rules: Iterable[Rule]) -> list[Rule]:
    """Return the rules that failed first, and among equals the one that is furthest over its threshold."""
    return sorted(rules, key=lambda rule: (rule.passed, -_excess(rule)))


def _excess(rule: Rule) -> float:
    """Return how far the bound is over its threshold, as a share of the threshold; infinite if it was not measured."""
    if rule.bound is None:
        return math.inf
    over = rule.bound - rule.threshold
    return (over if rule.relation == "at most" else -over) / (abs(rule.threshold) or 1.0)


def _shown(value: object) -> str:
    if value is None or value == ():
        return "a measured value"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
