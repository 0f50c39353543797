-- Blocks with the same number of rows share their part of the covariance matrix, so their sums enter the likelihood
-- only through the totals and cross-products below: one row per distinct block size, however many blocks there are.
select row_count, count(*) as block_count from blocks group by row_count
