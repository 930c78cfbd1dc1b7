"""Studies: from a YAML file to a results folder of trained trials. It must not know `analysis`: what it needs of it is
handed in.
"""
