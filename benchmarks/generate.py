"""Rows of a random-slope model, streamed to Parquet in bounded memory: deterministic for a seed and one thread.

    python benchmarks/generate.py --rows 10000000 --blocks 200000 --out data.parquet [--order grouped] [--response binary|cells]

Columns g (block, unequal sizes), x1 … x5, y = 1 + 0.5 x1 - 0.2 x2 + 0.1 x3 + 0.02 (x4 - 2000) + 0.3 x5 + b0 + b1 x1 + e,
with Var(b0) = 1, Var(b1) = 1/6, Var(e) = 1/3.

`binary`: blocks of about equal size, y Bernoulli with logit -0.5 + 0.3 x1 - 0.2 x2 + 0.1 x3 + 0.4 x4 + b0 and continuous covariates of
variance 1, Var(b0) = 1/2; `cells`: the same with covariates that take the values 0 and 1.
"""
from __future__ import annotations

import argparse

import duckdb

STATEMENT = """
copy (
    with blocks as (
        select range as g, 2 * (random() + random() + random() - 1.5) as b0, random() + random() - 1 as b1 from range({blocks})
    ),
    rows as (
        select floor(pow(random(), 1.5) * {blocks})::bigint as g, random() * 2 - 1 as x1, random() + random() - 1 as x2,
            random() * 10 as x3, (2000 + floor(random() * 20))::double as x4, random() + random() + random() as x5,
            random() + random() + random() + random() - 2 as e
        from range({rows})
    )
    select rows.g, x1, x2, x3, x4, x5, 1 + 0.5 * x1 - 0.2 * x2 + 0.1 * x3 + 0.02 * (x4 - 2000) + 0.3 * x5 + b0 + b1 * x1 + e as y
    from rows join blocks using (g) {order}
) to '{out}' (format parquet)
"""

BINARY = """
copy (
    with blocks as (select range as g, sqrt(2) * (random() + random() + random() - 1.5) as b0 from range({blocks})),
    rows as (
        select floor(random() * {blocks})::bigint as g, {x} as x1, {x} as x2, {x} as x3, {x} as x4, {x} as x5, random() as p
        from range({rows})
    )
    select rows.g, x1, x2, x3, x4, x5, (p < 1 / (1 + exp(0.5 - 0.3 * x1 + 0.2 * x2 - 0.1 * x3 - 0.4 * x4 - b0)))::int as y
    from rows join blocks using (g) {order}
) to '{out}' (format parquet)
"""
COVARIATE = {"binary": "(2 * (random() + random() + random() - 1.5))", "cells": "floor(random() * 2)"}


def main() -> None:
    """Reads the command line and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--order", choices=["shuffled", "grouped"], default="shuffled")
    parser.add_argument("--response", choices=["gaussian", *COVARIATE], default="gaussian")
    parser.add_argument("--memory-limit", default="4GB")
    arguments = parser.parse_args()
    con = duckdb.connect(config={"memory_limit": arguments.memory_limit, "threads": 1, "preserve_insertion_order": False})
    con.execute("select setseed(0.5)")
    order = "order by rows.g" if arguments.order == "grouped" else ""
    values = {"rows": arguments.rows, "blocks": arguments.blocks, "order": order, "out": arguments.out.replace("'", "''")}
    binary = arguments.response in COVARIATE
    con.execute(BINARY.format(x=COVARIATE[arguments.response], **values) if binary else STATEMENT.format(**values))


if __name__ == "__main__":
    main()
