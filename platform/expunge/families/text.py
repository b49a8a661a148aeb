"""Prompts through SD3's text encoders: one encoder after the other is read, asked and freed.

The rows are those of `StableDiffusion3Pipeline.encode_prompt`, which needs all encoders at once, and which quotes what
it cuts off a long prompt, where a prompt may be personal data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from expunge.families.components import Components
from expunge.logs import get_logger

CHUNK = 64
"""Prompts that pass through an encoder at once."""


@dataclass(frozen=True)
class Texts:
    """Prompts [P], and the components that encode them."""

    parts: Components
    prompts: Sequence[str]

    def clip(self, number: str) -> tuple[Tensor, Tensor]:
        """Return the hidden states [P, L, D] and the pooled projection [P, D'] of `text_encoder` + `number`."""

        def ask(encoder: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
            made = encoder(tokens, output_hidden_states=True)
            return made.hidden_states[-2], made[0]

        first = self.parts.other("tokenizer")
        assert isinstance(first, PreTrainedTokenizerBase)
        length = int(first.model_max_length)  # the first one's for both, as in diffusers
        hidden, pooled = self._encoded(number, length, ask)
        return hidden, pooled

    def t5(self, length: int, width: int) -> Tensor:
        """Return the hidden states [P, length, width] of `text_encoder_3`; zeros where the pipeline has none."""
        if self.parts.layout.class_of("text_encoder_3") is None:
            return torch.zeros(len(self.prompts), length, width)
        return self._encoded("_3", length, lambda encoder, tokens: (encoder(tokens)[0],))[0]

    def joined(self, clips: Sequence[Tensor], t5: Tensor | None = None) -> Tensor:
        """Put the encoders side by side and, where `t5` is given, its tokens behind those of the others."""
        together = torch.cat(list(clips), dim=-1)
        if t5 is None:
            return together
        return torch.cat([pad(together, (0, t5.shape[-1] - together.shape[-1])), t5], dim=-2)

    @torch.no_grad()
    def _encoded(
        self, number: str, length: int, ask: Callable[[nn.Module, Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Return what `ask` returns, for all prompts and on the host."""
        tokens = self._tokens(self.parts.other(f"tokenizer{number}"), length)
        with self.parts.borrowed(f"text_encoder{number}") as encoder:
            made = [
                tuple(table.cpu() for table in ask(encoder, part.to(self.parts.device))) for part in tokens.split(CHUNK)
            ]
        return tuple(torch.cat(tables) for tables in zip(*made, strict=True))

    def _tokens(self, tokenizer: object, length: int) -> Tensor:
        """Return int64 [P, length]: each prompt padded or cut. Warns of prompts that are cut, and quotes none."""
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        given = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        longer = sum(len(ids) > length for ids in tokenizer(list(self.prompts)).input_ids)
        if longer:
            get_logger("families").warning(f"{longer} of {len(self.prompts)} prompts are cut after {length} tokens")
        return tokenizer(list(self.prompts), **given).input_ids
