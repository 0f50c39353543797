import mlpipe as mp


def model(dbt, session):
    dbt.config(materialized="table")
    fit = mp.lmm("reaction ~ days + (1 + days | subject)", dbt.ref("sleep"))
    return fit.augment().read_all()  # the connection is dbt's: it is free when the stream has been read
