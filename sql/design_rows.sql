-- How often each design row occurs in a sample, to foresee what holding equal rows of a block as one cell would save.
select count(*) as row_count from used
