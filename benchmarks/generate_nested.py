"""Students in schools in districts, several years each: three nested random intercepts, deterministic for a seed.

    python benchmarks/generate_nested.py --rows 10000000 --students 1000000 --schools 10000 --districts 100 --out data.parquet

Columns district, school, student, x1, x2, y = 50 + 0.3 x1 - 0.2 x2 + a + b + c + e with sd 2 for districts, 3 for schools, 5 for students
and 4 for rows; `--seed 0`. Schools are numbered anew in each district and students in each school; schools differ in size (lognormal);
the rows are in random order.
"""
from __future__ import annotations

import argparse

import numpy as np
import polars as pl


def main() -> None:
    """Reads the command line and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("rows", "students", "schools", "districts"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    sizes = np.cumsum(rng.lognormal(0.0, 0.5, arguments.schools))
    more = np.searchsorted(sizes, rng.random(arguments.students - arguments.schools) * sizes[-1])
    school_of = np.sort(np.append(np.arange(arguments.schools), more))
    district_of = np.arange(arguments.schools) * arguments.districts // arguments.schools
    a, b, c = (sd * rng.standard_normal(m) for sd, m in ((2.0, arguments.districts), (3.0, arguments.schools), (5.0, arguments.students)))
    student = rng.permutation(np.arange(arguments.rows) % arguments.students)
    school = school_of[student]
    district = district_of[school]
    x1, x2 = rng.standard_normal(arguments.rows), rng.random(arguments.rows)
    y = 50.0 + 0.3 * x1 - 0.2 * x2 + a[district] + b[school] + c[student] + 4.0 * rng.standard_normal(arguments.rows)
    first_school = np.searchsorted(district_of, np.arange(arguments.districts))
    first_student = np.searchsorted(school_of, np.arange(arguments.schools))
    keys = {"district": district, "school": school - first_school[district], "student": student - first_student[school]}
    pl.DataFrame({**keys, "x1": x1, "x2": x2, "y": y}).write_parquet(arguments.out, row_group_size=250_000)


if __name__ == "__main__":
    main()
