"""Mode connectivity via neuron alignment: the package under the book.

Importing it does no work. `tests/test_project.py` lists its layers, from the ground up.
"""
