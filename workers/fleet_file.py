"""A YAML file that says which workers run on a machine, and with which of vLLM's arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from schema.errors import InvalidFileError, shown
from schema.refusal import did_you_mean
from workers.serving import engine_words

EngineArgs = dict[str, Any]
_WHERE = "; arguments of vLLM's go under engine_args"


class WorkersOfAModel(BaseModel):
    """One model, and where it runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(
        default=None, min_length=1, description="Folder or hub name. Unset: that of the settings."
    )
    served_model_name: str | None = Field(
        default=None, min_length=1, description="Name that jobs ask for. Unset: the model's own."
    )
    gpus: str | None = Field(
        default=None,
        strict=True,  # YAML takes 1:2 for the number 62
        description='As `--gpus`, in quotes: "0,1:2,3" is two workers on two cards each.',
    )
    count: int = Field(default=1, ge=1, description="Workers, on the CPU.")
    engine_args: EngineArgs = Field(
        default_factory=dict, description="Of vLLM, for these workers; they win over those for all."
    )

    @model_validator(mode="after")
    def _counted_once(self) -> Self:
        if self.gpus is not None and "count" in self.model_fields_set:
            msg = "its cards say how many workers there are; leave out count or gpus"
            raise ValueError(msg)
        return self


class FleetFile(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine_args: EngineArgs = Field(default_factory=dict, description="Of vLLM, for every worker.")
    workers: tuple[WorkersOfAModel, ...] = Field(
        default=(), description="Unset: what the command line says."
    )

    def words(self, workers: WorkersOfAModel | None = None) -> tuple[str, ...]:
        """Return vLLM's arguments as words of its command line.

        Args:
            workers: Whose; None is for those that the file does not name.
        """
        own = workers.engine_args if workers else {}
        return engine_words({**self.engine_args, **own})


def read(path: Path) -> FleetFile:
    """Read the file.

    Args:
        path: Where it is.

    Raises:
        InvalidFileError: It cannot be read, is no YAML, or holds what is not known; the message
            names the field.
    """
    import yaml

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _loader())  # noqa: S506  a safe one
    except OSError as exc:
        msg = f"it cannot be read ({exc.strerror})"
        raise InvalidFileError(msg, path=path) from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        mark = getattr(exc, "problem_mark", None)
        msg = f"it is not YAML ({getattr(exc, 'problem', None) or exc})"
        raise InvalidFileError(msg, path=path, line=mark and mark.line + 1) from exc
    try:
        return FleetFile.model_validate(content or {})
    except ValidationError as exc:
        raise InvalidFileError(_faults(exc), path=path) from None


def _loader() -> Any:
    """Return YAML's safe loader, which refuses a key given twice; by itself it takes the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                if not isinstance(key.value, str):
                    continue
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"{key.value} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    return Loader


def _faults(error: ValidationError) -> str:
    faults = []
    for fault in error.errors(include_url=False):
        field = ".".join(str(part) for part in fault["loc"]) or "the file"
        if fault["type"] == "extra_forbidden":
            names = (WorkersOfAModel if len(fault["loc"]) > 1 else FleetFile).model_fields
            hint = did_you_mean(str(fault["loc"][-1]), names)
            faults.append(f"{field} is not known{hint or _WHERE}")
        elif fault["type"] == "value_error":
            faults.append(f"{field}: {fault['msg'].removeprefix('Value error, ')}")
        elif field.endswith("gpus"):
            faults.append(f'{field}: put it in quotes, such as "0,1:2,3"')
        else:
            faults.append(f"{field}: {fault['msg'].lower()}, not {shown(fault['input'])}")
    return "; ".join(faults)
