-- The distinct values of each categorical column and how often they occur, from all used rows, never from a sample.
select count(*) as row_count from used
