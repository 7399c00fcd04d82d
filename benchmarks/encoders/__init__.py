"""`wsi-rt bench encoders`: cases.py what is run, published.py the slide encoder as published, worker.py one measurement
in a process of its own, run.py the order of it all and the gate."""
