"""Whole networks timed beside other engines: what `memnet bench` and benchmarks/ measure with.

sizes.py     what an image size is called
truth.py     images, their restoration in float64, and the gate that every variant must pass before it is timed
peers.py     everything that can run the network: this package's backends and the engines of others
prepare.py   the files that they read
worker.py    one variant in a process of its own; process.py is its parent's side
pairs.py     rounds in turns with the subject, and when there are enough of them
measure.py   all of it for one size: rows of results
facts.py     what a file of results says about machine and software
"""
