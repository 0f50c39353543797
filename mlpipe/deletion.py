"""What the deletion of blocks does to the coefficients of a fit: Cook's distances and DFBETAS (Cook 1977; Belsley, Kuh and Welsch 1980)."""
from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .arrays import column
from .effects import key_names
from .errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

    from .result import MixedFit

    Array = np.ndarray

DETERMINED = 1e-10  # share of the information on a direction that must remain without a block


class Part(NamedTuple):
    """What B blocks tell of the coefficients, in coordinates of the caller's: `keys`, `rows` (B,), information `A` (B, p, p) and score `s`
    (B, p), both with the variances held."""

    keys: list[Any]
    rows: Array
    A: Array
    s: Array


class Deletion:
    """What the deletion of blocks does to the coefficients R⁻¹β* of a fit: `A` (p, p), the information on β* of all blocks, in units of
    1 / `s2`; `groups`: the key columns of the blocks."""

    def __init__(self, fit: MixedFit, R: Array, A: Array, s2: float, groups: tuple[str, ...]) -> None:
        self.fit, self.R, self.A, self.s2, self.groups = fit, R, A, s2, groups
        self.L = np.linalg.cholesky(A)

    def table(self, part: Part) -> pa.Table:
        """One row a block, and `order`, by which they are ranked."""
        import pyarrow as pa

        rest = self.A - part.A
        white = np.linalg.solve(self.L, np.linalg.solve(self.L, part.A).transpose(0, 2, 1))  # L⁻¹ A_i L⁻ᵀ
        leverage = np.trace(white, axis1=1, axis2=2)
        known = np.linalg.eigvalsh(white)[:, -1] < 1.0 - DETERMINED
        rest = np.where(known[:, None, None], rest, self.A)
        delta = np.linalg.solve(rest, part.s[:, :, None])[:, :, 0]
        cook = ((delta @ self.L) ** 2).sum(axis=1) / (len(self.A) * self.s2)
        back = np.linalg.solve(rest, np.broadcast_to(np.linalg.inv(self.R).T, rest.shape))  # (A - A_i)⁻¹ R⁻ᵀ
        variance = np.einsum("jk,bkj->bj", np.linalg.inv(self.R), back)
        with np.errstate(invalid="ignore", divide="ignore"):
            dfbetas = np.linalg.solve(self.R, delta.T).T / np.sqrt(self.s2 * variance)
        names = key_names(self.fit.terms, self.groups)
        columns: dict[str, Any] = dict(zip(names, part.keys, strict=True))
        columns |= {"rows": pa.array(part.rows.astype(np.int64)), "leverage": pa.array(leverage)}
        columns["cooks_distance"] = pa.array(cook, mask=~known)
        for name, values in zip(self.fit.names, dfbetas.T, strict=True):
            columns[f"dfbetas_{name}"] = pa.array(values, mask=~(known & np.isfinite(values)))
        columns["order"] = pa.array(np.where(known, cook, np.inf))
        return pa.table(columns)


def most(deletion: Deletion, parts: Iterable[Part], top: int) -> pa.Table:
    """The `top` blocks of greatest distance. Raises DataError where there are none."""
    import pyarrow as pa

    found: pa.Table | None = None
    for part in parts:
        table = deletion.table(part)
        table = pa.concat_tables([found, table]) if found is not None else table
        found = table.take(np.argsort(-column(table, "order"), kind="stable")[:top])
    if found is None:
        raise DataError("there are no rows", code="no_rows")
    return found.drop_columns(["order"])


def check_top(top: int) -> None:
    """Raises ConfigError for what is no number of blocks."""
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise ConfigError(f"top = {top!r} is not a whole number from 1")


def chosen(fit: MixedFit, group: str | None) -> tuple[str, ...]:
    """The key columns of the factor whose levels are deleted. Raises ConfigError for a name that is none, and for none of several, and
    where there are no coefficients that could move."""
    if not fit.names:
        raise ConfigError("the model has no fixed effects that could change", code="not_available")
    factors = {":".join(columns): columns for columns in fit.recipe.factors or (fit.recipe.groups,)}
    if group is None and len(factors) > 1:
        raise ConfigError(f"the fit has several grouping factors: {', '.join(factors)}", hint="name one by group=", code="several_factors")
    name = next(iter(factors)) if group is None else group
    if name not in factors:
        raise ConfigError(f"group = {group!r} is no grouping factor", hint=did_you_mean(str(group), list(factors)))
    return factors[name]
