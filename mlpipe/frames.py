"""`df.mlpipe`: the fitting functions, predict and augment on polars DataFrames and LazyFrames."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import polars as pl
from polars.io.plugins import register_io_source

import mlpipe

if TYPE_CHECKING:
    import pyarrow as pa

    from .result import MixedFit

NAME = "mlpipe"
FITTING = ("lmm", "glmm", "ols", "glm", "gee", "suffstats", "plan")
Frame = TypeVar("Frame", pl.DataFrame, pl.LazyFrame)
Rows = Callable[[pl.DataFrame | pl.LazyFrame], "pa.RecordBatchReader"]


class Namespace(Generic[Frame]):
    """What `df.mlpipe` offers: the fitting functions of `mlpipe` with this frame as `data`, `predict` and `augment`."""

    def __init__(self, frame: Frame) -> None:
        self._frame: Frame = frame

    def predict(self, fit: MixedFit, **kwargs: Any) -> Frame:
        """The frame's rows, in order, and `predicted` (and `lower`, `upper`): `fit.predict` with its keywords and errors.

        A LazyFrame gives a LazyFrame, predicted in batches when it is collected.
        """
        return self._kind(lambda frame: fit.predict(frame, **kwargs))

    def augment(self, fit: MixedFit, **kwargs: Any) -> Frame:
        """The frame's rows, in order, and `fitted`, `resid`, `fitted_fixed`: `fit.augment` with its keywords and errors.

        A LazyFrame gives a LazyFrame, computed in batches when it is collected.
        """
        return self._kind(lambda frame: fit.augment(frame, **kwargs))

    def _kind(self, rows: Rows) -> Frame:
        frame: pl.DataFrame | pl.LazyFrame = self._frame
        return cast("Frame", _lazy(frame, rows) if isinstance(frame, pl.LazyFrame) else _frame(rows(frame)))


def _frame(reader: pa.RecordBatchReader) -> pl.DataFrame:
    return pl.DataFrame(reader.read_all())


def _lazy(frame: pl.LazyFrame, rows: Rows) -> pl.LazyFrame:
    """The rows as a scan. Its schema is taken from no rows at once, so that a wrong request fails here, with our own error."""

    def scan(columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, batch_size: int | None) -> Iterator[pl.DataFrame]:
        left = n_rows
        for batch in rows(frame):
            part = pl.DataFrame(batch)
            if left is not None:
                part, left = part.head(left), left - min(left, part.height)
            if predicate is not None:
                part = part.filter(predicate)
            yield part if columns is None else part.select(columns)
            if left == 0:
                return

    return register_io_source(scan, schema=_frame(rows(frame.head(0))).schema)


def _fitting(name: str) -> Callable[..., Any]:
    def method(self: Namespace[Any], *args: Any, **kwargs: Any) -> Any:
        return getattr(mlpipe, name)(*args, data=self._frame, **kwargs)

    method.__name__, method.__qualname__ = name, f"{Namespace.__qualname__}.{name}"
    method.__doc__ = f"`mlpipe.{name}` with this frame as `data`; its arguments, result and errors."
    return method


for _name in FITTING:
    if _name in mlpipe.__all__:
        setattr(Namespace, _name, _fitting(_name))


def register() -> None:
    """Make `df.mlpipe` exist on DataFrame and LazyFrame, unless it does already."""
    if not hasattr(pl.DataFrame, NAME):
        pl.api.register_dataframe_namespace(NAME)(Namespace)
    if not hasattr(pl.LazyFrame, NAME):
        pl.api.register_lazyframe_namespace(NAME)(Namespace)
