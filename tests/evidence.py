"""Evidence of protocol 2, made up: what an evaluation leaves of a request that passed, failed or is not reproduced."""

from itertools import product

from expunge.evaluation.gate import verdict_of
from expunge.evaluation.rules import PROTOCOL_VERSION, rule
from expunge.types import Basis, ConditionEvidence, Evidence, IntegrityEvidence, RequestEvidence, Rule

VIEWS = ("as submitted", "mirrored", "shifted and scaled", "photometric")
PROMPTS = ("own prompt", "empty prompt")
ENCODERS = ("efficientnet-lite0", "edges")


def condition(view: str, prompt: str, encoder: str, **changes: object) -> ConditionEvidence:
    """One condition in which 0.2 of the excess is left, at most 0.3."""
    given = {
        "picture": 0,
        "held_out": False,
        "view": view,
        "prompt": prompt,
        "encoder": encoder,
        "draws": 9,
        "unseen": 0.31,
        "base": 0.86,
        "after": 0.42,
        "ratio": 0.2,
        "bound": 0.3,
        "informative": True,
    }
    return ConditionEvidence.model_validate({**given, **changes})


def conditions(worst: float = 0.42) -> tuple[ConditionEvidence, ...]:
    """Every view under every prompt as each encoder sees it; mirrored, under the empty prompt, the bound is `worst`."""
    made = {key: condition(*key) for key in product(VIEWS, PROMPTS, ENCODERS)}
    key = ("mirrored", "empty prompt", "edges")
    made[key] = condition(*key, ratio=worst - 0.1, bound=worst, after=0.31 + 0.55 * (worst - 0.1), draws=18)
    key = ("photometric", "own prompt", "edges")
    made[key] = condition(*key, base=0.33, informative=False, ratio=None, bound=None)
    key = ("photometric", "empty prompt", "edges")
    made[key] = condition(*key, after=None, ratio=None, bound=None)
    return tuple(made.values())


def rules(worst: float = 0.42) -> tuple[Rule, ...]:
    return (
        rule(
            "reproduction",
            worst - 0.1,
            worst,
            "at most",
            0.6,
            base=1.0,
            condition="mirrored, empty prompt, edges",
            why="what is left of the base model's excess over unseen pictures.",
        ),
        rule("free generation", 0.0, 0.0, "at most", 0.03, base=0.41, why="no free sample matches the target."),
        rule("plausible", 0.03, 0.12, "at most", 0.2, why="what comes out is a picture of the model's domain."),
    )


def judged(request: str, worst: float = 0.42) -> RequestEvidence:
    """A request of which at most `worst` of the base model's excess is left; 0.6 is allowed."""
    verdict, why = verdict_of(rules(worst))
    return RequestEvidence(request=request, verdict=verdict, why=why, rules=rules(worst), conditions=conditions(worst))


def not_reproduced(request: str) -> RequestEvidence:
    why = "The base model returns the target no better than pictures that it never saw: there is nothing to remove."
    base = {"informative": False, "base": 0.34, "after": None, "ratio": None, "bound": None}
    drawn = tuple(condition(*key, **base) for key in product(VIEWS, PROMPTS, ENCODERS))
    return RequestEvidence(request=request, verdict="not_reproduced", why=why, conditions=drawn)


def integrity(psnr: float = 28.4) -> IntegrityEvidence:
    found = (
        rule("median PSNR", psnr, psnr, "at least", 20.0, base=12.1, why="other outputs stayed as they were."),
        rule("changed", 0.03, 0.09, "at most", 0.1, condition="nearest neighbours", why="few samples changed."),
    )
    verdict, why = verdict_of(found)
    return IntegrityEvidence(
        psnr=psnr,
        psnr_unrelated=12.1,
        ssim=0.91,
        ssim_unrelated=0.18,
        kid=0.004,
        kid_floor=0.003,
        passed=verdict == "passed",
        why=why,
        rules=found,
        figures={"psnr_p05": 21.3, "psnr_worst": 16.8, "kid_p": 0.42},
    )


def basis(**changes: object) -> Basis:
    given = {
        "code": "0.2.0",
        "base": "4be1c0ffee12" * 5,
        "encoders": ENCODERS,
        "calibration": "committed with the testbed `faces`, 1 % false matches",
        "reference": "24 pictures made from the model's own samples",
        "levels": (0.4, 0.5, 0.6),
        "views": VIEWS,
        "draws": 9,
        "confidence": 0.95,
        "generation_samples": 32,
        "integrity_samples": 32,
        "integrity_prompts": 12,
        "sampling_steps": 20,
        "passes": 12_480,
        "gate": {"max_excess": 0.6, "max_matches": None},
        "not_tested": ("Other pictures of the same person.", "Prompts that no request names."),
    }
    return Basis.model_validate({**given, **changes})


def evidence(job: str, *requests: RequestEvidence, trained: bool = True, loosened: tuple[str, ...] = ()) -> Evidence:
    return Evidence(
        job=job,
        protocol_version=PROTOCOL_VERSION,
        requests=requests,
        integrity=integrity() if trained else None,
        basis=basis(loosened=loosened),
    )
