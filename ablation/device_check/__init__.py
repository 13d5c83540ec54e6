"""Does a device give the right numbers, and how fast: the tables of `scripts/check_device.py`."""
