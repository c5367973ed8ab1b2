"""Code that all config classes share: the field function, value types, what moves the optimum."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from rlhf_pipeline.config.names import NAME_PATTERN, NAME_RULE, is_name
from rlhf_pipeline.errors import Fault


def option(
    default: Any,
    description: str,
    *,
    moves_optimum: bool = False,
    neutral: Any = None,
    moving: float | None = None,
    unless: tuple[str, float | str | tuple[str, ...]] | None = None,
    condition: str = "",
    names: Literal["policy", "arm", "reward", "data"] | None = None,
    **limits: Any,
) -> Any:
    """Return a pydantic field; its description states whether the option moves the optimum.

    Args:
        moves_optimum: whether a value can move the minimiser of a loss (for a reward model, that of PPO on it too).
        neutral: the value, or tuple of values, that does not move the optimum; by default the default.
        moving: the only value that moves the optimum, if all others are neutral.
        unless: another option, and its value or values with which (or with null) this option does not move the optimum.
        condition: a property of the run, unknown from the config, that must hold for the optimum to move.
        names: what the value names: a policy, an arm of a comparison (a policy, or METHOD:policy), a reward model or
            another reward source, or data; see `mentions`.
    """
    extra: dict[str, Any] = {} if names is None else {"names": names}
    if moves_optimum:
        extra |= {"moves_optimum": True, "neutral": default if neutral is None else neutral, "condition": condition}
        description += "; moves the optimum" if moving is None else f"; {moving:g} moves the optimum"
        if moving is not None:
            extra["moving"] = moving
        if unless is not None:
            extra["unless"] = list(unless)
            values = unless[1] if isinstance(unless[1], tuple) else (unless[1],)
            said = " or ".join(value if isinstance(value, str) else f"{value:g}" for value in values)
            description += f" unless {unless[0]} is {said}"
        description += f" {condition}" if condition else ""
    return Field(default, description=description, json_schema_extra=extra or None, **limits)


def wrong(expected: str, fix: str = "") -> PydanticCustomError:
    """Return the error that a validator raises: what was expected, and what to do."""
    # pydantic accepts no half surrogate pairs, which a value quoted in `fix` may contain.
    texts = {"expected": expected, "fix": fix}
    said = {name: text.encode(errors="backslashreplace").decode() for name, text in texts.items()}
    return PydanticCustomError("wrong_value", "expected {expected}", said)


def _warmup(value: float) -> float:
    if value >= 1 and not float(value).is_integer():
        raise wrong("a whole number of steps, or a fraction below 1 of all steps")
    return int(value) if float(value).is_integer() else value


def _steps(value: Any) -> Any:
    if value is None:
        return value
    entries = list(value) if isinstance(value, list | tuple) else [value]
    if not entries or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in entries):
        raise wrong("a whole number >= 1 (every n steps) or a list of them (at these steps)")
    return tuple(sorted(set(entries))) if isinstance(value, list | tuple) else value


def _name(value: str) -> str:
    if not is_name(value):
        raise wrong(NAME_RULE)
    return value


def _dtype(value: Any) -> Any:
    return "float32" if value is None else value  # as in alignment-handbook and in older releases of transformers


def _listed(value: Any) -> Any:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
StopToken = Annotated[Text | None, BeforeValidator(lambda value: None if value == "eos" else value)]
Name = Annotated[str, Field(pattern=NAME_PATTERN), AfterValidator(_name)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Warmup = Annotated[float, Field(ge=0), AfterValidator(_warmup)]
Steps = Annotated[int | tuple[int, ...] | None, BeforeValidator(_steps)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(_listed)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_listed)]
Dtype = Annotated[Literal["float32", "bfloat16", "float16", "auto"], BeforeValidator(_dtype)]
Checks = tuple[Callable[[Any], Iterator[Fault]], ...]


# Fields of several classes.
SKIP_BAD_ROWS = option(False, "drop and count faulty rows instead of stopping (ours: stop)")
COLUMN_MAPPING = option(
    None, "columns to rename before the format is detected, {ours: theirs}: {prompt: question} reads question as prompt"
)
SPLIT_FRACTIONS = option(
    {"train": 0.8, "judge": 0.08, "validation": 0.04, "test": 0.08},
    "share of prompts in each split of a source without splits; the hash of the prompt decides",
    min_length=1,
)
DTYPE = option("float32", "number type of the weights (TRL)")
ATTENTION = option(None, "attention kernel (default: the model's choice)")
STOP_TOKEN = option(
    None,
    "token that ends a response too, besides EOS and the model's stop ids (generation_config), and that closes "
    "training targets that have none of these; null or 'eos': EOS (TRL)",
)
REMOTE_CODE = option(False, "run code from the model's repository (transformers: off)")
USE_CPU = option(False, "use the CPU even if there is a GPU (transformers)")
NUM_THREADS = option(None, "CPU threads (default: torch's choice)")


class Keys(BaseModel):
    """Keys of a config, strict and frozen."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bools(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for a number or text; pydantic would read them as 1 and 0."""
        if isinstance(value, bool):
            kinds = set(_kinds(cls.model_fields[str(info.field_name)].annotation))
            if kinds & {int, float, str} and bool not in kinds:
                raise wrong("a number or text, not true or false")
        return value


def _kinds(annotation: Any) -> Iterator[Any]:
    """Yield the types whose values a field takes."""
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        for part in get_args(annotation):
            yield from _kinds(part)
    else:
        yield annotation


class CommandConfig(Keys):
    """The config of a command.

    `checks` yield faults that concern several keys; `remarks` yield notes about effects that a user may not expect.
    """

    stage: ClassVar[str]
    checks: ClassVar[Checks]
    remarks: ClassVar[tuple[Callable[[Any], Iterator[str]], ...]] = ()


