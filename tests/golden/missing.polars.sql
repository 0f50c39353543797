/* Why rows were left out: how many values are missing, infinite, or (weights) zero or negative. A row may count in several columns. */
SELECT
  COUNT(*) AS row_count,
  SUM(
    CASE
      WHEN c5 = CAST('inf' AS DOUBLE) OR c5 = CAST('-inf' AS DOUBLE)
      THEN 1.0e0
      ELSE 0.0e0
    END
  ) AS infinite_0,
  SUM(
    CASE
      WHEN c5 IS NULL
      OR (
        NOT (
          c5 * 0.0e0 = 0.0e0
        )
        AND NOT (
          c5 = CAST('inf' AS DOUBLE) OR c5 = CAST('-inf' AS DOUBLE)
        )
      )
      THEN 1.0e0
      ELSE 0.0e0
    END
  ) AS missing_0,
  SUM(
    CASE
      WHEN c6 = CAST('inf' AS DOUBLE) OR c6 = CAST('-inf' AS DOUBLE)
      THEN 1.0e0
      ELSE 0.0e0
    END
  ) AS infinite_1,
  SUM(
    CASE
      WHEN c6 IS NULL
      OR (
        NOT (
          c6 * 0.0e0 = 0.0e0
        )
        AND NOT (
          c6 = CAST('inf' AS DOUBLE) OR c6 = CAST('-inf' AS DOUBLE)
        )
      )
      THEN 1.0e0
      ELSE 0.0e0
    END
  ) AS missing_1,
  SUM(
    CASE
      WHEN c1 = CAST('inf' AS DOUBLE) OR c1 = CAST('-inf' AS DOUBLE)
      THEN 1.0e0
      ELSE 0.0e0
    END
  ) AS infinite_2,
  SUM(
    CASE
      WHEN c1 IS NULL
      OR (
        NOT (
          c1 * 0.0e0 = 0.0e0
        )
        AND NOT (
          c1 = CAST('inf' AS DOUBLE) OR c1 = CAST('-inf' AS DOUBLE)
        )
      )
      THEN 1.0e0
      ELSE 0.0e0
    END
  ) AS missing_2,
  SUM(CASE WHEN c2 IS NULL THEN 1.0e0 ELSE 0.0e0 END) AS missing_3,
  SUM(
    CASE
      WHEN c0 = CAST('inf' AS DOUBLE) OR c0 = CAST('-inf' AS DOUBLE)
      THEN 1.0e0
      ELSE 0.0e0
    END
  ) AS infinite_4,
  SUM(
    CASE
      WHEN c0 IS NULL
      OR (
        NOT (
          c0 * 0.0e0 = 0.0e0
        )
        AND NOT (
          c0 = CAST('inf' AS DOUBLE) OR c0 = CAST('-inf' AS DOUBLE)
        )
      )
      THEN 1.0e0
      ELSE 0.0e0
    END
  ) AS missing_4,
  SUM(
    CASE
      WHEN c3 = CAST('inf' AS DOUBLE) OR c3 = CAST('-inf' AS DOUBLE)
      THEN 1.0e0
      ELSE 0.0e0
    END
  ) AS infinite_key_0,
  SUM(
    CASE
      WHEN k3 IS NULL
      OR (
        NOT (
          c3 * 0.0e0 = 0.0e0
        )
        AND NOT (
          c3 = CAST('inf' AS DOUBLE) OR c3 = CAST('-inf' AS DOUBLE)
        )
      )
      THEN 1.0e0
      ELSE 0.0e0
    END
  ) AS key_0,
  SUM(CASE WHEN c5 = 0.0e0 THEN 1.0e0 ELSE 0.0e0 END) AS zero_w,
  SUM(CASE WHEN c5 < 0.0e0 THEN 1.0e0 ELSE 0.0e0 END) AS negative_w,
  SUM(CASE WHEN c6 = 0.0e0 THEN 1.0e0 ELSE 0.0e0 END) AS zero_q,
  SUM(CASE WHEN c6 < 0.0e0 THEN 1.0e0 ELSE 0.0e0 END) AS negative_q
FROM src
