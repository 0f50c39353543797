import lme_python
import pandas as pd

print(lme_python.lmer("y ~ {fixed} + (1 | g)", pd.read_parquet("{data}")))
