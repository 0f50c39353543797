"""The statements of `sql/`, from an installed wheel or a source checkout."""
from __future__ import annotations

from pathlib import Path


def sql_folder() -> Path:
    """Where the statements are: inside the package in a wheel, beside it in a checkout or an editable install."""
    package = Path(__file__).parent
    installed = package / "_sql"
    return installed if installed.is_dir() else package.parent / "sql"


def read_sql(name: str) -> str:
    """The text of `sql/<name>.sql`, comments included."""
    return (sql_folder() / f"{name}.sql").read_text(encoding="utf-8")
