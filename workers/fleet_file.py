"""A YAML file that says which workers run on a machine, and with which of vLLM's arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schema.errors import InvalidFileError, shown
from workers.serving import engine_words

EngineArgs = dict[str, Any]


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
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
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


def _faults(error: ValidationError) -> str:
    faults = []
    for fault in error.errors(include_url=False):
        field = ".".join(str(part) for part in fault["loc"]) or "the file"
        if fault["type"] == "extra_forbidden":
            faults.append(f"{field} is not known")
        elif field.endswith("gpus"):
            faults.append(f'{field}: put it in quotes, such as "0,1:2,3"')
        else:
            faults.append(f"{field}: {fault['msg'].lower()}, not {shown(fault['input'])}")
    return "; ".join(faults)
