-- Every row of the source, in its order, with the linear predictor; `joined` holds the conditional modes of the levels.
select * from src
