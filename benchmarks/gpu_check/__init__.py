"""What is run first on a machine with a GPU, as the machine comes: nothing is installed.

``python3 -m benchmarks.gpu_check OUT [correctness|timings]`` with whatever python3 holds torch.

parts.py      what is done, in which order, how long each part may take
running.py    a part as a process, its words in a file; all of it in one archive
place.py      where things are written: OUT and a cache, nothing else
machine.py    what is here, and what is missing, by name
ops.py        the ops, timed; sides.py: against what
models.py     Florence-2, timed
training.py   a training step of Florenz, timed
"""
