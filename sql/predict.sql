-- Every row of the source, in its order, with the linear predictor of the fixed part; the conditional modes are added to it afterwards.
select * from src
