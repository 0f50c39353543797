-- Per block: cross-products F'wF of the features, and F'wr with the residual r = y - X beta. They give X_i'V_i^-1 X_i and X_i'V_i^-1 r_i,
-- and with these what the fixed effects would be without the block.
select count(*) as row_count from used
