import pandas as pd
import statsmodels.formula.api as smf

frame = pd.read_parquet("{data}")
print(smf.mixedlm("y ~ {fixed}", frame, groups=frame["g"]).fit().summary())
