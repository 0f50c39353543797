/* The rows that enter the fit, one column per feature. */
/* src offers the used columns by position: c3 is the source's fourth column as a number (or text, or boolean), k3 the */
/* same column as a key, in the source's own type. Rows with a missing or infinite value in any used column are left out here and */
/* counted apart (missing.sql). Features are shifted and scaled near mean 0 and spread 1, so that sums of their products keep their digits. */
SELECT
  c1 AS x0
FROM src
WHERE
  NOT c1 IS NULL
  AND c0 * 0.0e0 = 0.0e0
  AND c5 * 0.0e0 = 0.0e0
  AND NOT k3 IS NULL
  AND NOT k4 IS NULL
