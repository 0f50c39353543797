"""Options of a fit: limits of the machine, tolerances of the solver."""
from __future__ import annotations

import operator
import os
import re
from dataclasses import dataclass

from .errors import ConfigError, did_you_mean

DEFAULT_MEMORY_LIMIT = "2GB"
LIBRARIES = 300_000_000  # bytes: interpreter, libraries, and what DuckDB overshoots its limit by
LEAST_ENGINE = 100_000_000
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_CHOICES = {"curvature": ("observed", "expected"), "on_nonconvergence": ("warn", "raise")}

METHODS = ("auto", "exact", "iterative")  # of several grouping factors


def parse_bytes(text: str | int) -> int:
    """The number of bytes that `"2GB"`, `"512 MiB"` or a plain number stands for (GB = 10⁹, GiB = 2³⁰).

    Raises ConfigError (code "memory_limit") for anything else, and for less than one byte.
    """
    match = None if isinstance(text, bool) else re.fullmatch(r"(\d+(?:\.\d*)?)\s*([a-z]*)", str(text).strip().lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise ConfigError(f"{text!r} is not an amount of memory", code="memory_limit", hint='write for example "2GB" or "512MiB"')
    return size


@dataclass(frozen=True)
class Options:
    """What a fit may use and when it stops; every field has a default. Raises ConfigError for a value out of range.

    `memory_limit`: for engine, arrays and sort together, "2GB" unless set (bytes, or text as `parse_bytes` reads it);
    `threads`: of the engine, all unless set; `temp_directory`: where spools and spills go, the system's unless set;
    `progress`: show it, None meaning on a terminal only; `tol`: on the score, relative; `max_passes`: over the rows;
    `curvature`: "observed" or "expected", the Hessian in a GLMM's Laplace determinant; `seed`: of probes and bootstraps;
    `on_nonconvergence`: "warn" or "raise".
    """

    memory_limit: str | int | None = None
    threads: int | None = None
    temp_directory: str | None = None
    progress: bool | None = None
    tol: float = 1e-8
    max_passes: int = 200
    curvature: str = "observed"
    seed: int = 0
    on_nonconvergence: str = "warn"

    def __post_init__(self) -> None:
        parse_bytes(DEFAULT_MEMORY_LIMIT if self.memory_limit is None else self.memory_limit)
        _check(self.threads is None or _whole(self.threads, 1), "threads", self.threads, "a whole number from 1")
        _check(_whole(self.max_passes, 1), "max_passes", self.max_passes, "a whole number from 1")
        _check(_whole(self.seed, 0), "seed", self.seed, "a whole number from 0")
        _check(_fraction(self.tol), "tol", self.tol, "between 0 and 1")
        place = self.temp_directory
        _check(place is None or isinstance(place, str | os.PathLike), "temp_directory", place, "a path")
        _check(self.progress in (None, True, False), "progress", self.progress, "True, False or None")
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"{name}={value!r} is not known", code="options", hint=did_you_mean(str(value), list(known)))

    @property
    def memory_bytes(self) -> int:
        """The memory limit in bytes."""
        return parse_bytes(DEFAULT_MEMORY_LIMIT if self.memory_limit is None else self.memory_limit)

    @property
    def engine_bytes(self) -> int:
        """What an engine may use of the memory limit: the rest is for arrays (a quarter), the interpreter and libraries."""
        return max(self.memory_bytes * 3 // 4 - LIBRARIES, LEAST_ENGINE)

    @property
    def engine_settings(self) -> tuple[str, ...]:
        """Those of `memory_limit`, `threads`, `temp_directory` that the user set: they cannot apply to a connection of the user's."""
        return tuple(name for name in ("memory_limit", "threads", "temp_directory") if getattr(self, name) is not None)


def _whole(value: object, least: int) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool) and operator.index(value) >= least


def _fraction(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < 1


def _check(fine: bool, name: str, value: object, wanted: str) -> None:
    if not fine:
        raise ConfigError(f"{name}={value!r}: it must be {wanted}", code="options")
