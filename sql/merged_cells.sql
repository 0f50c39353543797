-- Cells of several states of a store as cells of their union: those of one block with the same design row (and weight, offset and, where it
-- matters, response) add up. `size` adds; `y` and the further functions of the response are means, weighted by size.
select * from used
