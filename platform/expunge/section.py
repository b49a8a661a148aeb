"""What a table of settings is, and the types that several tables share. Each component defines its own tables."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, ValidatorFunctionWrapHandler, field_validator

from expunge.sources import as_written, is_optional

Fraction = Annotated[float, Field(gt=0, lt=1)]
Resolution = tuple[Annotated[int, Field(ge=8, le=4096)], Annotated[int, Field(ge=8, le=4096)]]
"""Height and width in pixels."""

IDENTIFIER = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
"""The pattern of the names of models, requests and batches."""
IDENTIFIER_RULE = "use letters, digits, dot, dash and underscore, at most 63, and a letter or digit first"
"""IDENTIFIER in words, as a hint."""


class Section(BaseModel):
    """One table of the config file. A value that its field does not take is refused, and never shown."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _from_text(cls, value: object, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> object:
        """Read the text of an environment variable as its field's type."""
        return as_written(value, handler, optional=is_optional(cls, info.field_name))
