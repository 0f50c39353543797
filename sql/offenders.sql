-- Rows whose columns are all finite while a term of the formula is not, such as log(0): how many, and one such row.
select count(*) as row_count from used
