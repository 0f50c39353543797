"""Tests of hypotheses about a fit, and of fits against each other."""
from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .again import outcome
from .design import called, categorical, variables_of
from .errors import ConfigError, ConvergenceWarning, DataError, did_you_mean
from .expr import label
from .formula import Formula, Term, parse
from .generalized_result import GeneralizedFit
from .inference import Tests, chi2_tail, held
from .intervals import ml_optimum
from .nesting import adds_variances, check_comparable, doubts, one_more
from .options import Options
from .result import LMMFit
from .verdict import warn

if TYPE_CHECKING:
    import pyarrow as pa

    from .features import Recipe
    from .result import MixedFit

NUMBER = re.compile(r"\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?")
WORD = re.compile(r"[^\s=,;+*/()-]+")
WORSE = 1e-3  # log-likelihood that a larger model lacks, from which its search has gone wrong
LESSER = "the smaller model fits better: the larger one is at a lesser maximum, fit it again from other values of start="
REFITTED = "REML fits were refitted by maximum likelihood"


# -- linear hypotheses -------------------------------------------------------------------------------------------------


def test(fit: MixedFit, hypothesis: Any, ddf: str) -> pa.Table:
    """See `MixedFit.test`."""
    import pyarrow as pa

    L, value, text = contrasts(fit, hypothesis)
    found = Tests(fit, ddf).joint(L, value)
    wald = ddf == "wald" and math.isinf(found.df)
    return pa.table({
        "hypothesis": pa.array([text]),
        "test": pa.array(["chi2" if wald else "F"]),
        "statistic": pa.array([found.statistic * found.k if wald else found.statistic], pa.float64()),
        "df": pa.array([found.k], pa.int64()),
        "df_denominator": pa.array([None if wald else found.df], pa.float64()),
        "p_value": pa.array([found.p_value], pa.float64()),
    })  # fmt: skip


def contrasts(fit: MixedFit, hypothesis: Any) -> tuple[np.ndarray, np.ndarray, str]:
    """L (k, p), its value (k,), and a text of the hypothesis Lβ = value."""
    try:
        return _read(fit, hypothesis)
    except ConfigError:
        for name in fit.dropped:
            if isinstance(hypothesis, str) and name in hypothesis:
                raise ConfigError(
                    f"the coefficient {name!r} was dropped: the rows do not determine it", code="hypothesis", hint=", ".join(fit.names)
                ) from None
        raise


def _read(fit: MixedFit, hypothesis: Any) -> tuple[np.ndarray, np.ndarray, str]:
    names = list(fit.names)
    if isinstance(hypothesis, str):
        return *_parsed(hypothesis, names), hypothesis
    if isinstance(hypothesis, Sequence) and hypothesis and all(isinstance(part, str) for part in hypothesis):
        joined = ", ".join(hypothesis)
        return *_parsed(joined, names), joined
    try:
        L = np.atleast_2d(np.asarray(hypothesis, dtype=float))
    except (TypeError, ValueError) as error:
        raise ConfigError("the hypothesis is neither text nor a matrix of numbers", code="hypothesis") from error
    if L.ndim != 2 or L.shape[1] != len(names) or not np.isfinite(L).all():
        raise ConfigError(
            f"a contrast matrix has a finite number for each of the {len(names)} coefficients in a row", code="hypothesis",
            hint=", ".join(names),
        )  # fmt: skip
    return L, np.zeros(len(L)), f"{len(L)} contrast{'s' if len(L) > 1 else ''} = 0"


