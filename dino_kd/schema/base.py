"""The words that settings are written in: rules, lengths, ranges, and what rides in their types."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from dino_kd.lengths import parse_length


def setting(default: Any, meaning: str, *, unit: str = "", free: bool = False, **rules: Any) -> Any:
    """A field with its meaning and unit; `free` settings may change when a run is resumed."""
    extra: dict[str, Any] = {"unit": unit, "free_on_resume": free}
    return Field(default, description=meaning, json_schema_extra=extra, **rules)


class Settings(BaseModel):
    """Common rules: unknown keys are errors, values cannot change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class InWords(NamedTuple):
    """Rides in a type's metadata: what the type accepts, for `--help` and error messages."""

    accepted: str


def _check_length(value: int | str) -> int | str:
    parse_length(value)
    return value


def _check_interval(value: int | str) -> int | str:
    if parse_length(value).amount == 0:
        raise ValueError(f"expected more than 0, got {value!r}")
    return value


def _check_run_length(value: int | str) -> int | str:
    if parse_length(value).unit == "%":
        raise ValueError(
            f"expected steps (500) or epochs ('10ep'), got {value!r}: "
            "the run's own length cannot be a share of itself"
        )
    return _check_interval(value)


def _check_ascending(value: tuple[float, float]) -> tuple[float, float]:
    low, high = value
    if low > high:
        raise ValueError(f"the first number must not exceed the second, got {[low, high]}")
    return value


def _read_percent(value: Any) -> Any:
    """'10%' as 0.1; everything else as it is."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip().removesuffix("%")) / 100
        except ValueError:
            return value
    return value


Auto = Literal["auto"]
Text = Annotated[str, Field(min_length=1)]
Length = Annotated[
    int | str,
    AfterValidator(_check_length),
    InWords("steps (500), epochs ('10ep') or share ('5%')"),
]
Interval = Annotated[
    int | str,
    AfterValidator(_check_interval),
    InWords("steps (500), epochs ('10ep') or share ('5%'), more than 0"),
]
RunLength = Annotated[
    int | str, AfterValidator(_check_run_length), InWords("steps (500) or epochs ('10ep')")
]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Size = Annotated[
    PositiveInt | tuple[PositiveInt, PositiveInt],  # pixels
    InWords("one side or [height, width], whole numbers > 0"),
]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Range = Annotated[
    tuple[PositiveFloat, PositiveFloat],
    AfterValidator(_check_ascending),
    InWords("[low, high], both > 0"),
]
ShareRange = Annotated[
    tuple[PositiveShare, PositiveShare],
    AfterValidator(_check_ascending),
    InWords("[low, high], both > 0 and at most 1"),
]
Part = Annotated[
    float,
    BeforeValidator(_read_percent),
    Field(gt=0, le=1),
    InWords("a share (0.1) or percent ('10%'), above 0 and at most 1"),
]
Half = Annotated[
    float,
    BeforeValidator(_read_percent),
    Field(gt=0, le=0.5),
    InWords("a share (0.1) or percent ('10%'), above 0 and at most half"),
]
CropShares = Annotated[
    tuple[Share, Share, Share],  # first global crop, second global crop, local crops
    InWords("[global 1, global 2, locals], each from 0 to 1"),
]


class RunSettings(Settings):
    """What every command with a run directory asks for."""

    run_dir: Text = setting(
        ...,
        "Folder of this run; everything it writes goes here.",
        free=True,
        examples=["runs/first"],
    )
    resume: Literal["auto"] | bool = setting(
        False,
        "true: continue the run in run_dir; auto: continue it if there is one; "
        "false: start a new one.",
        free=True,
    )
    seed: Annotated[int, Field(ge=0)] = setting(0, "Seeds weights, data order and augmentation.")
    device: Text = setting("auto", "auto, cpu, cuda, cuda:1, mps.", free=True)
