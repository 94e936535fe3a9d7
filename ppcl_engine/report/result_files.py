"""The fields of evaluate.json, detect.json and width.json that the report relies on."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ..system.schemas import BlockIndex, Count, Finite


class _Open(BaseModel):
    """Allows fields that are not named here, and leaves them as they are."""

    model_config = ConfigDict(extra="allow", strict=True)


class TimestepError(_Open):
    t: Finite
    value: Finite
    low: Finite
    high: Finite


class EvaluatedVariant(_Open):
    name: str
    parameters: Count
    velocity_error_by_timestep: list[TimestepError] | None
    """None: the teacher's"""


class Evaluation(_Open):
    variants: Annotated[list[EvaluatedVariant], Field(min_length=1)]
    captions_shown: list[str]


class Stat(_Open):
    value: Finite
    low: Finite
    high: Finite


class JudgedVariant(Stat):
    name: str
    folder: str
    """of its pictures"""
    difference: Stat | None
    """None: the teacher's"""


class LostPrompt(_Open):
    prompt: str
    picture: str
    """name of the file in every variant's folder"""
    shares: dict[str, Finite]


class BenchmarkResult(_Open):
    grader: str
    prompts: Count
    available: Count
    """prompts in the benchmark's file"""
    variants: Annotated[list[JudgedVariant], Field(min_length=1)]
    lost_most: list[LostPrompt]


class DetectedInterval(_Open):
    first: BlockIndex
    last: BlockIndex


class Detection(_Open):
    method: str
    intervals: list[DetectedInterval]


class WidthCandidate(_Open):
    name: str
    form: str
    chosen: bool


class Width(_Open):
    method: str
    candidates: list[WidthCandidate]
