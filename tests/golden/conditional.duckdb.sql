/* Every row of the source, in its order, with the linear predictor; `joined` holds the conditional modes of the levels. */
SELECT
  src.r0,
  src.r3,
  CASE
    WHEN (
      c1 * 0.0e0 = 0.0e0 AND c5 * 0.0e0 = 0.0e0
    )
    AND (
      (
        (
          0.5e0 + (
            1.5e0 * CASE WHEN c1 > 2004.0e0 THEN 1.0e0 ELSE 0.0e0 END
          )
        ) + c5
      ) + COALESCE(h0, 0.0e0)
    ) * 0.0e0 = 0.0e0
    THEN (
      (
        0.5e0 + (
          1.5e0 * CASE WHEN c1 > 2004.0e0 THEN 1.0e0 ELSE 0.0e0 END
        )
      ) + c5
    ) + COALESCE(h0, 0.0e0)
  END AS o0,
  CASE
    WHEN (
      c1 * 0.0e0 = 0.0e0 AND c5 * 0.0e0 = 0.0e0
    )
    AND (
      (
        (
          c0 - c5
        ) + c5
      ) - (
        (
          (
            0.5e0 + (
              1.5e0 * CASE WHEN c1 > 2004.0e0 THEN 1.0e0 ELSE 0.0e0 END
            )
          ) + c5
        ) + COALESCE(h0, 0.0e0)
      )
    ) * 0.0e0 = 0.0e0
    THEN (
      (
        c0 - c5
      ) + c5
    ) - (
      (
        (
          0.5e0 + (
            1.5e0 * CASE WHEN c1 > 2004.0e0 THEN 1.0e0 ELSE 0.0e0 END
          )
        ) + c5
      ) + COALESCE(h0, 0.0e0)
    )
  END AS o1,
  CASE WHEN h0 IS NULL THEN 1.0e0 ELSE 0.0e0 END AS unseen
FROM src
LEFT JOIN joined
  ON CAST(k3 AS BIGINT) = j0 AND c4 = j1
ORDER BY
  src.rn
