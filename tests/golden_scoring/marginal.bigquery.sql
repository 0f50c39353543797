WITH mlpipe_stage1 AS (
  SELECT
    mlpipe_src.*,
    CASE
      WHEN CAST(mlpipe_src.`when` AS FLOAT64) * 0.0e0 = 0.0e0
      THEN 0.044e0 + (
        0.027e0 * (
          (
            CAST(mlpipe_src.`when` AS FLOAT64) - 2010.0e0
          ) * 0.125e0
        )
      )
    END AS mlpipe_linear
  FROM lake.`rows` AS mlpipe_src
), mlpipe_stage2 AS (
  SELECT
    mlpipe_stage1.*,
    CASE WHEN mlpipe_linear * 0.0e0 = 0.0e0 THEN mlpipe_linear END AS mlpipe_eta
  FROM mlpipe_stage1
), mlpipe_stage3 AS (
  SELECT
    mlpipe_stage2.*,
    ABS(mlpipe_eta / SQRT(1.0e0 + 0.146689e0)) * 0.7071067811865476e0 AS mlpipe_z
  FROM mlpipe_stage2
), mlpipe_stage4 AS (
  SELECT
    mlpipe_stage3.*,
    CASE
      WHEN mlpipe_z <= 0.46875e0
      THEN 0.5e0 - (
        (
          0.5e0 * mlpipe_z
        ) * (
          (
            (
              (
                (
                  (
                    (
                      (
                        (
                          0.18577770618460315e0 * (
                            mlpipe_z * mlpipe_z
                          )
                        ) + 3.1611237438705655e0
                      ) * (
                        mlpipe_z * mlpipe_z
                      )
                    ) + 113.86415415105016e0
                  ) * (
                    mlpipe_z * mlpipe_z
                  )
                ) + 377.485237685302e0
              ) * (
                mlpipe_z * mlpipe_z
              )
            ) + 3209.3775891384694e0
          ) / (
            (
              (
                (
                  (
                    (
                      (
                        (
                          1.0e0 * (
                            mlpipe_z * mlpipe_z
                          )
                        ) + 23.601290952344122e0
                      ) * (
                        mlpipe_z * mlpipe_z
                      )
                    ) + 244.02463793444417e0
                  ) * (
                    mlpipe_z * mlpipe_z
                  )
                ) + 1282.6165260773723e0
              ) * (
                mlpipe_z * mlpipe_z
              )
            ) + 2844.236833439171e0
          )
        )
      )
      WHEN mlpipe_z <= 4.0e0
      THEN (
        0.5e0 * EXP(-(
          mlpipe_z * mlpipe_z
        ))
      ) * (
        (
          (
            (
              (
                (
                  (
                    (
                      (
                        (
                          (
                            (
                              (
                                (
                                  (
                                    (
                                      (
                                        2.1531153547440383e-08 * mlpipe_z
                                      ) + 0.5641884969886701e0
                                    ) * mlpipe_z
                                  ) + 8.883149794388377e0
                                ) * mlpipe_z
                              ) + 66.11919063714163e0
                            ) * mlpipe_z
                          ) + 298.6351381974001e0
                        ) * mlpipe_z
                      ) + 881.952221241769e0
                    ) * mlpipe_z
                  ) + 1712.0476126340707e0
                ) * mlpipe_z
              ) + 2051.0783778260716e0
            ) * mlpipe_z
          ) + 1230.3393547979972e0
        ) / (
          (
            (
              (
                (
                  (
                    (
                      (
                        (
                          (
                            (
                              (
                                (
                                  (
                                    (
                                      (
                                        1.0e0 * mlpipe_z
                                      ) + 15.744926110709835e0
                                    ) * mlpipe_z
                                  ) + 117.6939508913125e0
                                ) * mlpipe_z
                              ) + 537.1811018620099e0
                            ) * mlpipe_z
                          ) + 1621.3895745666903e0
                        ) * mlpipe_z
                      ) + 3290.7992357334597e0
                    ) * mlpipe_z
                  ) + 4362.619090143247e0
                ) * mlpipe_z
              ) + 3439.3676741437216e0
            ) * mlpipe_z
          ) + 1230.3393548037495e0
        )
      )
      WHEN mlpipe_z <= 26.0e0
      THEN (
        (
          0.5e0 * EXP(-(
            mlpipe_z * mlpipe_z
          ))
        ) / mlpipe_z
      ) * (
        0.5641895835477563e0 - (
          (
            1.0e0 / (
              mlpipe_z * mlpipe_z
            )
          ) * (
            (
              (
                (
                  (
                    (
                      (
                        (
                          (
                            (
                              (
                                0.016315387137302097e0 * (
                                  1.0e0 / (
                                    mlpipe_z * mlpipe_z
                                  )
                                )
                              ) + 0.30532663496123236e0
                            ) * (
                              1.0e0 / (
                                mlpipe_z * mlpipe_z
                              )
                            )
                          ) + 0.36034489994980445e0
                        ) * (
                          1.0e0 / (
                            mlpipe_z * mlpipe_z
                          )
                        )
                      ) + 0.12578172611122926e0
                    ) * (
                      1.0e0 / (
                        mlpipe_z * mlpipe_z
                      )
                    )
                  ) + 0.016083785148742275e0
                ) * (
                  1.0e0 / (
                    mlpipe_z * mlpipe_z
                  )
                )
              ) + 0.0006587491615298378e0
            ) / (
              (
                (
                  (
                    (
                      (
                        (
                          (
                            (
                              (
                                1.0e0 * (
                                  1.0e0 / (
                                    mlpipe_z * mlpipe_z
                                  )
                                )
                              ) + 2.568520192289822e0
                            ) * (
                              1.0e0 / (
                                mlpipe_z * mlpipe_z
                              )
                            )
                          ) + 1.8729528499234673e0
                        ) * (
                          1.0e0 / (
                            mlpipe_z * mlpipe_z
                          )
                        )
                      ) + 0.5279051029514285e0
                    ) * (
                      1.0e0 / (
                        mlpipe_z * mlpipe_z
                      )
                    )
                  ) + 0.06051834131244132e0
                ) * (
                  1.0e0 / (
                    mlpipe_z * mlpipe_z
                  )
                )
              ) + 0.0023352049762686918e0
            )
          )
        )
      )
      ELSE 0.0e0
    END AS mlpipe_tail
  FROM mlpipe_stage3
), mlpipe_stage5 AS (
  SELECT
    mlpipe_stage4.*,
    CASE
      WHEN (
        mlpipe_eta / SQRT(1.0e0 + 0.146689e0)
      ) < 0.0e0
      THEN mlpipe_tail
      ELSE 1.0e0 - mlpipe_tail
    END AS mlpipe_mean
  FROM mlpipe_stage4
)
/* Predictions of a fit where its rows live: the rows' own columns and `predicted`, NULL for a row without usable covariates or with a */
/* level of a fixed factor that the fit has not seen. Unseen and NULL keys get the population's value. */
/* b ~ when + (1 | g:h): marginal predictions on the scale of the response */
/* reads lake.rows */
SELECT
  mlpipe_stage5.*
  EXCEPT (mlpipe_linear, mlpipe_eta, mlpipe_z, mlpipe_tail, mlpipe_mean),
  CASE
    WHEN NOT mlpipe_eta IS NULL AND mlpipe_mean * 0.0e0 = 0.0e0
    THEN mlpipe_mean
  END AS predicted
FROM mlpipe_stage5
