-- The rows of an iterative fit in the order of their blocks: the features of the design, the mean response `y` of each row or
-- cell, `size` (how many rows or trials it stands for), prior weight `w`, `offset`, further functions of the response t0, t1, and
-- `constant`, the part of the log-likelihood that no parameter changes. Rows that share block and design row become one cell where that pays.
select * from used
