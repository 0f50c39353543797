"""Linear mixed models with several grouping factors: statistics -> the solver's problem -> estimates with names."""
from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from .digits import lost, with_digits
from .errors import ResourceError
from .formula import Formula
from .held import Held
from .progress import Watch, stage
from .reduction import Coded, check_levels, stacked_inverse
from .result import LMMFit, RandomTerm
from .solve.crossed import Cells, CrossedProblem, Evaluation, Exact, Factor, per_level
from .solve.folding import folded
from .solve.glmm import GLMMProblem, GLMMSolution, solve_glmm
from .solve.optimize import NOISE
from .solve.refit import with_log_sigma
from .solve.start import start as moments
from .stats import SuffStats, full_map
from .term_order import TermOrder

if TYPE_CHECKING:
    import pyarrow as pa

    from .factors import Crossed
    from .options import Options
    from .plans import Plan

Array = np.ndarray


OBSERVED = 1e-7  # scaled score from which the observed information replaces the average one, which is good enough to come that far
NEAR = 0.1  # scaled score beyond which an end is none, whatever rounding does to it
MOST_WORK = 1e10  # operations of one evaluation above which conjugate gradients are faster


def _fits(rest: int, limit: int) -> bool:
    """Whether the dense matrix of the factors but the largest, with two more of its size, takes at most half the memory limit."""
    return 3 * 8 * rest**2 <= limit // 2


def _work(rest: int, filling: float) -> float:
    """Operations of one exact evaluation; `filling`: the squared number of cells of each level of the largest factor, added up."""
    return 2.0 * rest**3 + 600.0 * filling


def expected(plan: Plan) -> list[str]:
    """What a fit of several factors will do, as lines of its plan, from about how many levels and combinations of keys there are."""
    from .crossing import combinations as count
    from .design import code
    from .sources import row_count

    recipe, limit = plan.recipe, plan.request.options.memory_bytes
    bars = recipe.formula.random
    q = {f: sum(len(code(bar.terms, recipe.variables)) for bar in bars if bar.groups == f) for f in recipe.factors}
    levels = {f: max(round(count(plan, f)), 1) for f in recipe.factors}
    order = sorted(recipe.factors, key=lambda f: -levels[f] * q[f])
    cells = min(round(count(plan, recipe.groups)), row_count(plan.engine))
    pairs, products = len(order) * (len(order) - 1) // 2, len(recipe.z) * (len(recipe.z) + 1) // 2
    rest, filling = sum(levels[f] * q[f] for f in order[1:]), cells**2 / levels[order[0]] * (len(order) - 1)
    if all(set(outer) <= set(inner) for inner, outer in zip(order[:-1], order[1:], strict=True)):
        solver = "exact, factor by factor: nested"
    elif _fits(rest, limit) and _work(rest, filling) < MOST_WORK:
        solver = f"exact, with a dense matrix of {rest:,} rows at most"
    else:
        solver = f"conjugate gradients, unless nested: a dense matrix of {rest:,} rows is too much work or too large"
    held = 8 * sum(levels.values()) * (1 + len(recipe.pairs())) + cells * pairs * (4 + 8 * products)
    return [
        f"levels:  about {', '.join(f'{levels[f]:,} of ' + ':'.join(f) for f in order)}; about {cells:,} combinations",
        f"solver:  {solver}; about ten evaluations",
        f"cells:   up to {held / 1e6:,.1f} MB of sums; cells above a quarter of the limit go to a mapped file",
    ]


@dataclass
class Solved:
    """What either path leaves behind: the optimum, the estimates there, `along`: how log σ moves with θ on the profile, the diagonal blocks
    of M⁻¹ of every factor, and what Monte Carlo error there is."""

    solution: GLMMSolution
    at: Evaluation
    along: Array
    inverses: list[Array]
    carlo: dict[str, Any] | None = None


