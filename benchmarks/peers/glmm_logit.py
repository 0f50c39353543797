import glmm
import pandas as pd

print(glmm.fit(pd.read_parquet("{data}"), "y ~ {fixed} + (1 | g)", family="binomial").beta)
