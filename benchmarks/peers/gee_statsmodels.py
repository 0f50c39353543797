"""statsmodels' GEE, exchangeable binomial, on the rows of a Parquet file; prints estimates and seconds.

    python benchmarks/peers/gee_statsmodels.py b1m.parquet
"""
from __future__ import annotations

import resource
import sys
import time

import pyarrow.parquet as pq
import statsmodels.api as sm


def cpu() -> float:
    """User and system seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


data = pq.read_table(sys.argv[1]).to_pandas().sort_values("g", kind="stable")
X = sm.add_constant(data[["x1", "x2", "x3", "x4", "x5"]])
before, began = cpu(), time.perf_counter()
model = sm.GEE(data["y"], X, groups=data["g"], family=sm.families.Binomial(), cov_struct=sm.cov_struct.Exchangeable())
made = cpu()
result = model.fit(cov_type="robust")
print(f"fit: {cpu() - before:.2f} s CPU ({cpu() - made:.2f} s without making the model), {time.perf_counter() - began:.2f} s wall")
print("params", result.params.tolist())
print("errors", result.bse.tolist())
print("alpha", float(model.cov_struct.dep_params))
