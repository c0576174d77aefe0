"""What makes an SD1 an SD1: facts as values, and how a file is recognised by them.

Family differences are data. Whatever is said of a file comes with its evidence and how sure it is. No torch here.
"""
