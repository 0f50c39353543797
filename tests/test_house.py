"""The house around the library: lazy names, what importing costs, the polars namespace, data sets, the wheel."""
from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

import mlpipe
from mlpipe import datasets
from mlpipe.sql_files import read_sql, sql_folder

ROOT = Path(__file__).parents[1]
HEAVY = ("polars", "duckdb", "numpy", "scipy", "pyarrow", "sqlglot", "pandas", "pydantic", "click", "inspect", "asyncio")


def python(code: str, *, path: Path = ROOT, cwd: Path | None = None) -> str:
    """What a fresh interpreter prints that finds the package in `path`."""
    environment = os.environ | {"PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- public names


def test_importing_loads_nothing_heavy() -> None:
    """The time budget of a small job, counted in modules: those of a bare interpreter are not ours."""
    loaded = python("import sys; before = set(sys.modules); import mlpipe; print(*sorted(set(sys.modules) - before))").split()
    assert not [name for name in loaded if name in HEAVY]
    assert {name for name in loaded if name.startswith("mlpipe")} == {"mlpipe", "mlpipe._hook"}
    assert len(loaded) < 40  # typing, and re for it, are most of them


def test_a_plain_fit_loads_only_its_own_path() -> None:
    """Some 0.1 s of a small job: scipy is for several factors and generalized models, text files and Arrow data have readers of theirs."""
    code = """
    import sys, mlpipe
    print(mlpipe.lmm("reaction ~ days + (1 + days | subject)", mlpipe.datasets.path("sleepstudy")), file=sys.stderr)
    print(*sys.modules)
    """
    loaded = set(python(code).split())
    assert {"duckdb", "mlpipe.solve.lmm"} <= loaded
    assert not loaded & {"scipy", "polars", "pandas", "pydantic", "click"}
    others = {"crossing", "factors", "pairs", "several", "generalized", "glmm", "kernel", "crossed", "means", "plot", "text", "spool"}
    assert not [name for name in loaded if name.startswith("mlpipe.") and name.rpartition(".")[2] in others]


@pytest.mark.parametrize("name", mlpipe.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(mlpipe, name)
    assert getattr(value, "__module__", "mlpipe").startswith("mlpipe")
    assert getattr(mlpipe, name) is value


def test_dir_lists_the_public_names() -> None:
    assert dir(mlpipe) == sorted(mlpipe.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lmer'"):
        _ = mlpipe.lmer  # type: ignore[attr-defined]


def test_functions_are_not_hidden_by_modules_of_their_name() -> None:
    """Importing a submodule sets it as an attribute of the package: no module may be called like a function."""
    modules = {path.stem for path in (ROOT / "mlpipe").iterdir()}
    assert modules & set(mlpipe.__all__) == {"datasets"}


def test_names_for_type_checkers_are_the_names_at_run_time() -> None:
    tree = ast.parse((ROOT / "mlpipe" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert declared == {"datasets": None, **mlpipe._HOME}


# ---- the namespace and its import hook

HOOK_CASES = {
    "mlpipe first": "import mlpipe, polars",
    "polars first": "import polars, mlpipe",
    "spec asked for in between": "import mlpipe, importlib.util; assert importlib.util.find_spec('polars').origin; import polars",
    "mlpipe reloaded before": "import mlpipe, importlib; importlib.reload(mlpipe); import polars",
    "mlpipe imported twice before": """
        import mlpipe, sys
        [sys.modules.pop(n) for n in list(sys.modules) if n.startswith("mlpipe")]
        import mlpipe, polars""",
    "mlpipe reloaded after": "import mlpipe, importlib, polars; importlib.reload(mlpipe)",
    "polars reloaded": "import mlpipe, importlib, polars; importlib.reload(polars)",
    "submodule first": "import mlpipe; from polars.dataframe import DataFrame; import polars",
    "first import fails": """
        import mlpipe, sys, importlib.abc
        class Broken(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name == "polars.api":
                    raise ImportError("for now")
        broken = Broken()
        sys.meta_path.insert(0, broken)
        try:
            import polars
        except ImportError:
            sys.meta_path.remove(broken)
        assert "polars" not in sys.modules
        [sys.modules.pop(n) for n in list(sys.modules) if n.startswith("polars.")]
        import polars""",
    "many threads": """
        import threading
        barrier, errors = threading.Barrier(8), []
        def work(i):
            barrier.wait()
            try:
                if i % 2:
                    import polars
                    polars.DataFrame
                else:
                    import mlpipe
            except Exception as error:
                errors.append(error)
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        [t.start() for t in threads]; [t.join() for t in threads]
        assert not errors, errors
        import polars""",
}


@pytest.mark.parametrize("code", HOOK_CASES.values(), ids=HOOK_CASES)
def test_the_namespace_is_there_once_polars_is(code: str) -> None:
    check = """
        import sys
        from importlib.machinery import SourceFileLoader
        assert hasattr(polars.DataFrame, "mlpipe") and hasattr(polars.LazyFrame, "mlpipe")
        assert not [f for f in sys.meta_path if type(f).__module__.startswith("mlpipe")]
        assert type(polars.__spec__.loader) is SourceFileLoader
        print("fine")"""
    strict = "import warnings; warnings.simplefilter('error')\n"
    assert python(strict + textwrap.dedent(code) + textwrap.dedent(check)) == "fine"


def test_without_polars() -> None:
    blocked = "import sys; sys.modules['polars'] = None; import mlpipe; print(mlpipe.ConfigError.__name__)"
    assert python(blocked) == "ConfigError"
    missing = """
        import sys, mlpipe
        import importlib.util
        sys.path[:] = [p for p in sys.path if "site-packages" not in p]
        print(importlib.util.find_spec("polars"))
        try:
            import polars
        except ModuleNotFoundError as error:
            print(error.name)"""
    assert python(missing).split() == ["None", "polars"]


def test_two_hooks_do_not_call_each_other(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text("value = 1\n")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from mlpipe._hook import AfterImport
        for i in (1, 2):
            sys.meta_path.insert(0, AfterImport("late", lambda i=i: print(i)))
        import late
        print(late.value)"""
    assert sorted(python(code).split()) == ["1", "1", "2"]


class Fit:
    """Stands for a fit: predicts in batches of three rows and counts its calls."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def predict(self, data: pl.DataFrame | pl.LazyFrame, **kwargs: Any) -> pa.RecordBatchReader:
        self.calls.append(kwargs)
        table = data.lazy().with_columns(predicted=pl.col("x") * 2.0).collect().to_arrow()
        return pa.RecordBatchReader.from_batches(table.schema, table.to_batches(max_chunksize=3))

    augment = predict


FRAME = pl.DataFrame({"x": range(10), "g": pl.Series(list("abcabcabca"), dtype=pl.Enum(["c", "b", "a"]))})


@pytest.mark.parametrize("verb", ["predict", "augment"])
@pytest.mark.parametrize("frame", [FRAME, FRAME.lazy()], ids=["eager", "lazy"])
def test_the_callers_kind_comes_back(verb: str, frame: pl.DataFrame | pl.LazyFrame) -> None:
    fit = Fit()
    out = getattr(frame.mlpipe, verb)(fit, prefix="p_")  # type: ignore[union-attr]
    assert type(out) is type(frame)
    assert out.lazy().collect().equals(FRAME.with_columns(predicted=pl.col("x") * 2.0))
    assert all(call == {"prefix": "p_"} for call in fit.calls)


@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
def test_a_lazy_prediction_takes_part_in_a_query(engine: Any) -> None:
    out = FRAME.lazy().mlpipe.predict(Fit())  # type: ignore[attr-defined]
    assert out.filter(pl.col("x") > 3).head(4).select("predicted").collect(engine=engine)["predicted"].to_list() == [8.0, 10.0, 12.0, 14.0]
    assert out.head(5).filter(pl.col("x") > 3).collect(engine=engine).height == 1
    assert out.select("g").collect(engine=engine)["g"].dtype == FRAME["g"].dtype


def test_a_wrong_request_fails_before_a_lazy_frame_is_collected() -> None:
    class Refusing(Fit):
        def predict(self, data: pl.DataFrame | pl.LazyFrame, **kwargs: Any) -> pa.RecordBatchReader:
            raise mlpipe.ConfigError("no such effects")

    with pytest.raises(mlpipe.ConfigError, match="no such effects"):
        FRAME.lazy().mlpipe.predict(Refusing())  # type: ignore[attr-defined]


def test_the_namespace_offers_what_the_package_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpipe.frames import FITTING, Namespace

    verbs = {name for name in vars(Namespace) if not name.startswith("_")}
    assert verbs == {name for name in FITTING if name in mlpipe.__all__} | {"predict", "augment"}
    monkeypatch.setattr(mlpipe, "lmm", lambda *args, **kwargs: (args, kwargs), raising=False)
    assert FRAME.mlpipe.lmm("y ~ x", reml=False) == (("y ~ x",), {"data": FRAME, "reml": False})  # type: ignore[attr-defined]


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("effects", ["conditional", "population", "marginal"])
def test_generalized_models_from_a_frame(effects: str, lazy: bool) -> None:
    frame: Any = pl.read_parquet(datasets.path("cbpp"))
    frame = frame.lazy() if lazy else frame
    counts = "cbind(incidence, size - incidence) ~ period"
    for fit in (frame.mlpipe.glmm(f"{counts} + (1 | herd)", family="binomial"), frame.mlpipe.glm(counts, family="binomial")):
        predicted, augmented = frame.mlpipe.predict(fit, effects=effects), frame.mlpipe.augment(fit)
        assert type(predicted) is type(augmented) is type(frame)
        whole = predicted.lazy().collect()
        assert whole.height == 56 and whole["predicted"].is_between(0, 1).all()
        assert augmented.lazy().collect().columns[-3:] == ["fitted", "resid", "fitted_fixed"]
    assert str(frame.mlpipe.plan("glm", counts, family="binomial")).startswith("formula: cbind")


# ---- what ships

SHAPES = {
    "sleepstudy": (180, ["reaction", "days", "subject"]),
    "penicillin": (144, ["diameter", "plate", "sample"]),
    "cbpp": (56, ["herd", "incidence", "size", "period"]),
    "insteval": (73_421, ["s", "d", "studage", "lectage", "service", "dept", "y"]),
}


def test_data_sets() -> None:
    assert set(SHAPES) == set(datasets.NAMES)
    for name, (rows, columns) in SHAPES.items():
        frame = pl.read_parquet(datasets.path(name))
        assert (frame.height, frame.columns) == (rows, columns)
        assert not sum(frame.null_count().row(0))
    sleepstudy = pl.read_parquet(datasets.path("sleepstudy"))
    assert sleepstudy.schema == {"reaction": pl.Float64, "days": pl.Float64, "subject": pl.String}
    assert sleepstudy["reaction"].mean() == pytest.approx(298.5078916667)


def test_an_unknown_data_set_is_named() -> None:
    with pytest.raises(mlpipe.ConfigError, match="did you mean 'sleepstudy'"):
        datasets.path("sleep_study")


def test_statements_are_found_in_the_checkout() -> None:
    assert sql_folder() == ROOT / "sql"
    assert "select" in read_sql("rows")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "content")
    return folder / "content"


def test_the_wheel_holds_all_that_runs(wheel: Path) -> None:
    assert {path.name for path in wheel.iterdir()} == {"mlpipe", f"mlpipe-{mlpipe.__version__}.dist-info"}
    assert {p.name for p in (wheel / "mlpipe" / "_sql").iterdir()} == {p.name for p in (ROOT / "sql").iterdir()}
    source = {p.relative_to(ROOT) for p in (ROOT / "mlpipe").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert not {p for p in source if not (wheel / p).is_file()}
    assert (wheel / "mlpipe" / "py.typed").is_file()


def test_statements_are_found_in_the_wheel(wheel: Path, tmp_path: Path) -> None:
    code = "import mlpipe; from mlpipe.sql_files import read_sql; print(mlpipe.__file__); print(read_sql('rows'))"
    where, text = python(code, path=wheel, cwd=tmp_path).split("\n", 1)
    assert Path(where).is_relative_to(wheel)
    assert text == read_sql("rows").strip()


# ---- what the pages say


def test_ci_runs_the_readmes_test_command_last() -> None:
    command = "pytest -q -n 2"
    assert f".venv/bin/{command}\n" in (ROOT / "README.md").read_text()
    assert (ROOT / ".ci" / "run").read_text().rstrip().split("\n")[-1] == command


def test_readmes_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_jobs_name_what_exists() -> None:
    for path in (ROOT / "configs").glob("*.toml"):
        assert (ROOT / tomllib.loads(path.read_text())["source"]["path"]).is_file()


def test_the_version_has_a_changelog_entry() -> None:
    assert f"## {mlpipe.__version__}" in (ROOT / "CHANGELOG.md").read_text()
