-- Mean, spread and range of numeric expressions: on a sample for shifts and scales (which need not be exact), on all used rows for data-dependent bases.
select count(*) as row_count from used
