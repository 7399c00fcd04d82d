"""`wsi-rt bench kernels`: the GPU operators against their peers, the published way and the roofline.

`cases.py`: what is measured, without torch; `operators.py`: inputs and providers; `branches.py`: dilated attention as
its peers compute it; `gate.py`: who may be timed; `run.py`: the bench.
"""
