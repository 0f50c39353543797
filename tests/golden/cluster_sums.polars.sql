/* Per cluster: X'w e, the score of its rows, and the cross-products that a correction for small samples or absorbed effects needs. */
SELECT
  COUNT(*) AS row_count,
  k3,
  SUM((
    w * q
  ) * f1) AS p_0_1,
  SUM((
    w * q
  ) * residual) AS r_0,
  SUM((
    (
      w * q
    ) * residual
  ) * f1) AS r_1,
  SUM((
    (
      w * q
    ) * residual
  ) * f2) AS r_2,
  SUM((
    (
      w * q
    ) * residual
  ) * f3) AS r_3,
  SUM((
    (
      w * q
    ) * residual
  ) * f4) AS r_4,
  SUM((
    (
      w * q
    ) * residual
  ) * f5) AS r_5
FROM (
  SELECT
    k3,
    w,
    q,
    f1,
    f2,
    f3,
    f4,
    f5,
    (
      0.5e0 + (
        (
          -1.0e0
        ) * f1
      )
    ) + (
      2.0e0 * f6
    ) AS residual
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
) AS used
GROUP BY
  k3
