"""The arms of a benchmark: what each trains with, what differs from the product, and what a step of it costs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from expunge.bench import controls
from expunge.bench.lesson import Lesson, Method
from expunge.bench.product import GRADIENT, passes_of_product, product
from expunge.errors import InputError
from expunge.settings import TrainingSettings

NO_OP, RETRAINED = "no-op", "retrained"


@dataclass(frozen=True)
class Arm:
    """One way to remove."""

    title: str
    method: Method | None = None
    """None: nothing is trained."""
    passes: Callable[[Lesson], int] = lambda lesson: 0
    """Network passes per step; a backward pass counts as two."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """What differs from the product's training settings."""
    constant_rate: bool = False
    needs_prompts: bool = False

    def training(self, product: TrainingSettings) -> TrainingSettings:
        """Return the product's settings with those of this arm."""
        return TrainingSettings.model_validate({**product.model_dump(), **self.settings})


def _each(count: int) -> Callable[[Lesson], int]:
    """Cost `count` passes per sample, of both kinds together."""
    return lambda lesson: count * lesson.both


def _ours(title: str, settings: Mapping[str, object] | None = None, *, constant_rate: bool = False) -> Arm:
    return Arm(title, product, passes_of_product, settings or {}, constant_rate)


# The paper's abstract (arXiv 2603.10445) names a surrogate, timestep-aware weighting and surgery against a retain
# gradient, and neither distillation nor where times are drawn.
PAPER: Mapping[str, object] = {"forget_target": "surrogate", "retain_target": "data", "density": "uniform"}
# SISS passes once through the network, and twice back.
_SISS = 1 + 2 * 2
# ESD asks the frozen model twice.
_ESD = GRADIENT + 2

ARMS: Mapping[str, Arm] = {
    NO_OP: Arm("nothing"),
    "fine-tune": Arm("fine-tuning on the surrogate", controls.fine_tune, _each(GRADIENT)),
    "neggrad": Arm("NegGrad", controls.neg_grad, _each(GRADIENT)),
    "erasediff": Arm("EraseDiff", controls.erase_diff, _each(GRADIENT)),
    "siss": Arm("SISS", controls.siss, _each(_SISS)),
    "siss-no-is": Arm("SISS without importance sampling", controls.siss_without_sampling, _each(GRADIENT)),
    "esd": Arm("ESD-style prompt erasure", controls.esd, _each(_ESD), needs_prompts=True),
    RETRAINED: Arm("retrained without the targets"),
    "paper": _ours("the paper as described", PAPER),
    "ours": _ours("ours"),
    "no-views": _ours("ours without views", {"views": 1}),
    "no-surgery": _ours("ours without surgery", {"surgery": "none"}),
    "data-retain": _ours("ours, data instead of distilled retain", {"retain_target": "data"}),
    "uniform-weight": _ours("ours, uniform weighting", {"weighting": "uniform"}),
    "uniform-times": _ours("ours without memory density", {"density": "uniform"}),
    "surrogate-target": _ours("ours, surrogate instead of recognition", {"forget_target": "surrogate"}),
    "constant-rate": _ours("ours at a constant rate", constant_rate=True),
}


def choose_arms(names: str, *, prompts: bool, oracle: bool) -> list[str]:
    """Read a list such as `no-op,ours`, in the order of ARMS; empty or `all` means all that the testbed allows.

    prompts: the testbed's model knows prompts. oracle: a retrained model is given. Raises InputError.
    """
    wanted = [name for part in names.split(",") if (name := part.strip())]
    if wanted in ([], ["all"]):
        return [name for name in ARMS if (prompts or not ARMS[name].needs_prompts) and (oracle or name != RETRAINED)]
    for name in wanted:
        if name not in ARMS:
            raise InputError(f"--arms: there is no arm {name!r}", hint=f"use some of {', '.join(ARMS)}, or all")
        if ARMS[name].needs_prompts and not prompts:
            raise InputError(f"--arms: {name} needs a model with prompts", hint="leave it out, or use --testbed flags")
        if name == RETRAINED and not oracle:
            raise InputError(
                f"--arms: {name} needs a model that was trained without the targets",
                hint="train one with `expunge testbed NAME --without NUMBERS`, and give --oracle and --without",
            )
    return [name for name in ARMS if name in wanted]
