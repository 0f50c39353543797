/* Blocks with the same number of rows share their part of the covariance matrix, so their sums enter the likelihood */
/* only through the totals and cross-products below: one row per distinct block size, however many blocks there are. */
SELECT
  row_count,
  COUNT(*) AS block_count,
  SUM(s0) AS t_0,
  SUM(s1) AS t_1,
  SUM(s2) AS t_2,
  SUM(s0 * s0) AS p_0_0,
  SUM(s0 * s1) AS p_0_1,
  SUM(s0 * s2) AS p_0_2,
  SUM(s1 * s1) AS p_1_1,
  SUM(s1 * s2) AS p_1_2,
  SUM(s2 * s2) AS p_2_2
FROM (
  /* Per block: rows, and the sums Z'wZ and Z'w[X y] that the likelihood of a mixed model needs. No block's own X'X is needed. */
  SELECT
    COUNT(*) AS row_count,
    k3,
    k4,
    CAST(COUNT(*) AS DOUBLE) AS s0,
    SUM(f1) AS s1,
    SUM(f2) AS s2
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
  GROUP BY
    k3,
    k4
) AS blocks
GROUP BY
  row_count
