"""What the program says to people: failures, events of a run, masked and printable text.

The lowest floor: it imports no other room.
"""
