-- The response of the used rows: how many, those outside the family's domain, and moments for the start of the fit.
select count(*) as row_count from used
