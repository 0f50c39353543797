WITH mlpipe_stage1 AS (
  SELECT
    mlpipe_src AS mlpipe_row,
    CASE
      WHEN (
        CAST(mlpipe_src."f" AS VARCHAR) = 'a'
        OR CAST(mlpipe_src."f" AS VARCHAR) = 'c\d'
        OR CAST(mlpipe_src."f" AS VARCHAR) = 'it''s'
      )
      AND (
        NOT (
          mlpipe_src."flag"
        ) OR mlpipe_src."flag"
      )
      AND CAST(mlpipe_src."when" AS DOUBLE PRECISION) * 0.0e0 = 0.0e0
      AND NOT CAST(mlpipe_src."f" AS VARCHAR) IS NULL
      AND NOT mlpipe_src."flag" IS NULL
      AND CAST(mlpipe_src."x" AS DOUBLE PRECISION) * 0.0e0 = 0.0e0
      THEN (
        (
          (
            (
              -0.681e0
            ) + (
              0.15e0 * (
                (
                  CASE
                    WHEN CAST(mlpipe_src."when" AS DOUBLE PRECISION) > 0.0e0
                    THEN LN(CAST(mlpipe_src."when" AS DOUBLE PRECISION))
                  END - 7.6056429741692035e0
                ) * 256.0e0
              )
            )
          ) + (
            (
              (
                -0.476e0
              ) * CASE
                WHEN CAST(mlpipe_src."f" AS VARCHAR) = 'c\d'
                THEN CAST(1.0e0 AS DOUBLE PRECISION)
                ELSE CAST(0.0e0 AS DOUBLE PRECISION)
              END
            ) + (
              (
                -0.544e0
              ) * CASE
                WHEN CAST(mlpipe_src."f" AS VARCHAR) = 'a'
                THEN CAST(1.0e0 AS DOUBLE PRECISION)
                ELSE CAST(0.0e0 AS DOUBLE PRECISION)
              END
            )
          )
        ) + (
          (
            (
              (
                -0.049e0
              ) * CASE
                WHEN NOT (
                  mlpipe_src."flag"
                )
                THEN CAST(1.0e0 AS DOUBLE PRECISION)
                ELSE CAST(0.0e0 AS DOUBLE PRECISION)
              END
            ) + (
              (
                -0.049e0
              ) * CASE
                WHEN mlpipe_src."flag" AND (
                  CAST(mlpipe_src."x" AS DOUBLE PRECISION) > 0.0e0
                )
                THEN CAST(1.0e0 AS DOUBLE PRECISION)
                ELSE CAST(0.0e0 AS DOUBLE PRECISION)
              END
            )
          ) + (
            (
              (
                -0.188e0
              ) * CASE
                WHEN CAST(mlpipe_src."f" AS VARCHAR) = 'c\d'
                THEN (
                  CASE
                    WHEN CAST(mlpipe_src."when" AS DOUBLE PRECISION) > 0.0e0
                    THEN LN(CAST(mlpipe_src."when" AS DOUBLE PRECISION))
                  END - 7.6056429741692035e0
                ) * 256.0e0
                ELSE CAST(0.0e0 AS DOUBLE PRECISION)
              END
            ) + (
              (
                -0.193e0
              ) * CASE
                WHEN CAST(mlpipe_src."f" AS VARCHAR) = 'a'
                THEN (
                  CASE
                    WHEN CAST(mlpipe_src."when" AS DOUBLE PRECISION) > 0.0e0
                    THEN LN(CAST(mlpipe_src."when" AS DOUBLE PRECISION))
                  END - 7.6056429741692035e0
                ) * 256.0e0
                ELSE CAST(0.0e0 AS DOUBLE PRECISION)
              END
            )
          )
        )
      ) + (
        COALESCE(
          mlpipe_r0."(Intercept)" + (
            (
              -0.0002950000000000003e0
            ) * mlpipe_r0."x"
          ),
          CAST(0.0e0 AS DOUBLE PRECISION)
        ) + (
          COALESCE(1.00076e0 * mlpipe_r0."x", CAST(0.0e0 AS DOUBLE PRECISION)) * CAST(mlpipe_src."x" AS DOUBLE PRECISION)
        )
      )
    END AS mlpipe_linear
  FROM data AS mlpipe_src
  LEFT JOIN "mlpipe_ranef_g" AS mlpipe_r0
    ON mlpipe_src."g" = mlpipe_r0."g"
    AND mlpipe_r0."run_id" = 'run1'
    AND mlpipe_r0."model" = 'y ~ log(when) * f + flag + I(flag & x > 0) + (1 + x | g)'
), mlpipe_stage2 AS (
  SELECT
    mlpipe_stage1.*,
    CASE WHEN mlpipe_linear * 0.0e0 = 0.0e0 THEN mlpipe_linear END AS mlpipe_eta
  FROM mlpipe_stage1
), mlpipe_stage3 AS (
  SELECT
    mlpipe_stage2.*,
    mlpipe_eta AS mlpipe_mean
  FROM mlpipe_stage2
)
/* Predictions of a fit where its rows live: the rows' own columns and `predicted`, NULL for a row without usable covariates or with a */
/* level of a fixed factor that the fit has not seen. Unseen and NULL keys get the population's value. */
/* y ~ log(when) * f + flag + I(flag & x > 0) + (1 + x | g): conditional predictions on the scale of the response */
/* reads data */
/* joins mlpipe_ranef_g (g) of run run1 */
SELECT
  (
    mlpipe_stage3.mlpipe_row
  ).*,
  CASE
    WHEN NOT mlpipe_eta IS NULL AND mlpipe_mean * 0.0e0 = 0.0e0
    THEN mlpipe_mean
  END AS predicted
FROM mlpipe_stage3
