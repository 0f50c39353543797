/* Every row of the source, in its order, with the linear predictor of the fixed part; the conditional modes are added to it afterwards. */
SELECT
  src.r0,
  src.r3,
  CASE
    WHEN (
      c2 = 'a' OR c2 = 'b' OR c2 = 'it''s'
    ) AND NOT c1 IS NULL AND NOT c2 IS NULL
    THEN (
      (
        0.5e0 + (
          1.5e0 * (
            (
              c1 - 2004.0e0
            ) * 0.5e0
          )
        )
      ) + (
        (
          2.5e0 * CASE WHEN c2 = 'b' THEN 1.0e0 ELSE 0.0e0 END
        ) + (
          3.5e0 * CASE WHEN c2 = 'it''s' THEN 1.0e0 ELSE 0.0e0 END
        )
      )
    ) + (
      (
        4.5e0 * CASE WHEN c2 = 'b' THEN (
          c1 - 2004.0e0
        ) * 0.5e0 ELSE 0.0e0 END
      ) + (
        5.5e0 * CASE WHEN c2 = 'it''s' THEN (
          c1 - 2004.0e0
        ) * 0.5e0 ELSE 0.0e0 END
      )
    )
  END AS o0,
  CASE
    WHEN (
      c2 = 'a' OR c2 = 'b' OR c2 = 'it''s'
    ) AND NOT c1 IS NULL AND NOT c2 IS NULL
    THEN (
      c1 - 2004.0e0
    ) * 0.5e0
  END AS o1
FROM src
