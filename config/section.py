"""What an option and a section are made of; `config.schema` declares the options themselves."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    SerializationInfo,
)

from config.dsn import check_dsn, redact_dsn


def option(
    default: Any, description: str, *, downside: str, unit: str = "", live: bool = False, **constraints: Any
) -> Any:
    """Declare an option: what it does, what it costs to change it, its unit, and pydantic's constraints.

    `live`: a running proxy takes a new value; otherwise a restart does.
    """
    return Field(
        default=default,
        description=description,
        json_schema_extra={"unit": unit, "downside": downside, "live": live},
        **constraints,
    )


class Section(BaseModel):
    """What all sections have in common: unknown keys are errors, and nothing can be changed later."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, hide_input_in_errors=True, allow_inf_nan=False
    )


def _checked(dsn: SecretStr) -> SecretStr:
    check_dsn(dsn.get_secret_value())
    return dsn


def _dumped(dsn: SecretStr, info: SerializationInfo) -> str:
    secrets = bool(info.context and info.context.get("secrets"))
    return dsn.get_secret_value() if secrets else redact_dsn(dsn.get_secret_value())


def _dumped_secret(secret: SecretStr, info: SerializationInfo) -> str:
    return secret.get_secret_value() if info.context and info.context.get("secrets") else str(secret)


Dsn = Annotated[SecretStr, AfterValidator(_checked), PlainSerializer(_dumped, when_used="json")]
"""A connection URI; its password is shown nowhere but in `Config.to_json`."""

Secret = Annotated[SecretStr, Field(min_length=16), PlainSerializer(_dumped_secret, when_used="json")]
"""A secret of at least 16 characters; shown nowhere but in `Config.to_json`."""
