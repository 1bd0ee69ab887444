"""What is looked at before a run is sent: places, rights, machines and inputs, one check a line.

Everything here only reads. A check returns a `findings.Finding`, or raises what a client raised,
which `findings.unchecked` turns into one.
"""
