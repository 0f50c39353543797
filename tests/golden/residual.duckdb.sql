/* Every row of the source, in its order, with the linear predictor of the fixed part; the conditional modes are added to it afterwards. */
SELECT
  src.r0,
  src.r3,
  CASE
    WHEN NOT c1 IS NULL AND c5 * 0.0e0 = 0.0e0
    THEN (
      0.5e0 + (
        1.5e0 * CASE WHEN c1 > 2004.0e0 THEN 1.0e0 ELSE 0.0e0 END
      )
    ) + c5
  END AS o0,
  CASE
    WHEN NOT c1 IS NULL AND c5 * 0.0e0 = 0.0e0
    THEN (
      (
        c0 - c5
      ) + c5
    ) - (
      (
        0.5e0 + (
          1.5e0 * CASE WHEN c1 > 2004.0e0 THEN 1.0e0 ELSE 0.0e0 END
        )
      ) + c5
    )
  END AS o1
FROM src
