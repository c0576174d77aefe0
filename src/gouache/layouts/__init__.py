"""What tensors are called, as tables: the names networks carry, and how every other layout is turned into them.

No tensor of real size is held here and no file is read; a table that forgets a name says so.
"""
