import dagster as dg

import mlpipe as mp


class Sleep(dg.Config):
    data: str
    target: str


@dg.asset(check_specs=[dg.AssetCheckSpec("converged", asset="sleep_fit")])
def sleep_fit(config: Sleep) -> dg.MaterializeResult:
    """Reaction times by days of too little sleep, by subject."""
    try:
        fit = mp.lmm("reaction ~ days + (1 + days | subject)", config.data)
    except mp.ResourceError as error:  # memory, disk, a connection: worth another try
        raise dg.RetryRequested(max_retries=2, seconds_to_wait=60) from error
    fit.write(config.target, mode="overwrite")
    return dg.MaterializeResult(
        metadata={"rows": fit.glance()["nobs"][0].as_py(), "days": fit.fixef()["days"], "summary": dg.MetadataValue.text(str(fit))},
        check_results=[dg.AssetCheckResult(check_name="converged", passed=fit.converged)],
    )