class ModelInput(NamedTuple):
    """A model that a stage starts from or reads: its reference, its required role, and its revision on the hub."""

    reference: str
    role: Literal["policy", "reward_model"] = "policy"
    revision: str | None = None


class DataInput(NamedTuple):
    """A source that a stage reads, in the order of the arguments of `read_records`.

    part: None is the source's default part. split: the split of the source that is used whole, or all; None: the
    stage's own splits. columns: (ours, theirs) for each column to rename. test: another source, whose rows are the
    evaluation splits.
    """

    source: str
    part: str | None
    split: str | None = None
    columns: tuple[tuple[str, str], ...] = ()
    test: str | None = None


def renames(mapping: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    """Return a `column_mapping` as a value that can be hashed."""
    return tuple(sorted((mapping or {}).items()))


def part_of(source: str, config: str | None, kind: str) -> str | None:
    """Return the part of a source to read: `config`, or the prompts of a built-in world if prompts are requested.

    The population of a world is made from its prompts (stages/population.py).
    """
    return "prompts" if config in (None, "population") and kind == "prompt" and source.startswith("world:") else config


def no_package(key: str, value: object, package: str, fix: str) -> Fault:
    """Return the fault of a value whose package is not installed."""
    found = f"found {'true' if value is True else repr(value)}, but there is no package {package} in this environment"
    return Fault(key, found, f"{package} installed", fix)


class HasSplits(Protocol):
    """A config with the fractions by which a source without splits is split."""

    @property
    def split_fractions(self) -> dict[str, float]: ...


class HasPart(Protocol):
    """A config that names a part of its source."""

    @property
    def dataset_config(self) -> str | None: ...


def check_fractions(config: HasSplits) -> Iterator[Fault]:
    """Yield the faults of `split_fractions`: negative ones, or a sum that is not 1."""
    fractions = config.split_fractions
    for name, value in fractions.items():
        if value < 0:
            yield Fault(f"split_fractions.{name}", f"found {value:g}", "a number >= 0")
    total = math.fsum(fractions.values())
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        yield Fault("split_fractions", f"the fractions sum to {total:g}", "a sum of 1")


def check_world(config: HasPart, key: str = "dataset_name") -> Iterator[Fault]:
    """Yield the faults of a built-in world, or a part of it, that does not exist."""
    source = getattr(config, key)
    if source is None or not source.startswith("world:"):
        return
    if source != "world:verdicts":
        yield Fault(key, f"found {source!r}", "'world:verdicts', the only built-in world")
    part, parts = config.dataset_config, ["demonstrations", "prompts"]
    if getattr(config, "stage", None) == "dpo":
        parts = ["population"]  # fresh pairs; the world has no recorded pairs, `rlhf data collect` makes them
    if part is not None and part not in parts:
        fix = "population is a source for `rlhf dpo` only" if part == "population" else ""
        yield Fault("dataset_config", f"found {part!r}", " or ".join(repr(name) for name in parts), fix)


def check_prompts(config: HasPart) -> Iterator[Fault]:
    """Yield the faults of prompts from a built-in world that does not exist."""
    return check_world(config, "prompts")


def spelled(value: Any) -> str:
    """Return the value of an option in words: `a + b` for several, `source a weight 2` for one with parts."""
    if isinstance(value, Mapping):
        return " ".join(f"{name} {spelled(part)}" for name, part in value.items())
    return " + ".join(map(spelled, value)) if isinstance(value, list | tuple) else str(value)


def moves_optimum(config: BaseModel) -> dict[str, Any]:
    """Return the options whose values move the optimum of the regularised reward, with these values."""
    return moving_options(type(config), config.model_dump())


def may_move_optimum(config: BaseModel) -> dict[str, Any]:
    """Return the options that move the optimum under a condition unknown from the config, with their values."""
    return moving_options(type(config), config.model_dump(), conditional=True)


def moving_options(kind: type[BaseModel], values: Mapping[str, Any], *, conditional: bool = False) -> dict[str, Any]:
    """Return the options that move the optimum, from raw values that may be those of another release.

    Args:
        kind: the config class of the stage. values: its keys; a missing key has its default.
        conditional: return the options that move the optimum under a condition, instead of those that always do.
    """
    given = {name: values.get(name, field.default) for name, field in kind.model_fields.items()}
    moved = {}
    for name, field in kind.model_fields.items():
        extra = field.json_schema_extra
        if not isinstance(extra, dict) or not extra.get("moves_optimum") or bool(extra["condition"]) != conditional:
            continue
        if not _is_neutral(given[name], extra) and not _is_idle(given, extra):
            moved[name] = given[name]
    sources = () if conditional else given.get("reward_functions") or ()
    if any(source.get("weight", 1) != 1 for source in sources):
        moved["reward_functions"] = [{key: part[key] for key in part if part[key] is not None} for part in sources]
    return moved


def _is_neutral(value: Any, extra: Mapping[str, Any]) -> bool:
    if value is None:  # not used
        return True
    if "moving" in extra:
        return bool(value != extra["moving"])
    neutral = extra["neutral"]
    return value in neutral if isinstance(neutral, tuple) else value == neutral or (value == 0 and neutral is None)


def _is_idle(given: Mapping[str, Any], extra: Mapping[str, Any]) -> bool:
    """Whether the value of another option removes the effect of this one."""
    if "unless" not in extra:
        return False
    name, values = extra["unless"]
    return given[name] is None or given[name] in (values if isinstance(values, tuple) else (values,))
