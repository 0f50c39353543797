"""Estimates with standard errors as the columns of a result table: Wald statistics and intervals."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("estimate", "std_error", "statistic", "p_value", "conf_low", "conf_high")


def check_level(level: float, name: str = "conf_level") -> None:
    """Raises ConfigError for a confidence level outside (0, 1)."""
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0.0 < level < 1.0:
        raise ConfigError(f"{name} = {level!r} is not between 0 and 1")


def roots(variances: np.ndarray) -> np.ndarray:
    """Standard errors (n,) of variances: 0 of rounding errors, NaN of what is negative, as clusters in several ways can make them."""
    values = np.asarray(variances, dtype=float)
    with np.errstate(invalid="ignore"):
        return np.sqrt(np.where(np.abs(values) <= 1e-12 * np.abs(values).max(initial=0.0), np.maximum(values, 0.0), values))


def wald_table(
    texts: Mapping[str, Sequence[Any]], estimate: np.ndarray, se: np.ndarray, conf_level: float, degrees: float = math.inf
) -> pa.Table:
    """A table of the columns `texts`, then estimate, std_error, z statistic (t on finite `degrees` of freedom), p_value and the Wald
    interval; what is not finite is null."""
    import pyarrow as pa

    check_level(conf_level)
    z = NormalDist().inv_cdf(0.5 + conf_level / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = np.where(se > 0.0, estimate / se, math.nan)
    p = np.array([math.erfc(abs(s) / math.sqrt(2.0)) for s in statistic])
    if math.isfinite(degrees):
        from scipy.special import stdtr, stdtrit

        z, p = float(stdtrit(degrees, 0.5 + conf_level / 2)), 2.0 * stdtr(degrees, -np.abs(statistic))
    values = (estimate, se, statistic, p, estimate - z * se, estimate + z * se)
    columns = {name: pa.array(list(column), None if column else pa.string()) for name, column in texts.items()}
    return pa.table(columns | {name: _nullable(v) for name, v in zip(COLUMNS, values, strict=True)})


def _nullable(values: np.ndarray) -> pa.Array:
    import pyarrow as pa

    values = np.asarray(values, dtype=float)
    return pa.array(values, mask=~np.isfinite(values))
