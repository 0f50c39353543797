"""Mixed models fitted where the rows are: SQL reduces them to sufficient statistics, results are Arrow tables.

    fit = mlpipe.lmm("reaction ~ days + (1 + days | subject)", mlpipe.datasets.path("sleepstudy"))

Public names load on first use, so that importing the package costs next to nothing; `df.mlpipe` is there once polars is imported.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

from ._hook import after_import

if TYPE_CHECKING:
    from . import datasets as datasets
    from .errors import ColumnNotFoundError as ColumnNotFoundError
    from .errors import ConfigError as ConfigError
    from .errors import ConvergenceError as ConvergenceError
    from .errors import ConvergenceWarning as ConvergenceWarning
    from .errors import DataError as DataError
    from .errors import FormulaError as FormulaError
    from .errors import MlpipeError as MlpipeError
    from .errors import MlpipeWarning as MlpipeWarning
    from .errors import RankWarning as RankWarning
    from .errors import ResourceError as ResourceError
    from .errors import SeparationWarning as SeparationWarning
    from .errors import SingularFitWarning as SingularFitWarning
    from .estimating import gee as gee
    from .estimating_result import GEEFit as GEEFit
    from .fit import lmm as lmm
    from .fit import plan as plan
    from .fit import suffstats as suffstats
    from .generalized import glm as glm
    from .generalized import glmm as glmm
    from .generalized_result import GLMFit as GLMFit
    from .generalized_result import GLMMFit as GLMMFit
    from .hypotheses import anova as anova
    from .linear import ols as ols
    from .linear_result import OLSFit as OLSFit
    from .options import Options as Options
    from .plans import Plan as Plan
    from .reporting import report as report
    from .result import LMMFit as LMMFit
    from .result import load as load
    from .sources import query as query
    from .sources import source as source
    from .sources import table as table
    from .stats import SuffStats as SuffStats

__version__ = "0.1.0"

# No module bears the name of a function here: importing a submodule sets it as an attribute of the package.
_MODULES = {
    "errors": (
        "ColumnNotFoundError", "ConfigError", "ConvergenceError", "ConvergenceWarning", "DataError", "FormulaError", "MlpipeError",
        "MlpipeWarning", "RankWarning", "ResourceError", "SeparationWarning", "SingularFitWarning",
    ),
    "estimating": ("gee",),
    "estimating_result": ("GEEFit",),
    "fit": ("lmm", "plan", "suffstats"),
    "generalized": ("glm", "glmm"),
    "generalized_result": ("GLMFit", "GLMMFit"),
    "hypotheses": ("anova",),
    "linear": ("ols",),
    "linear_result": ("OLSFit",),
    "options": ("Options",),
    "plans": ("Plan",),
    "reporting": ("report",),
    "result": ("LMMFit", "load"),
    "sources": ("query", "source", "table"),
    "stats": ("SuffStats",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", "datasets", *_HOME]


if not TYPE_CHECKING:  # a type checker would take any name for granted

    def __getattr__(name: str) -> object:
        """A public name, imported on first use and kept."""
        from importlib import import_module

        if name == "datasets":
            return import_module(".datasets", __name__)
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
        return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _register() -> None:
    from .frames import register

    register()


after_import("polars", _register)
