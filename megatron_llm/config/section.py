"""What all sections of the configuration have in common. Called by the other files of this package."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Field(gt=0)


class Section(BaseModel):
    """Base of all sections: unknown keys and numbers that are not finite are refused, instances are read-only."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
