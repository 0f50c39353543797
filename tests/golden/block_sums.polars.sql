/* Per block: rows, and the sums Z'wZ and Z'w[X y] that the likelihood of a mixed model needs. No block's own X'X is needed. */
SELECT
  COUNT(*) AS row_count,
  k3,
  SUM(w * q) AS s0,
  SUM((
    w * q
  ) * f1) AS s1,
  SUM((
    w * q
  ) * f2) AS s2,
  SUM((
    w * q
  ) * f3) AS s3,
  SUM((
    w * q
  ) * f4) AS s4,
  SUM((
    w * q
  ) * f5) AS s5,
  SUM((
    w * q
  ) * f6) AS s6,
  SUM((
    (
      w * q
    ) * f1
  ) * f1) AS s7,
  SUM((
    (
      w * q
    ) * f1
  ) * f2) AS s8,
  SUM((
    (
      w * q
    ) * f1
  ) * f3) AS s9,
  SUM((
    (
      w * q
    ) * f1
  ) * f4) AS s10,
  SUM((
    (
      w * q
    ) * f1
  ) * f5) AS s11,
  SUM((
    (
      w * q
    ) * f1
  ) * f6) AS s12
FROM (
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
) AS used
GROUP BY
  k3
