"""Evidence in words, for a reader who was not there: what was tested, on what, how surely, and what was not."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from expunge.text import counted
from expunge.types import Basis, ConditionEvidence, RequestEvidence


@dataclass(frozen=True)
class Answer:
    """A question, and its answer in sentences."""

    question: str
    sentences: tuple[str, ...]


def account(basis: Basis) -> tuple[Answer, ...]:
    """Return what a job's evidence rests on, as four questions and their answers."""
    return (
        Answer("What was tested?", tuple(_tested(basis))),
        Answer("On what?", tuple(_on_what(basis))),
        Answer("With what certainty?", tuple(_certainty(basis))),
        Answer("What was not tested?", basis.not_tested or ("The evidence does not say.",)),
    )


def extent(request: RequestEvidence) -> str:
    """Return in a sentence how many conditions one request was tested in; empty if there are none."""
    conditions = [c for c in request.conditions if c.level is None]
    if not conditions:
        return ""
    pictures = {c.picture for c in conditions}
    held = {c.picture for c in conditions if c.held_out}
    kept = f", {len(held)} of them kept out of training" if held else ""
    informative, drawn = sum(c.informative for c in conditions), sum(c.after is not None for c in conditions)
    silent = "the base model shows no memory, or the surrogate resembles the target too much"
    rests = f"{informative} of them" if informative else "none of them"
    if informative < len(conditions):
        rests += f"; in the others {silent}" if informative else f": {silent}"
    undrawn = len(conditions) - drawn
    rest = f". The hotfix was not sampled in {undrawn} of them" if undrawn and drawn else ""
    return (
        f"{counted(len(pictures), 'picture')}{kept}, in {counted(len(_views(conditions)), 'view')} under "
        f"{counted(len({c.prompt for c in conditions}), 'prompt')}, compared by "
        f"{counted(len({c.encoder for c in conditions}), 'encoder')}: "
        f"{counted(len(conditions), 'condition')} of {_span([c.draws for c in conditions])} draws each. "
        f"The verdict rests on {rests}{rest}."
    )


def _tested(basis: Basis) -> Iterable[str]:
    views = f"{counted(len(basis.views), 'view')} ({', '.join(basis.views)})"
    yield f"Whether the model still re-generates each target from noise: in {views}, under every prompt of its request."
    if basis.generation_samples:
        yield f"Whether free generation shows the target: {counted(basis.generation_samples, 'sample')} per prompt."
    if basis.integrity_samples:
        samples = counted(basis.integrity_samples, "sample")
        prompts = f", under {counted(basis.integrity_prompts, 'prompt')} that training did not hold"
        yield (
            f"Whether other outputs stayed as they were: {samples} from the same noise before and after"
            f"{prompts if basis.integrity_prompts else ''}."
        )


def _on_what(basis: Basis) -> Iterable[str]:
    base = f"the files with the digest {basis.base[:12]}" if basis.base else "files whose digest was not recorded"
    yield f"The base model is {base}; the evaluation is that of Expunge {basis.code}."
    levels = ", ".join(f"{level:g}" for level in basis.levels) or "none at which its memory shows"
    yield f"Noise level{'' if len(basis.levels) == 1 else 's'}: {levels}."
    yield f"Denoising steps per sample: {basis.sampling_steps}."
    yield f"Pictures were compared by {_joined(basis.encoders)}; the worst result decides."
    yield f"Pictures that the base model never saw: {basis.reference}."
    yield f"Match thresholds: {basis.calibration.rstrip('.')}."


def _certainty(basis: Basis) -> Iterable[str]:
    yield (
        f"Where a figure is estimated from draws, its one-sided bound at {100 * basis.confidence:g} % confidence is "
        "compared, not the figure itself. The worst condition decides."
    )
    draws = counted(basis.draws, "draw")
    yield f"Each condition is measured with at least {draws} of noise, different from training's."
    if basis.loosened:
        yield f"The gate was loosened: {'; '.join(basis.loosened)}. The verdicts say less than with the defaults."
    else:
        yield "No threshold is weaker than the default."


def _views(conditions: Sequence[ConditionEvidence]) -> set[str]:
    return {condition.view for condition in conditions}


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _joined(words: Sequence[str]) -> str:
    return " and ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else "".join(words)
