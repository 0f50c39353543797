-- Why rows were left out: how many values are missing, infinite, or (weights) zero or negative. A row may count in several columns.
select count(*) as row_count from src
