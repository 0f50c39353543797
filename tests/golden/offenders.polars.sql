/* Rows whose columns are all finite while a term of the formula is not, such as log(0): how many, and one such row. */
SELECT
  COUNT(*) AS row_count,
  MIN(x0) AS v_0
FROM (
  /* The rows that enter the fit, one column per feature. */
  /* src offers the used columns by position: c3 is the source's fourth column as a number (or text, or boolean), k3 the */
  /* same column as a key, in the source's own type. Rows with a missing or infinite value in any used column are left out here and */
  /* counted apart (missing.sql). Features are shifted and scaled near mean 0 and spread 1, so that sums of their products keep their digits. */
  SELECT
    c0 AS x0
  FROM src
  WHERE
    (
      c5 * 0.0e0 = 0.0e0
      AND NOT c6 IS NULL
      AND NOT c1 IS NULL
      AND NOT c2 IS NULL
      AND c0 * 0.0e0 = 0.0e0
      AND NOT k3 IS NULL
      AND c5 > 0.0e0
      AND c6 > 0.0e0
    )
    AND NOT (
      LN(c0) * 0.0e0 = 0.0e0
    )
) AS used