class Several:
    """A model over statistics of several factors, in the solver's order of `terms`."""

    def __init__(self, stats: SuffStats, formula: Formula, parts: Coded, reml: bool) -> None:
        assert stats.crossed is not None
        self.stats, self.parts, self.crossed = stats, parts, stats.crossed
        levels = [factor.levels for factor in stats.crossed.factors]
        self.terms = TermOrder.of(levels, stats.recipe.factors, formula, parts.random)
        order, self.maps = self.terms.order, self.terms.maps()
        factors = tuple(self._factor(self.crossed, k, z) for k, z in zip(order, self.maps, strict=True))
        self.pairs = {(a, b): self.crossed.between(order[a], order[b]) for a, b in combinations(range(len(order)), 2)}
        cells = {pair: self._cells(*pair) for pair in self.pairs}
        WW = parts.W.T @ stats.gram @ parts.W
        self.problem = CrossedProblem(factors, cells, WW, stats.n, stats.sum_log_w, reml, self.terms.sizes)

    def _factor(self, crossed: Crossed, k: int, Z: Array) -> Factor:
        recipe, sums = self.stats.recipe, crossed.factors[k].sums
        inner = np.zeros((len(recipe.features), Z.shape[1]))
        inner[list(recipe.z)] = Z
        q, p1 = Z.shape[1], self.parts.W.shape[1]
        V = full_map(recipe, Z, np.column_stack([inner, self.parts.W]))
        S = (V[:, :q].reshape(q * q, -1) @ sums).reshape(q, q, -1)
        return Factor(S, (V[:, q:].reshape(q * p1, -1) @ sums).reshape(q, p1, -1))

    def _cells(self, a: int, b: int) -> Cells:
        """The blocks Z_k'wZ_h of the pairs of levels that occur, sorted by level of k, then of h, for the a-th and b-th factor in order."""
        held, nz = self.pairs[a, b], len(self.stats.recipe.z)
        left, right = self.maps[a], self.maps[b]
        if nz == 1:
            return Cells(held.rows, held.columns, (held.products * (left[0, 0] * right[0, 0]))[None])
        products = _square(held.products, self.crossed.pairs, self.stats.recipe.z)
        return Cells(held.rows, held.columns, np.einsum("ia,ijc,jb->abc", left, products, right, optimize=True))

    def nested(self) -> list[str]:
        """Which factors lie within which."""
        return self.terms.nested({pair: len(cells.rows) for pair, cells in self.problem.cells.items()})

    @property
    def constant(self) -> float:
        """What the solver's log-likelihood lacks: the response's scale, and by REML the volume of the coefficients' coordinates."""
        volume = float(np.log(np.abs(np.diag(self.parts.fixed.R))).sum()) if self.problem.reml else 0.0
        return -self.problem.degrees * math.log(self.parts.scale) - volume

    def path(self, method: str, limit: int) -> str:
        """"exact" or "iterative": the exact one where nested, or where its dense rest and the work to fill it are small.

        Raises ResourceError where the exact one was asked for and its rest exceeds half the memory limit.
        """
        problem, rest = self.problem, sum(f.size for f in self.problem.factors[1:])
        if method == "iterative" or problem.stays_sparse:
            return "iterative" if method == "iterative" and len(problem.factors) > 1 else "exact"
        fits = _fits(rest, limit)
        if method == "exact" and not fits:
            message = f"the crossed factors leave a dense matrix of {rest:,} rows, {8 * rest**2 / 1e6:,.0f} MB"
            raise ResourceError(message, code="memory_limit", hint='method="iterative", or raise memory_limit')
        filling = sum(float((np.bincount(cells.rows) ** 2.0).sum()) for (k, _), cells in problem.cells.items() if k == 0)
        return "exact" if method == "exact" or (fits and _work(rest, filling) < MOST_WORK) else "iterative"

    def solved(self, start: Array | None, options: Options, method: str, watch: Watch) -> Solved:
        """The optimum, by the path that `method` and the sizes call for; `watch` is told of evaluations."""
        problem = self.problem
        start = moments(problem) if start is None else start
        if self.path(method, options.memory_bytes) == "exact":
            inside = folded(problem)
            exact, size = Exact(inside), problem.offsets[-1]
            search = GLMMProblem(watch.over(exact), np.zeros((0, 0)), problem.entries, size, False, problem.typical, observe=OBSERVED)
            solution = solve_glmm(search, start, tol=options.tol, max_evaluations=options.max_passes)
            exact = exact if inside is problem else Exact(problem)
            at, _ = exact.evaluate(solution.lambda_)
            return Solved(_settled(solution, problem, at), at, exact.along(solution.lambda_, at), at.M.inverse_blocks())
        return self._iterated(start, options, watch)

    def _iterated(self, start: Array, options: Options, watch: Watch) -> Solved:
        from .solve.iterative import solve_iterative

        found = solve_iterative(
            self.problem, start, self.draws(), tol=options.tol, max_evaluations=options.max_passes, seed=options.seed,
            threads=options.threads or os.cpu_count() or 1, told=watch.told,
        )  # fmt: skip
        carlo = {
            "probes": found.probes, "error": found.error.tolist(), "loglik_error": found.loglik_error,
            "samples": found.samples, "sd_error": found.sd_error,
        }  # fmt: skip
        return Solved(found.solution, found.at, found.along, found.inverses, carlo)

    def draws(self, *, normal: bool = False) -> Callable[[np.random.Generator], Array] | None:
        """A function that draws Z'w^½ε over single effects, from the cells, ε of random signs (only second moments matter) or normal; None
        for more than two factors, where pairs do not tell it."""
        if len(self.problem.factors) != 2:
            return None
        held, cells, nz = self.pairs[0, 1], self.problem.cells[0, 1], len(self.stats.recipe.z)
        n, maps, sizes = len(held), self.maps, [f.levels for f in self.problem.factors]
        if nz == 1:
            root = np.sqrt(held.products[None])
        else:
            values, vectors = np.linalg.eigh(_square(held.products, self.crossed.pairs, self.stats.recipe.z).transpose(2, 0, 1))
            root = (vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]).transpose(1, 2, 0)

        def draw(rng: np.random.Generator) -> Array:
            e = np.einsum("abn,bn->an", root, rng.normal(size=(nz, n)) if normal else _signs(rng, nz, n))
            out = []
            for code, Z, m in zip((cells.rows, cells.columns), maps, sizes, strict=True):
                out.append(np.stack([np.bincount(code, row, minlength=m) for row in Z.T @ e], axis=1).ravel())
            return np.concatenate(out)

        return draw


