/* The rows that enter the fit, one column per feature. */
/* src offers the used columns by position: c3 is the source's fourth column as a number (or text, or boolean), k3 the */
/* same column as a key, in the source's own type. Rows with a missing or infinite value in any used column are left out here and */
/* counted apart (missing.sql). Features are shifted and scaled near mean 0 and spread 1, so that sums of their products keep their digits. */
SELECT
  k3,
  c5 AS w,
  c6 AS q,
  (
    c1 - 2004.0e0
  ) * 0.5e0 AS f1, /* year[1] */
  CASE WHEN c2 = 'b' THEN 1.0e0 ELSE 0.0e0 END AS f2, /* `it's`[b] */
  CASE WHEN c2 = 'it''s' THEN 1.0e0 ELSE 0.0e0 END AS f3, /* `it's`[it's] */
  CASE WHEN c2 = 'b' THEN (
    c1 - 2004.0e0
  ) * 0.5e0 ELSE 0.0e0 END AS f4, /* `it's`[b]:year[1] */
  CASE WHEN c2 = 'it''s' THEN (
    c1 - 2004.0e0
  ) * 0.5e0 ELSE 0.0e0 END AS f5, /* `it's`[it's]:year[1] */
  LN(c0) * 2.0e0 AS f6 /* log(y) ~[1] */
FROM src
WHERE
  c5 * 0.0e0 = 0.0e0
  AND NOT c6 IS NULL
  AND NOT c1 IS NULL
  AND NOT c2 IS NULL
  AND c0 * 0.0e0 = 0.0e0
  AND NOT k3 IS NULL
  AND c5 > 0.0e0
  AND c6 > 0.0e0
