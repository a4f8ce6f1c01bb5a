"""The specification: every op in plain PyTorch, any floating dtype, any device.

Each function here has the signature of the schema it implements. It is what serves where nothing
faster is loaded, and, in float64, what every kernel is measured against.
"""
