"""The errors and warnings that users see; nothing an engine raises reaches them bare."""
from __future__ import annotations


class MlpipeError(Exception):
    """Base of all errors.

    Attributes: `code`, a stable machine-readable name; `hint`, what to do about it; `column`, the column at
    fault; `span`, the (start, stop) characters of the formula at fault. The last three may be None.
    """

    code = "error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        hint: str | None = None,
        column: str | None = None,
        span: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.hint, self.column, self.span = message, hint, column, span
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class FormulaError(MlpipeError, ValueError):
    """The formula cannot be read or asks for what does not exist."""

    code = "formula"


class ConfigError(MlpipeError, ValueError):
    """An argument, option or job setting is wrong."""

    code = "config"


class DataError(MlpipeError, ValueError):
    """The data cannot be used as asked."""

    code = "data"


class ColumnNotFoundError(DataError, KeyError):
    """A column that the request names is not in the data."""

    code = "column_not_found"


class ResourceError(MlpipeError, RuntimeError):
    """The engine, the memory budget or the disk failed."""

    code = "resource"


class ConvergenceError(MlpipeError, RuntimeError):
    """The fit did not converge, or is what the job's policy forbids."""

    code = "convergence"


class MlpipeWarning(UserWarning):
    """Base of all warnings."""


class ConvergenceWarning(MlpipeWarning):
    """The score at the end is larger than the tolerance."""


class SingularFitWarning(MlpipeWarning):
    """A random-effects covariance matrix is on the boundary."""


class RankWarning(MlpipeWarning):
    """Columns of the fixed part were dropped because they repeat others."""


class SeparationWarning(MlpipeWarning):
    """A covariate separates the outcomes of a binomial response, or the counts that are zero from the rest."""


EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (FormulaError, 2),
    (ConfigError, 2),
    (DataError, 3),
    (ConvergenceError, 4),
    (ResourceError, 5),
    (MlpipeError, 5),
    (KeyboardInterrupt, 130),
)


def exit_code(error: BaseException) -> int:
    """The command line's exit status for an error (the first class of EXIT_CODES that fits, else 5)."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 5)


def did_you_mean(name: object, known: list[str]) -> str | None:
    """A hint that names the closest known name, or lists some of them; None where there are none."""
    import difflib

    name = str(name)
    if close := [other for other in known if other.lower() == name.lower()] or difflib.get_close_matches(name, known, n=1, cutoff=0.6):
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(map(repr, known[:12]))}{' …' if len(known) > 12 else ''}" if known else None
