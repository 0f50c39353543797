-- Ungrouped cross-products of all features: [X y]'w[X y] (Bates et al. 2015, section 3.2), one row.
select count(*) as row_count from used
