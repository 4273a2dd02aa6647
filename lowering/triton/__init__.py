"""The ops as Triton kernels: a module of an op, or of one form of it, has ``plan``, which gives the launches.

What several of them are made of::

    launch, types, arithmetic, copying    a launch as a value, and small pieces of kernels
    beam, ranked                          the K best addresses, in a thread's registers
    memory_scan_mass, mass_spans          the mass of the serial scans; ..._backward its way back
    memory_scan_rows_backward             the rows of the serial scan's way back
    slot_order, slot_walk, slot_pieces    the scans over slots: accesses sorted, cut in pieces, and walked
    slot_masses, slot_mass_backward       their mass, and its way back

``binary`` compiles a launch for a GPU that need not be there; ``ordering`` rules out races in what it compiled.
"""
