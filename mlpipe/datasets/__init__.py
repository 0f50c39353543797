"""Small data sets that ship with the package; README.md beside them says where they come from."""
from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError, did_you_mean

NAMES = ("cbpp", "insteval", "penicillin", "sleepstudy")


def path(name: str) -> Path:
    """The Parquet file of a data set, one of `NAMES`.

    Raises ConfigError (code "unknown_dataset") for any other name.
    """
    if name not in NAMES:
        raise ConfigError(f"there is no data set {name!r}", code="unknown_dataset", hint=did_you_mean(name, list(NAMES)))
    return Path(__file__).with_name(f"{name}.parquet")
