"""A federation over a network, on Flower: clients and server on machines of their own.

`python -m fedspa.flower` prints the folder of the Flower app, for `flwr run`.
"""