def _parsed(text: str, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `a = b = 0, c - 2 * d = 1`: each side less the last of its chain."""
    rows = []
    for chain in re.split(r"[;,](?![^(]*\))", text):
        sides = [_Linear(side, names).value() for side in _sides(chain, names)]
        if len(sides) < 2:
            raise ConfigError(f"{chain.strip()!r} is no equation", code="hypothesis", hint='write it like "x1 = x2 = 0"')
        rows += [side - sides[-1] for side in sides[:-1]]
    stacked = np.array(rows)
    if not stacked[:, :-1].any(axis=1).all():
        raise ConfigError(f"{text!r} has an equation without a coefficient", code="hypothesis")
    if not np.isfinite(stacked).all():
        raise ConfigError(f"{text!r} has a number that is too large", code="hypothesis")
    return stacked[:, :-1], -stacked[:, -1]


def _sides(chain: str, names: list[str]) -> list[str]:
    """The sides of a chain of equations; `=` inside a coefficient's name does not part them."""
    out, at, start = [], 0, 0
    while at < len(chain):
        name = _name_at(chain, at, names)
        if name:
            at += len(name)
        elif chain[at] == "=":
            out.append(chain[start:at])
            at += 2 if chain[at : at + 2] == "==" else 1
            start = at
        else:
            at += 1
    return [*out, chain[start:]]


def _name_at(text: str, at: int, names: list[str]) -> str | None:
    """The longest coefficient's name at a place, not part of a longer word."""
    if at and (text[at - 1].isalnum() or text[at - 1] in "._"):
        return None
    found = [name for name in names if text.startswith(name, at)]
    for name in sorted(found, key=len, reverse=True):
        rest = text[at + len(name) : at + len(name) + 1]
        if not rest or not (rest.isalnum() or rest in "._:") or not (name[-1].isalnum() or name[-1] in "._"):
            return name
    return None


class _Linear:
    """A linear expression over coefficients: as a row (p + 1,), the constant last."""

    def __init__(self, text: str, names: list[str]) -> None:
        self.text, self.names, self.at = text, names, 0

    def value(self) -> np.ndarray:
        """The whole expression."""
        out = self._sum()
        if self._peek():
            raise self._wrong()
        return out

    def _peek(self) -> str:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def _wrong(self) -> ConfigError:
        word = WORD.match(self.text, self.at)
        if word:
            return ConfigError(f"there is no coefficient {word[0]!r}", code="hypothesis", hint=did_you_mean(word[0], self.names))
        return ConfigError(f"the hypothesis cannot be read at {self.text[self.at :].strip()!r}", code="hypothesis")

    def _sum(self) -> np.ndarray:
        out = self._product()
        while (sign := self._peek()) in ("+", "-") and sign:
            self.at += 1
            term = self._product()
            out = out + term if sign == "+" else out - term
        return out

    def _product(self) -> np.ndarray:
        out = self._signed()
        while (sign := self._peek()) in ("*", "/") and sign:
            self.at += 1
            other = self._signed()
            left, right = out[:-1].any(), other[:-1].any()
            if right and (left or sign == "/"):
                raise ConfigError("the hypothesis is not linear in the coefficients", code="hypothesis")
            if sign == "/" and other[-1] == 0.0:
                raise ConfigError("the hypothesis divides by zero", code="hypothesis")
            out = out / other[-1] if sign == "/" else other * out[-1] if right else out * other[-1]
        return out

    def _signed(self) -> np.ndarray:
        if self._peek() in ("-", "+") and self._peek():
            sign = -1.0 if self._peek() == "-" else 1.0
            self.at += 1
            return sign * self._signed()
        out = np.zeros(len(self.names) + 1)
        self._peek()
        name = _name_at(self.text, self.at, self.names)
        if name is not None:
            out[self.names.index(name)] = 1.0
            self.at += len(name)
            return out
        number = NUMBER.match(self.text, self.at)
        if number is not None:
            out[-1] = float(number[0])
            self.at += len(number[0])
            return out
        if self._peek() == "(":
            self.at += 1
            out = self._sum()
            if self._peek() == ")":
                self.at += 1
                return out
        raise self._wrong()


# -- likelihood ratios -------------------------------------------------------------------------------------------------


def anova(*fits: MixedFit) -> pa.Table:
    """Likelihood-ratio tests of nested fits, each against the next smaller one, by the number of parameters.

    Columns: `model`, `n_params`, `loglik`, `deviance`, `aic`, `bic`, `statistic`, `df`, `p_value`, `p_boundary`, `note`. Linear mixed
    models that were fitted by REML are refitted by ML from their statistics, and a note says so. Where models differ by one variance
    and its covariances, the null hypothesis is on the boundary: `p_boundary` is that of the mixture ½χ²(r) + ½χ²(r + 1) (Self and
    Liang 1987; Stram and Lee 1994), `p_value` is conservative.

    Raises ConfigError for fewer than two fits, or fits of different responses, rows, weights or likelihoods. What speaks against one model
    being part of the other is in `note`.
    """
    import pyarrow as pa

    check_comparable(fits)
    refitted = any(fit.residual_scaled and fit.reml for fit in fits)
    order = sorted(fits, key=lambda fit: fit.n_params)
    logliks = [ml_loglik(fit) for fit in order]
    rows: list[dict[str, Any]] = []
    for k, (fit, loglik) in enumerate(zip(order, logliks, strict=True)):
        row = _likelihood_row(fit, loglik)
        notes = [REFITTED] if refitted and k == 0 else []
        if k:
            row |= _ratio(order[k - 1], fit, loglik - logliks[k - 1], notes)
        rows.append(row | {"note": "; ".join(notes) or None})
    reals = ("loglik", "deviance", "aic", "bic", "statistic", "p_value", "p_boundary")
    kinds = {name: pa.float64() for name in reals} | {"n_params": pa.int64(), "df": pa.int64()}
    names = ("model", "n_params", "loglik", "deviance", "aic", "bic", "statistic", "df", "p_value", "p_boundary", "note")
    return pa.Table.from_pylist(rows, schema=pa.schema([(name, kinds.get(name, pa.string())) for name in names]))


def _likelihood_row(fit: MixedFit, loglik: float) -> dict[str, Any]:
    k = fit.n_params
    return {
        "model": fit.formula, "n_params": k, "loglik": loglik, "deviance": -2.0 * loglik, "aic": -2.0 * loglik + 2 * k,
        "bic": -2.0 * loglik + k * math.log(fit.nobs),
    }  # fmt: skip


def _ratio(small: MixedFit, large: MixedFit, gain: float, notes: list[str]) -> dict[str, Any]:
    df, statistic = large.n_params - small.n_params, max(2.0 * gain, 0.0)
    if df == 0:
        notes.append("as many parameters: no test")
        return {"statistic": statistic, "df": 0}
    against = doubts(small, large)
    notes += against
    if not against and gain < -WORSE:
        notes.append(LESSER)
    out = {"statistic": statistic, "df": df, "p_value": chi2_tail(statistic, df)}
    if not adds_variances(small, large):
        return out
    extra = one_more(small, large)
    if extra is None or set(small.names) != set(large.names):
        notes.append("variances are tested at zero, on the boundary of their range: the p-value is conservative (Self and Liang 1987)")
        return out
    mixed = 0.5 * (chi2_tail(statistic, extra) if extra else float(statistic <= 0.0)) + 0.5 * chi2_tail(statistic, extra + 1)
    notes.append(f"a variance is tested at zero: p_boundary is from ½χ²({extra}) + ½χ²({extra + 1}) (Stram and Lee 1994)")
    return out | {"p_boundary": min(mixed, 1.0)}


def ml_loglik(fit: MixedFit) -> float:
    """The log-likelihood, of the refit by ML where the fit was by REML."""
    if not (isinstance(fit, LMMFit) and fit.reml):
        return fit.loglik
    kept, best = ml_optimum(fit, held(fit))
    return -(best.value + 2.0 * kept.problem.n * math.log(kept.scale)) / 2.0


# -- terms dropped one by one ------------------------------------------------------------------------------------------


def drop1(fit: MixedFit) -> pa.Table:
    """See `MixedFit.drop1`."""
    import pyarrow as pa

    parsed, loglik = fit.parsed, ml_loglik(fit)
    if math.isnan(loglik):
        raise ConfigError("the fit has no likelihood: terms cannot be dropped by ratios of it", code="not_available", hint="fit.test")
    if any(np.isinf(term.factor).any() for term in fit.terms):
        raise ConfigError("terms of a fit with absorbed effects are not dropped one by one", code="not_available", hint="fit.test")
    rows: list[dict[str, Any]] = [{"term": "<none>", "n_params": fit.n_params, "loglik": loglik, "aic": -2.0 * loglik + 2 * fit.n_params}]
    for term in droppable(parsed):
        smaller = _refit_without(fit, parsed, term)
        if smaller.rows != fit.rows:
            raise DataError(
                f"without {_term_label(term)} there are {smaller.rows:,} usable rows instead of {fit.rows:,}", code="not_comparable",
                hint="drop rows with missing values first",
            )  # fmt: skip
        df = fit.n_params - smaller.n_params
        statistic = max(2.0 * (loglik - smaller.loglik), 0.0)
        if loglik - smaller.loglik < -WORSE:
            warn(f"without {_term_label(term)}: {LESSER}", ConvergenceWarning)
        rows.append({
            "term": _term_label(term), "n_params": smaller.n_params, "loglik": smaller.loglik,
            "aic": -2.0 * smaller.loglik + 2 * smaller.n_params, "statistic": statistic, "df": df,
            "p_value": chi2_tail(statistic, df) if df else None,
        })  # fmt: skip
    real, whole = pa.float64(), pa.int64()
    kinds = [("term", pa.string()), ("n_params", whole), ("loglik", real), ("aic", real), ("statistic", real), ("df", whole)]
    return pa.Table.from_pylist(rows, schema=pa.schema([*kinds, ("p_value", real)]))


def droppable(formula: Formula) -> list[Term]:
    """Fixed terms that are not part of another one (the principle of marginality), the intercept left out."""
    sets = [frozenset(map(label, term.variables)) for term in formula.fixed]
    return [term for term, own in zip(formula.fixed, sets, strict=True) if own and not any(own < other for other in sets)]


def without(formula: Formula, dropped: Term) -> str:
    """The text of a formula without a term."""
    kept = [term for term in formula.fixed if term != dropped]
    parts = ["1" if Term(()) in kept else "0", *(_term_label(term) for term in kept if term.variables)]
    parts += [f"({text})" for text in dict.fromkeys(bar.text for bar in formula.random)]
    parts += [f"offset({label(node)})" for node in formula.offsets]
    assert formula.response is not None
    return f"{label(formula.response)} ~ {' + '.join(parts)}"


def _term_label(term: Term) -> str:
    return ":".join(label(node) for node in term.variables)


def _refit_without(fit: MixedFit, formula: Formula, term: Term) -> MixedFit:
    """The fit without a term: by ML from the statistics where it is linear, else from the source."""
    from .fit import fitted, lmm

    text, recipe, options = without(formula, term), fit.recipe, fit.options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(fit, LMMFit):
            kept = held(fit)
            coding = {name: _of(given, text, recipe) for name, given in kept.coding.items()}
            return lmm(text, kept.stats, reml=False, options=options, **coding)
        if fit.source is None:
            raise DataError("the fit has no data to fit smaller models to", code="no_source", hint="fit it again")
        settings: dict[str, Any] = {
            "weights": recipe.weights, "freq": recipe.freq, "offset": recipe.offset, "contrasts": _of(recipe.contrasts, text, recipe),
            "levels": outcome(recipe) or None,
        }  # fmt: skip
        if not isinstance(fit, GeneralizedFit):
            return fitted("ols", text, fit.source, options or Options(), settings)
        settings |= {"family": fit.family, "link": fit.link, "trials": recipe.trials} | ({"nagq": fit.nagq} if fit.terms else {})
        return fitted("glmm" if fit.terms else "glm", text, fit.source, options or Options(), settings)


def _of(coding: Any, text: str, recipe: Recipe) -> Any:
    """The contrasts, or orders of levels, of factors that the formula still has."""
    known = {name for factor in categorical(variables_of(parse(text), recipe.kinds, None)) for name in called(factor)}
    return {name: given for name, given in coding.items() if name in known} if coding is not None else None
