-- The rows that enter the fit, one column per feature.
-- src offers the used columns by position: c3 is the source's fourth column as a number (or text, or boolean), k3 the
-- same column as a key, in the source's own type. Rows with a missing or infinite value in any used column are left out here and
-- counted apart (missing.sql). Features are shifted and scaled near mean 0 and spread 1, so that sums of their products keep their digits.
select * from src
