"""The sizes of a job's requests that its cost depends on."""

from collections.abc import Iterable
from dataclasses import dataclass

from expunge.batch.cost.amounts import Amounts
from expunge.evaluation.views import VIEWS
from expunge.settings import EvaluationSettings, ModelSettings
from expunge.types import RemovalRequest


@dataclass(frozen=True)
class Load(Amounts):
    """Some requests of one model. Loads add up."""

    requests: int = 0
    pictures: int = 0
    rows: int = 0
    """Each picture once per prompt; the forget set has as many of every view."""
    conditions: int = 0
    """Picture, view and prompt, as the evaluation tests them."""
    guided: int = 0
    """The conditions among them whose prompt is not the empty one, so that guidance asks the network twice."""
    prompts: int = 0
    """Prompts that requests bring themselves; two requests with the same prompt count twice."""

    @classmethod
    def of(cls, requests: Iterable[RemovalRequest], model: ModelSettings, evaluation: EvaluationSettings) -> "Load":
        """Add up `requests`."""
        total = cls()
        for request in requests:
            own = bool(request.prompt) and request.prompt not in model.forget_prompts
            total += cls.typical(1, model, evaluation, pictures=len(request.images), own_prompt=own)
        return total

    @classmethod
    def typical(
        cls,
        requests: int,
        model: ModelSettings,
        evaluation: EvaluationSettings,
        *,
        pictures: int = 1,
        own_prompt: bool = False,
    ) -> "Load":
        """Return `requests` alike ones, each with so many pictures, and with or without a prompt of its own."""
        shared, own = len(model.forget_prompts), int(own_prompt)
        tested = len(VIEWS) * min(pictures, evaluation.pictures)
        return cls(
            requests=requests,
            pictures=requests * pictures,
            rows=requests * pictures * (shared + own),
            conditions=requests * tested * (shared + own),
            guided=requests * tested * (sum(prompt != "" for prompt in model.forget_prompts) + own),
            prompts=requests * own,
        )

    def share(self, of: int) -> "Load":
        """Return the part of this load that `of` of its requests are, rounded up."""
        return self._each(lambda count: -(-count * of // self.requests)) if self.requests else self
