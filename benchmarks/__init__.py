"""Measurements behind `wsi-rt bench`: one module or folder a bench; report.py, machine.py and timing.py are shared."""
