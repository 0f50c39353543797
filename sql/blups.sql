-- Per block: Z'wZ and Z'w(y - X beta). The conditional modes are Lambda (Lambda'Z'wZ Lambda + I)^-1 Lambda' Z'w(y - X beta).
select count(*) as row_count from used
