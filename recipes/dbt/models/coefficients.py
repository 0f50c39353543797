import mlpipe as mp


def model(dbt, session):
    dbt.config(materialized="table")
    fit = mp.lmm("reaction ~ days + (1 + days | subject)", dbt.ref("sleep"))
    return fit.tidy()
