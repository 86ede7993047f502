"""The methods: one folder per stage, one file per method; `base.py` is the protocol."""
