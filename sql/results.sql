-- The tables that a fit is written to, as `fit.write`, `mlpipe fit --out` and jobs make them (names after the prefix, "mlpipe" unless set).
-- Every row has its run, its model (its name in the job, else its formula) and, with `by` in a job, columns of these names after `model`.
-- A directory holds the same tables as runs/<run_id>/<table>.parquet.

-- One row per model: what was fitted, and how it ended. `message`: why there is no fit, or how the search ended.
create table mlpipe_fit (
    run_id varchar, model varchar, formula varchar, family varchar, nobs double, n_dropped bigint, loglik double, converged boolean,
    singular boolean, message varchar, seconds double, started timestamp with time zone, source_fingerprint varchar, version varchar
);

-- Fixed effects, then standard deviations and correlations of the random part (`effect` "ran_pars"), as fit.tidy().
create table mlpipe_coef (
    run_id varchar, model varchar, effect varchar, "group" varchar, term varchar, estimate double, std_error double, statistic double,
    df double, p_value double, conf_low double, conf_high double
);

-- Variances and covariances (`term2` set) of the random effects, and the residual variance, as fit.varcorr().
create table mlpipe_varcomp (
    run_id varchar, model varchar, "group" varchar, term1 varchar, term2 varchar, variance double, sd double
);

-- For audit, one row per model: rows and bytes read, rows dropped, passes over the rows, the source's fingerprint, seconds, the process's
-- peak memory in bytes, versions and all notes as JSON. `record` is the fit itself, from which mlpipe.load makes it again, `tables` lists
-- the tables of the run; in a directory both are in fit.json.
create table mlpipe_manifest (
    run_id varchar, model varchar, rows_read bigint, rows_dropped bigint, passes double, bytes bigint, source_fingerprint varchar,
    seconds double, peak_memory bigint, versions varchar, info varchar, record varchar, tables varchar[]
);

-- Of jobs with a [store]: each coefficient's change since the fit before, in standard errors of this one.
create table mlpipe_drift (
    run_id varchar, model varchar, term varchar, previous double, estimate double, std_error double, drift double, since varchar
);

-- Random effects, one row a level; one table per grouping factor, here (1 + days | subject): the key columns in the source's own types,
-- then each coefficient and its conditional standard deviation. That of an interaction a:b is named …_ranef_a__b.
create table mlpipe_ranef_subject (
    run_id varchar, model varchar, subject varchar, "(Intercept)" double, "(Intercept)_se" double, days double, days_se double
);
