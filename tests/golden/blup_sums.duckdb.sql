/* Per block: Z'wZ and Z'w(y - X beta). The conditional modes are Lambda (Lambda'Z'wZ Lambda + I)^-1 Lambda' Z'w(y - X beta). */
SELECT
  COUNT(*) AS row_count,
  k3,
  k4,
  CAST(COUNT(*) AS DOUBLE) AS s_0_0,
  SUM(residual) AS r_0
FROM (
  SELECT
    k3,
    k4,
    (
      -0.5e0
    ) + (
      1.0e0 * f2
    ) AS residual
  FROM (
    /* The rows that enter the fit, one column per feature. */
    /* src offers the used columns by position: c3 is the source's fourth column as a number (or text, or boolean), k3 the */
    /* same column as a key, in the source's own type. Rows with a missing or infinite value in any used column are left out here and */
    /* counted apart (missing.sql). Features are shifted and scaled near mean 0 and spread 1, so that sums of their products keep their digits. */
    SELECT
      k3,
      k4,
      CASE WHEN c1 > 2004.0e0 THEN 1.0e0 ELSE 0.0e0 END AS f1, /* I(year > 2004)[TRUE] */
      (
        c0 - c5
      ) * 0.5e0 AS f2 /* y ~[1] */
    FROM src
    WHERE
      NOT c1 IS NULL
      AND c0 * 0.0e0 = 0.0e0
      AND c5 * 0.0e0 = 0.0e0
      AND NOT k3 IS NULL
      AND NOT k4 IS NULL
  ) AS used
) AS used
GROUP BY
  k3,
  k4
