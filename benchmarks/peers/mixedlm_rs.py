import mixedlm_rs
import pandas as pd

print(mixedlm_rs.mixedlm("y ~ {fixed}", pd.read_parquet("{data}"), groups="g").fit().summary())
