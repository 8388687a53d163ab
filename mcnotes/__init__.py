"""Mode connectivity via neuron alignment: the package under the book.

Modules, from the ground up (each imports only from the lines above its own):

    models  perms  curves  attacks  store  figures
    symmetry  data  evaluate
    align  train
    pam
"""
