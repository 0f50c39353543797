-- Per cluster: X'w e, the score of its rows, and the cross-products that a correction for small samples or absorbed effects needs.
select count(*) as row_count from used
