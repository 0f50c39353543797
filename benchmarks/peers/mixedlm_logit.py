import mixedlm
import pandas as pd

print(mixedlm.glmer("y ~ {fixed} + (1 | g)", pd.read_parquet("{data}"), family=mixedlm.families.Binomial()).summary())
