-- Predictions of a fit where its rows live: the rows' own columns and `predicted`, NULL for a row without usable covariates or with a
-- level of a fixed factor that the fit has not seen. Unseen and NULL keys get the population's value.
select * from src
