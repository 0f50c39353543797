import gpboost
import numpy as np
import pandas as pd

frame = pd.read_parquet("{data}")
columns = "{fixed}".split(" + ")
model = gpboost.GPModel(group_data=frame["g"].to_numpy(), likelihood="bernoulli_logit")
model.fit(y=frame["y"].to_numpy().astype(float), X=np.column_stack([np.ones(len(frame)), frame[columns].to_numpy()]))
print(model.summary())
