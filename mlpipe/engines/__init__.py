"""Where rows live: one module an engine, `base.py` the protocol they share."""
