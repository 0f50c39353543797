-- Per block: rows, and the sums Z'wZ and Z'w[X y] that the likelihood of a mixed model needs. No block's own X'X is needed.
select count(*) as row_count from used