def _settled(solution: GLMMSolution, problem: CrossedProblem, at: Evaluation) -> GLMMSolution:
    """The solution, converged where no step improved the likelihood because of the rounding of the sums that it is taken from: what is left
    of a response whose levels are far apart is a difference of large ones. Where rounding leaves more than `NEAR` it is no end."""
    rounding = NOISE * np.finfo(float).eps * float(problem.WW[-1, -1]) / at.s2
    if solution.converged or not solution.score < min(math.sqrt(rounding), NEAR):
        return solution
    return replace(solution, converged=True, message="at the limit of rounding")


def _signs(rng: np.random.Generator, rows: int, n: int) -> Array:
    bits = np.unpackbits(np.frombuffer(rng.bytes(rows * (n // 8 + 1)), dtype=np.uint8))
    return np.asarray(bits.reshape(rows, -1)[:, :n] * 2.0 - 1.0)


def fitted(
    text: str, formula: Formula, stats: SuffStats, data: Any, reml: bool, start: Sequence[float] | None, options: Options, method: str,
    plan: Plan | None, coding: dict[str, Any] | None,
) -> LMMFit:  # fmt: skip
    """The fit from statistics of several factors; `plan`: as in `with_digits`."""
    assert stats.crossed is not None
    for factor in stats.crossed.factors:
        check_levels(factor.levels.group, factor.levels.columns[0], len(factor.levels))
    coding = coding or {}
    summed, parts = with_digits(stats, formula, coding, plan)
    model = Several(summed, formula, parts, reml)
    if stats.recipe.weights is None:
        model.terms.check_separable(stats.n)
    watch = Watch(constant=model.constant)
    with stage("solve", summed.info.setdefault("seconds", {}), None, options, live=watch) as fields:
        solved = model.solved(None if start is None else model.terms.theta_star(start), options, method, watch)
        fields |= {"evaluations": solved.solution.evaluations, "score": solved.solution.score}
    fit = _result(text, model, solved, data, options, coding)
    fit.recipe = stats.recipe
    return fit


def _result(text: str, model: Several, solved: Solved, data: Any, options: Options, coding: dict[str, Any]) -> LMMFit:
    stats, parts, problem, solution, at = model.stats, model.parts, model.problem, solved.solution, solved.at
    terms, rows = [], model.terms.rows()
    for term, at_ in ((parts.random[i], rows[i]) for i in model.terms.sequence):
        star = solution.lambda_[at_, at_]
        terms.append(RandomTerm(term.group, term.names, term.raw(star), term.Q, term.R, star))
    R, p = parts.fixed.R, len(parts.fixed.names)
    scale = parts.scale
    loglik = solution.loglik + model.constant
    beta_star = scale * at.beta + parts.offset
    info = {**stats.info, "evaluations": solution.evaluations, "score": solution.score}
    if solved.carlo is not None:
        info |= _noted(model, solved.carlo, info)
    left = lost(at.s2 * problem.degrees / float(problem.WW[-1, -1]))
    info["notes"] = [*info.get("notes", []), *model.nested(), *left]
    info["levels"] = {factor.levels.group: len(factor.levels) for factor in model.crossed.factors}
    fit = LMMFit(
        formula=text, recipe=stats.recipe, response=parts.response, reml=problem.reml, names=parts.fixed.names, dropped=parts.fixed.dropped,
        beta=np.linalg.solve(R, beta_star) if p else np.zeros(0), spread=parts.fixed.spread(at.s2 * scale**2 * at.C),
        gamma=parts.fixed.Q @ beta_star, terms=tuple(terms), sigma=math.sqrt(at.s2) * scale, loglik=loglik, nobs=stats.n, rows=stats.rows,
        n_blocks=max(info["levels"].values()), converged=solution.converged, singular=solution.singular, score=solution.score,
        evaluations=solution.evaluations, message=solution.message, theta_covariance=_theta_covariance(model, solved), info=info,
        source=data if stats.info.get("rescannable", True) else None, options=options, held=_held(model, coding),
    )  # fmt: skip
    fit.effects_tables = _modes(model, solution.lambda_, at.u * scale, fit.sigma, solved.inverses)
    return fit


def _held(model: Several, coding: dict[str, Any]) -> Held:
    """The statistics for later questions."""
    parts, solver = model.parts, model.terms.solver
    order = tuple(solver.index(i) for i in model.terms.sequence)
    random = tuple(parts.random[i] for i in solver)
    return Held(model.stats, model.problem, parts.fixed, random, order, parts.scale, parts.offset, coding)


def _noted(model: Several, carlo: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """The Monte Carlo error of the iterative path, for `info` and the printed summary."""
    worst = max(carlo["error"], default=0.0)
    note = (
        f"iterative solver: Monte Carlo error at most {worst:.1%} of a standard error ({carlo['probes']} probes); log-likelihood good to "
        f"about {carlo['loglik_error']:.2g}; conditional standard deviations of the random effects to {carlo['sd_error']:.1%} "
        f"({carlo['samples']} samples)"
    )
    return {"monte_carlo": carlo, "notes": [*info.get("notes", []), note]}


def _theta_covariance(model: Several, solved: Solved) -> Array:
    """The covariance of (theta*, log sigma), terms in the fit's order."""
    whole = with_log_sigma(solved.solution.vcov, solved.along, model.problem.degrees)
    order = [*model.terms.theta_places(), len(model.problem.entries)]
    return np.asarray(whole[np.ix_(order, order)])


def _modes(model: Several, lambda_: Array, u: Array, sigma: float, inverses: list[Array]) -> dict[str, pa.Table]:
    """Per group: its key columns, and per coefficient the mode and its conditional standard deviation."""
    from .effects import mode_table

    out, place = {}, 0
    for at, k in enumerate(model.terms.order):
        factor, f = model.crossed.factors[k], model.problem.factors[at]
        lam = model.problem.lambdas(lambda_)[at]
        terms = [model.parts.random[i] for i in model.terms.bars[k]]
        back = stacked_inverse([term.R for term in terms]) @ lam
        modes = back @ per_level(u[place : place + f.size, None], f.q)[:, 0]
        sds = sigma * np.sqrt(np.maximum(np.einsum("ia,abm,ib->im", back, inverses[at], back), 0.0))
        place += f.size
        out[factor.levels.group] = mode_table(terms, factor.levels, modes, sds)
    return out


def _square(products: Array, pairs: Sequence[tuple[int, int]], z: Sequence[int]) -> Array:
    """Sums per cell (K, c) of the products of random features as symmetric matrices (z, z, c)."""
    place, out = {feature: i for i, feature in enumerate(z)}, np.empty((len(z), len(z), products.shape[1]))
    for values, (a, b) in zip(products, pairs, strict=True):
        out[place[a], place[b]] = out[place[b], place[a]] = values
    return out
