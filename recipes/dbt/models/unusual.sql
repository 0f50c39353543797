select subject, days, reaction, fitted from {{ ref("fitted") }} where abs(resid) > 60
